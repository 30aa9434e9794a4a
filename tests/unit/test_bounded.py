"""Tokenizers that hang or multiply their text end in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.toys import byte_tokenizer

from moefy.checkpoint.bounded import bounded
from moefy.checkpoint.load import load_tokenizer
from moefy.errors import CheckpointError

DOUBLED = {
    "type": "Sequence",
    "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 40,
}
STEPS = {  # half a million steps at each place of a text, which the library allows
    "type": "Split",
    "pattern": {"Regex": "(?:[ab ]{1,9}){6}#"},
    "behavior": "Isolated",
    "invert": False,
}
# a process of its own, because the thread that hangs goes on until it ends
WATCHED = """
import sys
from tokenizers import Tokenizer
from moefy.checkpoint import bounded
from moefy.data.tokenise import encode_documents
bounded._CPU_S, bounded._MEMORY_BYTES = float(sys.argv[1]), int(sys.argv[2])
tokenizer = Tokenizer.from_str(sys.stdin.read())
try:
    print(len(encode_documents(tokenizer, None, ["ab " * 300] * 300)))
except bounded.CheckpointError as error:
    print(error)
"""


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a tokenizer with other parts."""

    def write(**parts: Any) -> Path:
        byte_tokenizer().save_pretrained(tmp_path)
        file = tmp_path / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | parts))
        return file

    return write


@pytest.mark.parametrize(
    ("parts", "cpu_s", "memory", "said"),
    [
        ({}, 0.2, 1 << 20, "270000"),
        ({"normalizer": DOUBLED}, 0.2, 1 << 40, "takes too much time or memory for 270,000"),
        ({"normalizer": DOUBLED}, 1000, 1 << 20, "takes too much time or memory for 270,000"),
        ({"pre_tokenizer": STEPS}, 0.2, 1 << 40, "takes too much time or memory for 270,000"),
    ],
)
def test_a_tokenizer_is_stopped(
    written: Callable[..., Path], parts: Any, cpu_s: float, memory: int, said: str
) -> None:
    arguments = [sys.executable, "-c", WATCHED, str(cpu_s), str(memory)]
    content = written(**parts).read_text()
    done = subprocess.run(
        arguments, input=content, capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert said in done.stdout


def test_added_tokens_are_tried_before_they_are_loaded(written: Callable[..., Path]) -> None:
    token = {"id": 257, "content": "a" * 20, "normalized": True, "special": False}
    token |= dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
    bad = {"type": "Replace", "pattern": {"Regex": "(a+)+b"}, "content": "x"}
    file = written(normalizer=bad, added_tokens=[token | {"content": "a" * 40}])
    with pytest.raises(CheckpointError, match=r"fails on a text \(Onig"):
        load_tokenizer(file.parent)
    file = written(added_tokens=[token])
    assert "a" * 20 in load_tokenizer(file.parent).get_vocab()


def test_calls_from_threads_and_forks_do_not_meet() -> None:
    backend = byte_tokenizer().backend_tokenizer
    found: list[list[int]] = []

    def ask(text: str) -> None:
        for _ in range(50):
            (encoding,) = bounded(partial(backend.encode_batch, [text]), len(text))
            if encoding.tokens != list(text):
                found.append(encoding.ids)

    threads = [threading.Thread(target=ask, args=(text,)) for text in ("abc", "xy", "nnnn")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not found
    child = os.fork()
    if child == 0:
        os._exit(bounded(lambda: 7, 1))  # a worker of the parent would never answer
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_template_runs_under_a_lower_limit_of_the_machine() -> None:
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"
        "from moefy.data.render import render\n"
        "print(render('{{ messages[0].content }}', [{'role': 'user', 'content': 'hi'}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.stdout == "hi\n", done.stderr
