"""`moefy routing`: JSON for programs, tables for people, and the figures."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import write_tiny_llama

import moefy
from moefy.cli import main
from moefy.recipe import LLAMA_MOE

PLAIN: dict[str, Any] = LLAMA_MOE | {"repair": "none"}
SMALL: dict[str, Any] = {"windows": 2, "sequence_length": 24}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    dense = write_tiny_llama(tmp_path / "dense")
    moefy.convert(dense, tmp_path / "moe", experts=6, active=2, **PLAIN)
    return [dense, tmp_path / "moe"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> Any:
    monkeypatch.setattr(sys, "argv", ["moefy", "routing", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_info:
        main()
    return exit_info.value.code


def test_json_and_tables(
    models: list[Path],
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = (*models, "--data", corpus, "--windows", 2, "--sequence-length", 24)
    assert run(monkeypatch, *command, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    expected = moefy.measure_routing(models, data=corpus, **SMALL)
    assert found == asdict(expected)
    assert [model["active"] for model in found["models"]] == [2]

    assert run(monkeypatch, *command) == 0
    printed = capsys.readouterr().out
    assert "Use of the experts, 96 tokens" in printed
    lines = [line.split("│")[2].strip() for line in printed.splitlines() if line.startswith("│")]
    assert lines == ["0", "1", "mean"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--split", "all of it"], "'heldout', 'train', 'all'"),
    ],
)
def test_bad_options(
    models: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, *models, *arguments) == 2
    assert message in capsys.readouterr().err
