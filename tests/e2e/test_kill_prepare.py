"""Killing `prepare` again and again changes nothing in what it finally writes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import byte_tokenizer

from moefy.data.shards import TokenShards, is_prepared
from moefy.errors import CorpusError

KILLER = Path(__file__).with_name("kill_prepare.py")


@pytest.fixture
def killer() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, str(KILLER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.communicate()


def test_killed_at_ever_later_moments(
    corpus: Path, tmp_path: Path, killer: subprocess.Popen[str]
) -> None:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")

    def run(out: Path, last: int) -> str:
        assert killer.stdin is not None
        assert killer.stdout is not None
        killer.stdin.write(f"{corpus}\t{out}\t{tmp_path / 'tokenizer'}\t{last}\n")
        killer.stdin.flush()
        return killer.stdout.readline().strip()

    def contents(out: Path) -> dict[str, bytes]:
        files = (file for file in out.rglob("*") if file.is_file())
        return {file.relative_to(out).as_posix(): file.read_bytes() for file in files}

    assert run(tmp_path / "whole", 0) == "exit 0"
    whole = contents(tmp_path / "whole")
    assert len(whole) > 4
    out = tmp_path / "out"
    kills = 0
    while (ended := run(out, 1 + 3 * kills)) != "exit 0":
        assert ended == "killed"
        kills += 1
        if out.exists() and not is_prepared(out):
            with pytest.raises(CorpusError, match=r"unfinished|no prepared"):
                TokenShards(out)
    assert kills > 8
    assert contents(out) == whole
    assert {path.name for path in tmp_path.iterdir()} == {"corpus", "out", "tokenizer", "whole"}
