"""Tokenisers run in bounded time and memory.

A tokenizer.json is a stranger's program: a pattern can try for ever to match, and rules can double
a text again and again. The tokenizers library has no limit for either, but its calls on a batch
leave Python free, so another thread can watch them.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from moefy.errors import CheckpointError, reason
from moefy.hardware import rss_bytes

_CPU_S = 5.0
_CHARACTERS_PER_CPU_S = 50_000  # ordinary ones do twenty times as many
_MEMORY_BYTES = 1 << 30
_BYTES_PER_CHARACTER = 1000  # a token's ids, places and text take hundreds of bytes
_LOOK_EVERY_S = 0.05
_FILES = (
    *("tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json"),
)

Result = TypeVar("Result")


def bounded(tokenise: Callable[[], Result], characters: int) -> Result:
    """Return what a tokenizer makes of texts, if it comes to an end.

    The thread of one that does not ends with the process: nothing can stop it before.

    Args:
        tokenise: calls the tokenizer on a batch; a call on a single text cannot be watched.
        characters: number of them in the texts.

    Raises:
        CheckpointError: the tokenizer fails on a text, or takes too much time or memory.
    """
    # processor time, because a laptop may sleep meanwhile
    end_s = time.process_time() + _CPU_S + characters / _CHARACTERS_PER_CPU_S
    most_bytes = _MEMORY_BYTES + _BYTES_PER_CHARACTER * characters
    worker = _idle.pop() if _idle else _Worker()
    worker.asked.put(tokenise)
    held_bytes = 0
    while True:
        with suppress(Empty):
            result, error = worker.answers.get(timeout=_LOOK_EVERY_S)
            break
        # this is rare: most batches are done by now
        held_bytes = held_bytes or rss_bytes()
        grown_bytes = rss_bytes() - held_bytes
        if time.process_time() > end_s or grown_bytes > most_bytes:
            raise _refusal(f"takes too much time or memory for {characters:,} characters")
    _idle.append(worker)
    if error is not None:
        raise _refusal(f"fails on a text ({reason(error)})") from error
    return result


def try_added_tokens(folder: Path) -> None:
    """Normalise a folder's added tokens, as the library does while it loads them, unwatched.

    Raises:
        CheckpointError: see `bounded`.
        Exception: the files cannot be read.
    """
    found = [
        json.loads((folder / name).read_bytes()) for name in _FILES if (folder / name).exists()
    ]
    if not found or not (rules := found[0].get("normalizer")):
        return
    from tokenizers import Tokenizer

    model = {"type": "WordLevel", "vocab": {"x": 0}, "unk_token": "x"}
    probe = Tokenizer.from_str(
        json.dumps({"normalizer": rules, "added_tokens": [], "model": model})
    )
    texts = [*_texts([found[0].get("added_tokens"), found[1:]])]
    bounded(partial(probe.encode_batch, texts), sum(map(len, texts)))


def _texts(waiting: list[Any]) -> Iterator[str]:
    """Iterate over the texts and keys in JSON values."""
    while waiting:
        match waiting.pop():
            case str(text):
                yield text
            case list(items):
                waiting += items
            case dict(entries):
                waiting += [*entries, *entries.values()]


class _Worker:
    """A thread that waits for calls: a new one for each would take longer than a short text."""

    def __init__(self) -> None:
        self.asked: SimpleQueue[Callable[[], Any]] = SimpleQueue()
        self.answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                self.answers.put((self.asked.get()(), None))
            except BaseException as error:  # a panic of the Rust library is no Exception
                self.answers.put((None, error))


_idle: list[_Worker] = []
if hasattr(os, "register_at_fork"):  # where there are forks, which have no threads
    os.register_at_fork(after_in_child=_idle.clear)


def _refusal(problem: str) -> CheckpointError:
    return CheckpointError(
        f"the tokenizer {problem}: its tokenizer.json is damaged or made to do harm; take the "
        "tokenizer files of the model's own publisher"
    )
