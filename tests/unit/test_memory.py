"""The memory of large tensors: asked for in large pages, and used again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc's settings")

FAULTS = """
from resource import RUSAGE_SELF, getrusage
from moefy.hardware import freed_memory_kept

def faults():
    before = getrusage(RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray(48 << 20)  # beyond what glibc ever keeps by itself
    return getrusage(RUSAGE_SELF).ru_minflt - before

usual = faults()
with freed_memory_kept():
    faults()  # the first block must come from the system
    kept = faults()
print(usual, kept, faults())
"""


def printed(code: str, **environment: str) -> str:
    given = {key: os.environ[key] for key in os.environ if key != "THP_MEM_ALLOC_ENABLE"}
    command = [sys.executable, "-c", code]  # another process has a heap of its own
    done = subprocess.run(
        command, env=given | environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_freed_memory_is_used_again_until_the_end() -> None:
    usual, kept, after = map(int, printed(FAULTS).split())
    assert kept < usual / 5
    assert after > usual / 2


def test_huge_pages_are_asked_for_unless_the_user_decided() -> None:
    code = "import moefy, os; moefy.train; print(os.environ['THP_MEM_ALLOC_ENABLE'])"
    assert printed(code) == "1"
    assert printed(code, THP_MEM_ALLOC_ENABLE="0") == "0"
