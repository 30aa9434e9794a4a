"""Calibration tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int

from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.data.records import open_domains
from moefy.data.tokenise import scattered
from moefy.errors import CorpusError
from moefy.hardware import device
from moefy.progress import Progress, ProgressFn, silent

SELF = "self"
_SAMPLES_AT_ONCE = 56


def calibration_windows(
    data: str | Path,
    folder: Path,
    *,
    tokens: int,
    sequence_length: int,
    needed_tokens: int,
    seed: int = 0,
    report: ProgressFn = silent,
) -> Int[np.ndarray, "windows sequence"]:
    """Return windows of training documents, as many from each domain, or of the model's own text.

    They come from as many documents as possible: the fit learns what documents have in common only
    where there are many of them.

    Args:
        data: see `open_domains`; or `self`: the dense model samples the text, none is needed.
        folder: folder of the dense model.
        tokens: number of tokens, rounded up to whole windows per domain.
        sequence_length: tokens per window.
        needed_tokens: fewer are refused: a least-squares fit of d_ff weights per output needs at
            least d_ff tokens to be determined.
        seed: of the places in the documents, and of the text that the model samples.
        report: told about progress.

    Raises:
        CorpusError: the text is not readable or too little.
    """
    length: dict[str, Any] = {"sequence_length": sequence_length}
    found = []
    if str(data) != SELF:
        tokenizer = load_tokenizer(folder)
        domains = open_domains(data, report=report)
        length["max_windows"] = -(-tokens // (sequence_length * len(domains)))
        generator = np.random.default_rng(seed)
        for done, domain in enumerate(domains):
            report(Progress("calibration text", done, len(domains), domain.name))
            found.append(scattered(domain.documents("train"), tokenizer, generator, **length))
        report(Progress("calibration text", len(domains), len(domains)))
    num_tokens = sum(windows.size for windows in found) if found else tokens
    if num_tokens < needed_tokens:
        raise CorpusError(
            f"{num_tokens:,} calibration tokens are too few: a stable fit of this model needs at "
            f"least {needed_tokens:,} (its intermediate_size); add text to {data} or raise "
            "calibration_tokens"
        )
    if found:
        # one window of each domain in turn: any first part of them has as many of each
        turns = [np.arange(len(windows)) for windows in found]
        order = np.argsort(np.concatenate(turns), kind="stable")
        return np.concatenate(found)[order]
    return self_windows(folder, tokens=tokens, **length, seed=seed, report=report)


@torch.inference_mode()
def self_windows(
    folder: Path, *, tokens: int, sequence_length: int, seed: int = 0, report: ProgressFn = silent
) -> Int[np.ndarray, "windows sequence"]:
    """Let the dense model write its own calibration text: plain sampling at temperature 1.

    Every window starts with the token that begins a text (or ends one, where the model has no
    other) and is sampled without top-k or top-p, so that the tokens follow the distribution that
    the model was trained to have. The whole model is in memory meanwhile. A window in which the
    model ends its text goes on with the next text.

    Raises:
        CheckpointError: the model or its tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(folder)
    model = load_model(folder, dtype=torch.float32).to(device())
    # some tokenizers have no token that begins a text, but one that ends it
    start = tokenizer.bos_token_id
    if start is None:
        start = tokenizer.eos_token_id
    generator = torch.Generator().manual_seed(seed)
    num_windows = -(-tokens // sequence_length)
    batches = []
    for first in range(0, num_windows, _SAMPLES_AT_ONCE):
        count = min(_SAMPLES_AT_ONCE, num_windows - first)
        written = [torch.full((count, 1), 0 if start is None else start)]
        cache = None
        for position in range(1, sequence_length):
            out = model(written[-1].to(device()), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            # sampled on the CPU, so that a seed gives the same text on every device
            probs = out.logits[:, -1].softmax(-1).cpu()
            written.append(torch.multinomial(probs, 1, generator=generator))
            report(Progress("sample text", position, sequence_length - 1, f"from {first + 1}"))
        batches.append(torch.cat(written, dim=1))
    return torch.cat(batches).numpy()
