"""Documents to token windows, packed across boundaries as in the paper."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Int

_DOCUMENTS_AT_ONCE = 64
_CHARACTERS_AT_ONCE = 1 << 20


def pack(
    documents: Iterator[str], tokenizer: Any, *, sequence_length: int, max_windows: int
) -> Int[np.ndarray, "windows sequence"]:
    """Tokenise documents, join them with the end-of-text token, and cut windows.

    Reads only as many documents as the windows need.

    Args:
        documents: texts.
        tokenizer: a transformers tokenizer; its special tokens in the text are read as text.
        sequence_length: tokens per window.
        max_windows: stop after so many.

    Returns:
        Token ids as int64; fewer windows than asked for when the documents run out, possibly none.
    """
    separator = tokenizer.eos_token_id
    separators = [] if separator is None else [separator]
    windows: list[list[int]] = []
    pending: list[int] = []
    while len(windows) < max_windows:
        batch = _batch(documents)
        if not batch:
            break
        tokenised = tokenizer(
            batch, add_special_tokens=False, split_special_tokens=True, verbose=False
        )
        for ids in tokenised["input_ids"]:
            pending += [*ids, *separators]
        cut = len(pending) // sequence_length * sequence_length
        windows += [
            pending[start : start + sequence_length] for start in range(0, cut, sequence_length)
        ]
        pending = pending[cut:]
    return np.array(windows[:max_windows], dtype=np.int64).reshape(-1, sequence_length)


def _batch(documents: Iterator[str]) -> list[str]:
    batch: list[str] = []
    for document in islice(documents, _DOCUMENTS_AT_ONCE):
        batch.append(document)
        if sum(map(len, batch)) > _CHARACTERS_AT_ONCE:
            break
    return batch
