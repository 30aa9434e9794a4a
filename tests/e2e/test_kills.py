"""Every command that writes goes on after a kill: the same command ends as if undisturbed."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from tests.conftest import write_tiny_llama
from tests.kill_trials import COMMANDS, KILLED, Killer, contents, make_inputs
from tests.kills import Server
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("kills"))


@pytest.mark.parametrize("name", KILLED)
def test_the_same_command_goes_on_after_a_kill_at_any_event(
    name: str, place: Path, server: Server
) -> None:
    # all of theirs take too long for one test: benchmarks/kills.py tries them
    most = 25 if name in ("study", "convert, searching") else None
    trials = Killer(server, place, name).at_events(most)
    print(trials)
    assert trials.kills > 4
    assert not trials.wrong


@pytest.mark.parametrize("name", ["train", "tune"])
def test_a_run_that_is_killed_at_random_moments(name: str, place: Path, server: Server) -> None:
    trials = Killer(server, place, name).at_random(10)
    print(trials)
    assert not trials.wrong


def test_no_kill_leaves_half_a_model_or_loses_the_old_one(
    place: Path, server: Server, tmp_path: Path
) -> None:
    """`convert --overwrite` of another source: OUT is the old model or the new one at any time."""
    write_tiny_llama(tmp_path / "other", tie_word_embeddings=False)
    (tmp_path / "run").mkdir()
    first = COMMANDS["convert"].replace("../../dense", str(place / "dense"))
    second = first.replace(str(place / "dense"), "../other") + " --overwrite"
    wholes = []
    for command in (first, second):
        assert server.run(tmp_path / "run", command).code == 0
        AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "out")
        wholes.append(contents(tmp_path / "run" / "out"))
    assert wholes[0] != wholes[1]
    event_idx = swaps = 0
    ended = -signal.SIGKILL
    while ended == -signal.SIGKILL:
        run = tmp_path / f"run {event_idx}"
        run.mkdir()
        assert server.run(run, first).code == 0
        ended = server.run(run, second, event_idx).code
        out, old = run / "out", run / ".out.old"
        assert contents(out if out.exists() else old) in wholes
        swaps += not out.exists()  # killed between two renames: the next run finishes the swap
        if ended != 0:
            assert server.run(run, second).code == 0
        assert contents(run) == {"out": None} | {f"out/{k}": v for k, v in wholes[1].items()}
        shutil.rmtree(run)
        event_idx += 1
    assert ended == 0
    assert event_idx > 20
    assert 0 < swaps < 10
