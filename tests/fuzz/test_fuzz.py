"""Changed inputs of every kind end in success or in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import make_place
from tests.fuzz.runner import counts, modules, run
from tests.kills import Server

EVERY = 4
"""Each so-manieth input is tried here, for CI's sake; `python -m tests.fuzz` tries all."""
SLOW = {"moefy_files": 20, "recipes": 20}
"""Modules of which the test takes fewer inputs."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_place(tmp_path_factory.mktemp("fuzz") / "place")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", modules())
def test_every_changed_input_ends_in_success_or_one_line(
    name: str, place: Path, server: Server
) -> None:
    outcomes = list(run(name, place, server, every=SLOW.get(name.rpartition(".")[2], EVERY)))
    print(*map(", ".join, counts(outcomes)), sep="\n")
    wrong = [outcome for outcome in outcomes if outcome.end == "wrong"]
    assert not wrong
