"""Calibration tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from moefy.data.domains import documents_of, open_domains
from moefy.data.packing import pack
from moefy.errors import CorpusError
from moefy.progress import Progress, ProgressFn, silent


def calibration_windows(
    data: str | Path,
    tokenizer: Any,
    *,
    tokens: int,
    sequence_length: int,
    needed_tokens: int,
    report: ProgressFn = silent,
) -> Int[np.ndarray, "windows sequence"]:
    """Return windows of training documents, as many from each domain.

    Args:
        data: see `open_domains`.
        tokenizer: of the model.
        tokens: wanted in all, rounded up to whole windows per domain.
        sequence_length: tokens per window.
        needed_tokens: fewer are refused: a least-squares fit of d_ff weights per output needs at
            least d_ff tokens to be determined.
        report: told about progress.

    Raises:
        CorpusError: the text is not readable or too little.
    """
    domains = open_domains(data, report=report)
    per_domain = -(-tokens // (sequence_length * len(domains)))
    found = []
    for done, domain in enumerate(domains):
        report(Progress("calibration text", done, len(domains), domain.name))
        found.append(
            pack(
                documents_of(domain, "train"),
                tokenizer,
                sequence_length=sequence_length,
                max_windows=per_domain,
            )
        )
    report(Progress("calibration text", len(domains), len(domains)))
    windows = np.concatenate(found)
    if windows.size < needed_tokens:
        raise CorpusError(
            f"{windows.size:,} calibration tokens are too few: a stable fit of this model needs at "
            f"least {needed_tokens:,} (its intermediate_size); add text to {data} or raise "
            "calibration_tokens"
        )
    return windows
