"""Changes that any file can be given, and any JSON value."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

# None, wrong types, edges of numbers, text that leads out of a folder or that a terminal obeys
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 10**30, 0.5, float("nan"), float("inf"),
    "", "x", "../../out", "é\x1b[31m\x00",
    "x" * 5000, [], [[]], ["x"], {}, {"x": {"y": [1]}},
)  # fmt: skip


def byte_changes(content: bytes, number: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield a file's bytes, cut, flipped, replaced, repeated, and what it is instead."""
    draw = random.Random(seed)
    yield "empty", b""
    yield "zeros", bytes(len(content))
    yield "deep", b"[" * 100_000
    yield "a mark of UTF-8 before it", b"\xef\xbb\xbf" + content
    yield "UTF-16", content.decode(errors="replace").encode("utf-16")
    for _ in range(number):
        at = draw.randrange(len(content))
        match draw.randrange(5):
            case 0:
                yield f"cut at {at}", content[:at]
            case 1:
                bit = 1 << draw.randrange(8)
                yield f"bit {bit} of byte {at}", _spliced(content, at, bytes([content[at] ^ bit]))
            case 2:
                byte = bytes([draw.choice(b'0-9.eE"{}[]:,\\\x00\xff\n#&*!%@x')])
                yield f"byte {at} is {byte!r}", _spliced(content, at, byte)
            case 3:
                end = min(len(content), at + draw.randrange(1, 40))
                yield f"bytes {at} to {end} twice", content[:end] + content[at:]
            case _:
                end = min(len(content), at + draw.randrange(1, 40))
                yield f"bytes {at} to {end} gone", content[:at] + content[end:]


def _spliced(content: bytes, at: int, byte: bytes) -> bytes:
    return content[:at] + byte + content[at + 1 :]


def value_changes(
    record: Any, number: int, seed: int = 0, values: tuple[Any, ...] = VALUES
) -> Iterator[tuple[str, Any]]:
    """Yield a JSON value with another value or none in one place, or a key more."""
    places = list(_places(record))
    draw = random.Random(seed)
    whole = [(place, value) for place in places for value in (_GONE, *values)]
    for place, value in draw.sample(whole, min(number, len(whole))):
        changed = copy.deepcopy(record)
        inner = changed
        for key in place[:-1]:
            inner = inner[key]
        if value is _GONE:
            del inner[place[-1]]
        else:
            inner[place[-1]] = copy.deepcopy(value)
        said = "gone" if value is _GONE else repr(value)[:30]
        yield f"{'.'.join(map(str, place))} is {said}", changed
    yield "a list of it", [record]
    if isinstance(record, dict):
        yield "another key", {**record, "another": 1}


_GONE = object()


def _places(record: Any) -> Iterator[tuple[Any, ...]]:
    inner: Any = ()
    if isinstance(record, dict):
        inner = record.items()
    elif isinstance(record, list):
        inner = list(enumerate(record))[:3]  # the others are alike
    for key, value in inner:
        yield (key,)
        for place in _places(value):
            yield (key, *place)
