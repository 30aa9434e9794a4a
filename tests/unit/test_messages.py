"""What a person sees of an error: one line, no secret, nothing that a terminal obeys."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from moefy.cli import main

MODULE = sys.modules["moefy.cli.app"]


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*words: str, code: int = 2) -> str:
        monkeypatch.setattr(sys, "argv", ["moefy", *words])
        with pytest.raises(SystemExit) as stop:
            main()
        assert stop.value.code == code
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("convert", "Missing argument 'source'"),
        ("convert a b --nonsense", "No such option: --nonsense"),
        ("conver a b", "No such command 'conver'"),
        ("export a b.gguf", "No such command 'a': see `moefy export gguf --help` or `moefy export"),
        ("bench a --rounds many", "Invalid value for '--rounds'"),
    ],
)
def test_a_wrong_word_is_named_in_one_line(
    said: Callable[..., str], words: str, message: str
) -> None:
    line = said(*words.split())
    assert line.startswith(f"moefy: {message}")
    assert line.endswith("--help`")


def test_a_folder_of_nearly_the_same_name_is_named(
    said: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out/moe").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = said("eval", "out/moee")
    assert line.startswith("moefy: out/moee is no local folder (did you mean out/moe?) and the hub")


def test_a_message_is_short_and_shows_no_secret(
    said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-0123456789")
    line = said("inspect", "https://me:hunter2@host/sk-0123456789\x1b[31m" + "x" * 5000)
    assert len(line) < 500
    assert "hunter2" not in line
    assert "sk-0123456789" not in line
    assert "\x1b" not in line
    assert "/host/[$SOME_API_KEY]" in line


def test_an_error_of_the_system_is_no_bug_of_ours(
    said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(**_: object) -> None:
        Path("/nowhere/config.json").read_text()

    monkeypatch.setattr(MODULE, "app", lost)
    line = said("inspect", "model")
    assert line.startswith("moefy: /nowhere/config.json: No such file or directory: check")


def test_a_broken_installation_is_no_bug_of_ours(
    said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: object) -> None:
        import_module("moefy.nothing")

    monkeypatch.setattr(MODULE, "app", broken)
    line = said("inspect", "model", code=1)
    assert "lacks a part (No module named 'moefy.nothing'): pip install --upgrade moefy" in line


def test_any_other_error_is_called_a_bug(
    said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(**_: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(MODULE, "app", wrong)
    assert "unexpected KeyError: 'x' (this is a bug" in said("inspect", "model", code=1)
