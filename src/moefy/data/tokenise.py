"""Documents to token ids: one stream for `prepare`, windows for training."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Int

from moefy.checkpoint.bounded import bounded
from moefy.errors import CorpusError

_PIECE_CHARS = 8
"""Characters of a piece of a document, for each token of a window: enough to fill it."""


def encode_documents(backend: Any, eos: int | None, documents: list[str]) -> list[int]:
    """Return the ids of documents, one after another, each with the end-of-text token behind it.

    Special tokens that stand in a text are read as text: no document can end itself.

    Raises:
        CheckpointError: the tokenizer fails, or takes too much time or memory.
    """
    # transformers sets these before each call of its own, so nothing has to be put back
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    end = [] if eos is None else [eos]
    ids: list[int] = []
    encode = partial(backend.encode_batch_fast, documents, add_special_tokens=False)
    for encoding in bounded(encode, sum(map(len, documents))):
        ids += encoding.ids
        ids += end
    return ids


def backend_of(tokenizer: Any, name: str) -> Any:
    """Return the fast part of a transformers tokenizer; a CorpusError if it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise CorpusError(f"the tokenizer of {name} is no fast one: save it with a tokenizer.json")
    return backend


def pack(
    documents: Iterator[str], tokenizer: Any, *, sequence_length: int, max_windows: int
) -> Int[np.ndarray, "windows sequence"]:
    """Tokenise documents, join them with the end-of-text token, and cut windows, as in the paper.

    Only as many documents are read as the windows need; there are fewer windows, possibly none,
    when they run out.
    """
    backend = backend_of(tokenizer, tokenizer.name_or_path)
    ids: list[int] = []
    # A few at a time: the encodings of a batch take many times the memory of its text.
    while len(ids) < max_windows * sequence_length and (batch := list(islice(documents, 16))):
        ids += encode_documents(backend, tokenizer.eos_token_id, batch)
    num_windows = min(len(ids) // sequence_length, max_windows)
    flat = np.array(ids[: num_windows * sequence_length], dtype=np.int64)
    return flat.reshape(num_windows, sequence_length)


def scattered(
    documents: Iterator[str],
    tokenizer: Any,
    generator: np.random.Generator,
    *,
    sequence_length: int,
    max_windows: int,
) -> Int[np.ndarray, "windows sequence"]:
    """Return windows from as many documents as possible: one of each, at a random place.

    Documents that are shorter than a window are joined, as `pack` does. Only where the documents
    run out do they give more windows than one. No more of them are read than the windows need.
    """
    backend = backend_of(tokenizer, tokenizer.name_or_path)
    whole: list[list[int]] = []
    joined: list[int] = []  # what is shorter than a window
    spare: list[int] = []  # what a piece has beyond a window
    size = _PIECE_CHARS * sequence_length

    def pieces() -> Iterator[str]:
        others: list[str] = []
        for text in documents:
            starts = generator.permutation(range(0, len(text), size)).tolist()
            first, *rest = (text[start : start + size] for start in starts)
            yield first
            others += rest
            if len(others) > 4 * max_windows:  # more than are needed, of texts of any size
                others = some(others)
        yield from some(others)

    def some(texts: list[str]) -> list[str]:
        return [texts[i] for i in generator.permutation(len(texts))[: 2 * max_windows]]

    def fill(ids: list[int]) -> None:
        joined.extend(ids)
        while len(joined) >= sequence_length:
            whole.append(joined[:sequence_length])
            del joined[:sequence_length]

    for piece in pieces():
        ids = encode_documents(backend, tokenizer.eos_token_id, [piece])
        if len(ids) > sequence_length:
            whole.append(ids[:sequence_length])
            spare += ids[sequence_length:]
        else:
            fill(ids)
        if len(whole) >= max_windows:
            break
    else:
        fill(spare)
    return np.array(whole[:max_windows], dtype=np.int64).reshape(-1, sequence_length)
