"""`convert --max-loss`: the smallest active share that keeps a loss."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.toys import make_toys
from typer.testing import CliRunner

import moefy
from moefy.cli import app
from moefy.cli.output import log_lines
from moefy.errors import ArchitectureError, CorpusError, OutputError, UsageError
from moefy.progress import Progress, ProgressFn
from moefy.run_folder import MARKER, read_marker

# losses of a random split are far apart
SPLIT: dict[str, Any] = {
    "experts": 8,
    "partition": "random",
    "router": "random",
    "repair": "none",
    "calibration_length": 64,
}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A trained model, whose FFNs matter, and text."""
    return make_toys(tmp_path_factory.mktemp("search"))


@pytest.fixture(scope="module")
def losses(toys: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Nats above dense by active slices, of conversions that `evaluate` measures."""
    (dense, text), folder = toys, tmp_path_factory.mktemp("all")
    models = [dense]
    for active in range(1, 8):
        models.append(folder / str(active))
        moefy.convert(dense, models[-1], data=text, active=active, **SPLIT)
    sizes = {"windows": 8, "sequence_length": 64}
    done = moefy.evaluate(models, data=text, decode=False, **sizes)
    found = [result.excess_loss for result in done.results[1:]]
    return {active: each.value for active, each in enumerate(found, start=1) if each}


def run(toys: tuple[Path, Path], out: Path, max_loss: float, **how: Any) -> Any:
    dense, text = toys
    return moefy.search(dense, out, max_loss=max_loss, data=text, **SPLIT | how)


@pytest.fixture(scope="module")
def whole(
    toys: tuple[Path, Path], losses: dict[int, float], tmp_path_factory: pytest.TempPathFactory
) -> Any:
    """An undisturbed search for 5 of 8."""
    return run(toys, tmp_path_factory.mktemp("whole") / "out", losses[5] + 1e-4)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != MARKER}


@pytest.mark.parametrize("enough", [1, 3, 7])
def test_the_model_keeps_the_loss_and_the_next_smaller_one_does_not(
    toys: tuple[Path, Path], losses: dict[int, float], tmp_path: Path, enough: int
) -> None:
    assert sorted(losses.values(), reverse=True) == [*losses.values()]
    limit = losses[enough] + 1e-4
    done = run(toys, tmp_path / "out", limit)
    assert done.conversion.recipe.active == enough
    assert len(done.curve) == 3  # of 8 slices
    for probe in done.curve:
        assert probe.excess_loss.value == pytest.approx(losses[probe.active], abs=1e-5)
        assert (probe.excess_loss.value <= limit) == (probe.active >= enough)
        assert probe.share == probe.active / 8
        assert min(probe.prefill_speed, probe.decode_speed) > 0
    # nothing temporary is left, and the model is the one that `convert --active` writes
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    dense, text = toys
    moefy.convert(dense, tmp_path / "plain", data=text, active=enough, **SPLIT)
    found = files(tmp_path / "out")
    assert len(found.pop("curve.jsonl").splitlines()) == 3
    assert found == files(tmp_path / "plain")
    marker = read_marker(tmp_path / "out")
    assert marker is not None
    assert marker.identity["max_loss"] == limit


def test_a_given_number_of_shared_slices_stays(toys: tuple[Path, Path], tmp_path: Path) -> None:
    done = run(toys, tmp_path / "out", 100.0, shared=3)
    assert (done.conversion.recipe.active, done.conversion.recipe.shared) == (4, 3)


def test_a_loss_that_nothing_keeps(
    toys: tuple[Path, Path], losses: dict[int, float], tmp_path: Path
) -> None:
    told = f"7 active slices of 8, the most that can be tried, stand {losses[7]:.3f} nats"
    with pytest.raises(UsageError, match=told):
        run(toys, tmp_path / "new" / "out", 0.0)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"active": 4}, UsageError, "--max-loss finds --active, and that is 4 already"),
        ({"max_loss": float("nan")}, UsageError, "--max-loss is nan: give nats"),
        ({"max_loss": -0.1}, UsageError, "--max-loss is -0.1: give nats"),
        ({"data": "self"}, UsageError, "--data self has none"),
        ({"shared": 7}, UsageError, "between 7 shared and all 8"),
        ({"experts": 7}, UsageError, "cannot be split into 7 equal experts"),
        ({"target": "qwen3_moe"}, ArchitectureError, "qwen3_moe"),
        ({"calibration_length": 50_000}, CorpusError, "--set calibration_length=N"),
    ],
)
def test_refusals_leave_nothing(
    toys: tuple[Path, Path],
    tmp_path: Path,
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    dense, text = toys
    with pytest.raises(error) as refused:
        moefy.search(dense, tmp_path / "out", **{"max_loss": 0.1, "data": text} | SPLIT | changes)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert [*tmp_path.iterdir()] == []


def counting(conversions: list[int], stop_at: Callable[[Progress], bool]) -> ProgressFn:
    def report(progress: Progress) -> None:
        if progress.stage == "convert" and progress.done == progress.total:
            conversions.append(progress.total)
        if stop_at(progress):
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize(
    "moment",
    [
        Progress("convert", 1, 2),
        Progress("measure speed", 2, 6),
        Progress("search", 3, 3),
    ],
    ids=lambda moment: f"{moment.stage} {moment.done}",
)
def test_the_same_call_goes_on_with_what_a_stopped_one_has_converted(
    toys: tuple[Path, Path],
    losses: dict[int, float],
    whole: Any,
    tmp_path: Path,
    moment: Progress,
) -> None:
    limit, conversions, seen = losses[5] + 1e-4, list[int](), 0

    def is_there(progress: Progress) -> bool:
        nonlocal seen
        same = (progress.stage, progress.done) == (moment.stage, moment.done)
        seen += same
        return same and seen == (1 if moment.stage == "search" else 2)  # in the second probe

    with pytest.raises(KeyboardInterrupt):
        run(toys, tmp_path / "out", limit, report=counting(conversions, is_there))
    with pytest.raises(OutputError, match="unfinished model with other settings"):
        run(toys, tmp_path / "out", limit + 1)
    done = run(toys, tmp_path / "out", limit, report=counting(conversions, lambda _: False))
    assert len(conversions) == 3
    assert done.conversion.recipe == whole.conversion.recipe
    assert [probe.excess_loss for probe in done.curve] == [
        probe.excess_loss for probe in whole.curve
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    ours, theirs = files(tmp_path / "out"), files(whole.conversion.folder)
    del ours["curve.jsonl"], theirs["curve.jsonl"]  # it has speeds
    assert ours == theirs


def test_the_command_prints_the_curve(toys: tuple[Path, Path], tmp_path: Path) -> None:
    dense, text = map(str, toys)
    out = str(tmp_path / "out")
    words = ["convert", dense, out, "--data", text, "--max-loss", "100", "--experts", "4"]
    words += ["--partition", "random", "--router", "random", "--repair", "none"]
    words += ["--set", "calibration_length=64"]
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert found["recipe"]["active"] == 1
    assert [(probe["active"], probe["share"]) for probe in found["curve"]] == [(1, 0.25), (2, 0.5)]
    assert {"value", "low", "high"} == set(found["curve"][0]["excess_loss"])
    done = CliRunner().invoke(app, [*words, "--overwrite"], env={"COLUMNS": "80"})
    lines = done.stdout.splitlines()
    table = lines[: next(n for n, line in enumerate(lines) if line.startswith("└"))]
    assert max(map(len, table)) <= 80
    (row,) = (line for line in table if "written" in line)
    assert row.split()[1:4:2] == ["1", "25%"]
    assert "1 run per token" in done.stdout.replace("\n", " ")


def test_a_stage_within_another_does_not_silence_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 1000, 6))  # each report six seconds after the one before
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    report = log_lines()
    for turn in range(3):
        report(Progress("search", turn, 3))
        for done in (1, 2, 3):
            report(Progress("convert", done, 3))
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("search")] == [
        "search 1/3  0:00:48 left",
        "search 2/3  0:00:24 left",
    ]
    # each time that a stage comes, its time is counted anew
    assert [line for line in lines if line.startswith("convert")] == ["convert 3/3"] * 3
