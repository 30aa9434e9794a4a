"""Killing `convert` at any moment never leaves an output that loads, nor loses an old one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

KILLER = Path(__file__).with_name("kill_convert.py")


@pytest.fixture(scope="module")
def convert_and_die() -> Iterator[Callable[[Path, Path, int], str]]:
    process = subprocess.Popen(
        [sys.executable, str(KILLER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    stdin, stdout = process.stdin, process.stdout
    assert stdin is not None
    assert stdout is not None

    def run(source: Path, out: Path, last: int) -> str:
        stdin.write(f"{source}\t{out}\t{last}\n")
        stdin.flush()
        return stdout.readline().strip()

    yield run
    process.communicate()


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_no_moment_leaves_half_a_model(
    make_llama: Callable[..., Path],
    tmp_path: Path,
    convert_and_die: Callable[[Path, Path, int], str],
) -> None:
    dense = make_llama()
    whole = tmp_path / "whole"
    assert convert_and_die(dense, whole, 0) == "exit 0"
    kills = 0
    for last in range(1, 1000):
        out = tmp_path / f"out{last}"
        ended = convert_and_die(dense, out, last)
        if ended == "exit 0":
            break
        assert ended == "killed"
        kills += 1
        if out.exists():  # renamed, and killed after that
            assert contents(out) == contents(whole)
        hidden = {path.suffix for path in tmp_path.glob(f".{out.name}.*")}
        assert hidden <= {".lock", ".next"}
    assert kills > 20
    assert ended == "exit 0"
    AutoModelForCausalLM.from_pretrained(whole)


def test_no_moment_loses_the_old_model(
    make_llama: Callable[..., Path],
    tmp_path: Path,
    convert_and_die: Callable[[Path, Path, int], str],
) -> None:
    first, second = make_llama("first"), make_llama("second", tie_word_embeddings=False)
    wholes = []
    for number, source in enumerate((first, second)):
        assert convert_and_die(source, tmp_path / f"whole{number}", 0) == "exit 0"
        wholes.append(contents(tmp_path / f"whole{number}"))
    swaps = 0
    for last in range(1, 1000):
        out, old = tmp_path / f"out{last}", tmp_path / f".out{last}.old"
        assert convert_and_die(first, out, 0) == "exit 0"
        ended = convert_and_die(second, out, last)
        assert contents(out if out.exists() else old) in wholes
        if ended == "exit 0":
            break
        if not out.exists():  # killed between the two renames: the next run finishes the swap
            swaps += 1
            assert convert_and_die(second, out, 0) == "exit 0"
            assert contents(out) == wholes[1]
            assert not list(tmp_path.glob(f".out{last}.*"))
    assert ended == "exit 0"
    assert 0 < swaps < 10
