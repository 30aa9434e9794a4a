"""Loss on held-out windows of text by domain, and the distance from a dense model's predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

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


class Heldout(NamedTuple):
    """Means over the tokens of each domain, nats."""

    loss: dict[str, float]
    kl: dict[str, float] | None  # KL(teacher ‖ network); None without a teacher


@torch.no_grad()
def heldout_losses(
    network: Any,
    windows: Windows,
    labels: Windows | None = None,
    *,
    teacher: Any | None = None,
    precision: str,
    micro_batch_size: int = 1,
    data_idx: int = 0,
    num_data: int = 1,
    total: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Heldout:
    """Return the mean next-token loss of each domain, and the distance from a dense model.

    The last pass is padded; padding is excluded from the mean, so that all processes of a run
    compute as many passes.

    Args:
        network: any model of `checkpoint.load`.
        windows: token ids by domain.
        labels: the token itself where it counts, else IGNORED; None if all but a window's first do.
            Every label counts the same, and what follows a window's last one is not computed.
        teacher: the dense model that the network is compared with.
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
    # of losses, of divergences, of their weights
    sums = torch.zeros(3, len(names), dtype=torch.float64)
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
            parent = LogitsInput.of(teacher, ids).predicting() if teacher is not None else None
            out = output_loss(LogitsInput.of(network, ids).predicting(), wanted, teacher=parent)
        losses = out.cross_entropy.double()
        distances = torch.zeros_like(losses) if out.divergence is None else out.divergence.double()
        by_row = torch.stack([losses, distances, torch.ones_like(losses)])  # [3, rows, length]
        # windows without labels have one length: their means count the same
        by_row = by_row.mean(-1) if labels is None else (by_row * (wanted != IGNORED)).sum(-1)
        for idx, row in zip(idxs.tolist(), by_row.cpu().unbind(1), strict=True):
            if idx < len(tokens):
                sums[:, domain_idxs[idx]] += row
    network.train(was_training)
    for module in (*network.modules(), *(teacher.modules() if teacher is not None else ())):
        if isinstance(module, FSDPModule):
            module.reshard()  # without a backward pass the last weights would stay gathered
    totals = total(sums.to(device())).cpu()
    loss, kl, _ = (dict(zip(names, row, strict=True)) for row in (totals / totals[2]).tolist())
    return Heldout(loss, kl if teacher is not None else None)


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
