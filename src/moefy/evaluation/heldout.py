"""Loss on held-out windows of text by domain, and the distance from a dense model's predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moefy.checkpoint.load import load_tokenizer
from moefy.data.records import Side, open_domains
from moefy.data.tokenise import pack
from moefy.errors import CorpusError
from moefy.evaluation.llama_cpp import GgufTokenizer
from moefy.evaluation.output_loss import IGNORED, LogitsInput, output_loss
from moefy.hardware import device, products_in
from moefy.progress import Progress, ProgressFn, silent

Windows = Mapping[str, Int[np.ndarray, "_windows sequence"]]  # token ids by domain


@torch.no_grad()
def heldout_losses(
    network: Any,
    windows: Windows,
    labels: Windows | None = None,
    *,
    precision: str,
    micro_batch_size: int = 1,
    data_idx: int = 0,
    num_data: int = 1,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> dict[str, float]:
    """Return the mean next-token loss of each domain, nats per token.

    The last pass is padded; padding is excluded from the mean, so that all processes of a run
    compute as many passes.

    Args:
        network: any model of `checkpoint.load`.
        windows: token ids by domain.
        labels: the token itself where it counts, else IGNORED; None if all but a window's first do.
            Every label counts the same, and what follows a window's last one is not computed.
        precision: dtype of matrix products, float32 or bfloat16.
        micro_batch_size: sequences that one process computes at once.
        data_idx: which share of the sequences this process computes.
        num_data: number of such shares.
        total: sums a tensor over the processes.
    """
    names = list(windows)
    tokens = np.concatenate([windows[name] for name in names])
    targets = tokens if labels is None else np.concatenate([labels[name] for name in names])
    domain_idxs = np.repeat(np.arange(len(names)), [len(windows[name]) for name in names])
    # float64: the sum must not depend on how many windows a process has
    sums = torch.zeros(2, len(names), dtype=torch.float64)  # of losses, of their weights
    was_training = network.training
    network.eval()
    for first in range(0, len(tokens), num_data * micro_batch_size):
        # rows of all processes; beyond the last the first ones come again, and are not counted
        rows = first + np.arange(num_data * micro_batch_size)
        used = np.flatnonzero((targets[rows % len(tokens)] != IGNORED).any(0))[-1] + 1
        idxs = rows[data_idx * micro_batch_size :][:micro_batch_size]
        ids = torch.from_numpy(tokens[idxs % len(tokens), :used]).to(device())
        wanted = torch.from_numpy(targets[idxs % len(tokens), 1:used]).to(ids.device)
        with products_in(precision, ids.device):
            logits = LogitsInput.of(network, ids).predicting()
            losses = output_loss(logits, wanted).cross_entropy.double()
        # windows without labels have one length: their means count the same
        counts = torch.ones(len(ids)) if labels is None else (wanted != IGNORED).sum(1)
        losses = losses.mean(1) if labels is None else losses.sum(1)
        for idx, loss, count in zip(idxs.tolist(), losses.cpu(), counts.cpu(), strict=True):
            if idx < len(tokens):
                sums[:, domain_idxs[idx]] += torch.stack([loss, count.double()])
    network.train(was_training)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # without a backward pass the last weights would stay gathered
    totals, weights = total(sums.to(device())).cpu()
    return {name: float(totals[i]) / float(weights[i]) for i, name in enumerate(names)}


def perplexity(loss: float) -> float:
    """Return exp of a mean loss in nats, infinite where that is too large for a float."""
    return math.exp(loss) if loss < 700 else math.inf


def evaluation_windows(
    data: str | Path,
    folder: Path,
    windows: int,
    sequence_length: int,
    split: Side = "heldout",
    *,
    remedy: str = "add text, lower --sequence-length, or pass --split all",
    report: ProgressFn = silent,
) -> dict[str, Int[np.ndarray, "windows sequence"]]:
    """Return token ids by domain.

    Args:
        data: a corpus; see `open_domains`.
        folder: of a model, for its tokenizer; or a GGUF file.
        windows: per domain; fewer where a domain has less text.
        sequence_length: tokens per window.
        split: whose documents to read.
        remedy: what the error about too little text advises.
        report: told about progress.

    Raises:
        UsageError: the tokenizer cannot be read.
        CorpusError: there is no such corpus, or a domain is shorter than one window.
    """
    domains = open_domains(data, report=report)
    tokenizer = GgufTokenizer(folder) if folder.is_file() else load_tokenizer(folder)
    text = {}
    for done, domain in enumerate(domains):
        report(Progress("tokenise", done, len(domains), domain.name))
        packed = pack(
            domain.documents(split),
            tokenizer,
            sequence_length=sequence_length,
            max_windows=windows,
        )
        if not len(packed):
            raise CorpusError(
                f"the {split} documents of the domain {domain.name!r} are shorter than one window "
                f"of {sequence_length} tokens: {remedy}"
            )
        text[domain.name] = packed
    report(Progress("tokenise", len(domains), len(domains)))
    return text
