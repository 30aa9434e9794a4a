"""A study goes on where it stopped, skips what is done, and says what it cannot do."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.toys import SMOKE, make_toys

import moefy
from moefy.errors import OutputError, UsageError
from moefy.progress import Progress
from moefy.run_folder import RunFolder
from moefy.studies.ablations import METHODS
from moefy.studies.report import page
from moefy.studies.run import _is_complete

TINY: dict[str, Any] = SMOKE | {"seeds": 1, "windows": 1, "tokens": 128}


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_toys(tmp_path_factory.mktemp("toys"))


def tiny_study(toys: tuple[Path, ...], out: Path, *only: str, **more: Any) -> Any:
    choices = TINY | {"model": toys[0], "data": toys[1]} | more
    return moefy.study(out, only=only, **choices)


def lines_of(out: Path) -> list[str]:
    return (out / "runs.jsonl").read_text().splitlines()


def test_a_conversion_that_a_kill_left_is_not_taken_for_a_model(tmp_path: Path) -> None:
    for is_complete in (False, True):
        with RunFolder(tmp_path / "moe", "model", resumes=True) as folder:
            folder.begin({})
            (folder.work / "config.json").write_text("{}")
            if is_complete:
                folder.finish()
        assert _is_complete(tmp_path / "moe") == is_complete


def test_a_study_that_is_stopped_goes_on(toys: tuple[Path, ...], tmp_path: Path) -> None:
    whole = tiny_study(toys, tmp_path / "whole", "rescaling")
    assert whole.measured == len(whole.runs) == 6
    assert {run.seed for run in whole.runs} == {0}

    out, steps = tmp_path / "stopped", 0

    def stop(progress: Progress) -> None:
        nonlocal steps
        if progress.stage == "train":
            steps += 1
            if steps == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_study(toys, out, "rescaling", report=stop)
    kept = lines_of(out)
    assert [json.loads(line)["arm"] for line in kept] == ["dense", "4/16 not rescaled"]
    assert list((out / "work/models").iterdir())  # the conversion of the run that stopped
    done = tiny_study(toys, out, "rescaling")
    assert done.measured == 4
    assert lines_of(out)[:2] == kept
    assert lines_of(out) == lines_of(tmp_path / "whole")
    for name in ("runs.jsonl", "study.md"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (out / "work").exists()

    again = tiny_study(toys, out, "rescaling")
    assert (again.measured, lines_of(out)) == (0, lines_of(tmp_path / "whole"))


def test_runs_that_ablations_share_are_done_once(toys: tuple[Path, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = tiny_study(toys, out, "scratch")
    assert [run.arm for run in first.runs] == [
        *("dense", "converted", "trained dense", "same architecture from scratch"),
        *("pruned dense", "pruned dense, not refitted"),
    ]
    by_arm = {run.arm: run for run in first.runs}
    assert by_arm["dense"].trained == 0
    assert by_arm["trained dense"].loss_before == by_arm["dense"].loss
    assert by_arm["trained dense"].loss != by_arm["dense"].loss
    assert {run.trained for run in first.runs} == {0, 128}
    scratch, converted = by_arm["same architecture from scratch"], by_arm["converted"]
    assert scratch.total_params == converted.total_params
    assert scratch.loss_before > converted.loss_before + 2
    assert converted.loss != converted.loss_before

    both = tiny_study(toys, out, "sampling")
    assert both.measured == 4  # not the dense model, and not Uniform: that is "converted"
    uniform = next(run for run in both.runs if run.arm == "Uniform")
    assert uniform.domain_loss == converted.domain_loss
    for title in ("## From scratch", "## Sampling"):  # the page shows both
        assert title in (out / "study.md").read_text()


def test_every_method_is_measured_untrained(toys: tuple[Path, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = tiny_study(toys, out, "methods")
    assert done.measured == len(METHODS) + 1
    by_arm = {run.arm: run for run in done.runs}
    assert set(by_arm) == {"dense", *METHODS}
    assert {run.trained for run in done.runs} == {0}
    assert by_arm["moefy"].loss < by_arm["moefy: no repair"].loss
    assert by_arm["static + refit"].total_params < by_arm["dense"].total_params
    own = by_arm["moefy: the model's own text"]
    assert own.loss != by_arm["moefy"].loss
    assert [row[0] for row in done.tables["methods"][1:]] == ["dense", *METHODS]


def test_seeds_of_several_machines_are_put_together(toys: tuple[Path, ...], tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    tiny_study(toys, out, "rescaling")
    tiny_study(toys, other, "rescaling", first_seed=1)
    with (out / "runs.jsonl").open("a") as file:
        file.write((other / "runs.jsonl").read_text())
    both = tiny_study(toys, out, "rescaling", seeds=2)
    assert both.measured == 0
    tiny_study(toys, tmp_path / "whole", "rescaling", seeds=2)
    for name in ("runs.jsonl", "study.md"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_runs_of_other_settings_are_done_again(toys: tuple[Path, ...], tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    tiny_study(toys, out, "rescaling")
    tiny_study(toys, other, "rescaling", first_seed=1, tokens=256)
    with (out / "runs.jsonl").open("a") as file:
        file.write((other / "runs.jsonl").read_text())
    done = tiny_study(toys, out, "rescaling", seeds=2)
    assert done.measured == 5  # the dense model is not trained, so it is the same
    assert {run.trained for run in done.runs} == {0, 128}


def test_a_copied_study_goes_on(toys: tuple[Path, ...], tmp_path: Path) -> None:
    tiny_study(toys, tmp_path / "out", "rescaling")
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    assert tiny_study(toys, tmp_path / "copy", "rescaling").measured == 0


def test_losses_are_those_of_evaluate(toys: tuple[Path, ...], tmp_path: Path) -> None:
    done = tiny_study(toys, tmp_path / "out", "rescaling", windows=3)
    text = {"data": toys[1], "windows": 3, "sequence_length": TINY["sequence_length"]}
    (expected,) = moefy.evaluate(toys[0], decode=False, **text).results
    dense = done.runs[0]
    assert dense.arm == "dense"
    assert {d: math.exp(loss) for d, loss in dense.domain_loss.items()} == pytest.approx(
        expected.domain_perplexity, rel=1e-5
    )


def test_the_page_follows_from_its_files(toys: tuple[Path, ...], tmp_path: Path) -> None:
    out, copied = tmp_path / "out", tmp_path / "copied"
    tiny_study(toys, out, "rescaling", seeds=2)
    copied.mkdir()
    for name in ("about.md", "recipe.yaml", "runs.jsonl"):
        shutil.copyfile(out / name, copied / name)
    written = (out / "study.md").read_text()
    assert page(copied) == written
    lines = lines_of(out)
    run = json.loads(lines[-1])
    assert (run["arm"], run["seed"]) != ("dense", 0)
    (copied / "runs.jsonl").write_text("\n".join([*lines[:-1], json.dumps(run | {"loss": 9.0})]))
    assert page(copied) != written


def test_other_settings_are_refused(toys: tuple[Path, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = tiny_study(toys, out, "rescaling")
    with pytest.raises(OutputError, match=r"other settings .*tokens: was 128, now 256"):
        tiny_study(toys, out, "rescaling", tokens=256)
    more = tiny_study(toys, out, "rescaling", seeds=2)  # more seeds are no other settings
    assert more.measured == 5  # the dense model has none
    assert first.runs[0] in more.runs
    (out / "runs.jsonl").write_text('{"ablation": "torn')
    with pytest.raises(OutputError, match=r"runs.jsonl, line 1 is damaged"):
        tiny_study(toys, out, "rescaling")
    anew = tiny_study(toys, out, "rescaling", tokens=256, overwrite=True)
    assert {run.trained for run in anew.runs} == {0, 256}
    with pytest.raises(OutputError, match="exists and is not empty"):
        tiny_study(toys, toys[1], "rescaling", data="demo")
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="is not a plain folder"):
        tiny_study(toys, tmp_path / "file", "rescaling")


def test_what_cannot_be_studied(toys: tuple[Path, ...], tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    shutil.copyfile(toys[1] / "wikipedia.jsonl", text / "wikipedia.jsonl")
    out = tmp_path / "out"
    with pytest.raises(UsageError, match=r"nothing can be studied .*seven domains .*wikipedia"):
        tiny_study(toys, out, "sampling", data=text)
    with pytest.raises(UsageError, match="cannot be split into 48 equal experts"):
        tiny_study(toys, out, "rescaling", experts=48)
    with pytest.raises(UsageError, match="unknown key 'tokns'"):
        tiny_study(toys, out, "rescaling", train={"tokns": 3})
    assert not out.exists()
    done = tiny_study(toys, out, "rescaling", "sampling", data=text)
    assert list(done.skipped) == ["sampling"]
    assert (
        "Not run:\n\n- sampling: needs SlimPajama's seven domains" in (out / "study.md").read_text()
    )
