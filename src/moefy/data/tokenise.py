"""Documents to token ids: one stream for `prepare`, windows for training."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from moefy.checkpoint.bounded import bounded
from moefy.errors import CorpusError


def encode_documents(backend: Tokenizer, eos: int | None, documents: list[str]) -> list[int]:
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


def backend_of(tokenizer: Any, name: str) -> Tokenizer:
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
