"""Losses on text that is not trained on, by domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch.distributed.fsdp import FSDPModule

from moefy.checkpoint.load import device
from moefy.training.output_loss import LogitsInput, next_labels, output_loss
from moefy.training.workers import Workers


@torch.no_grad()
def heldout_losses(
    network: Any,
    windows: Mapping[str, Int[np.ndarray, "_windows sequence"]],
    workers: Workers,
    *,
    sequences_per_pass: int,
    precision: str,
) -> dict[str, float]:
    """Return the mean next-token loss of each domain, nats per token.

    Every process computes as many passes, the last ones possibly again on sequences that then do
    not count.

    Args:
        network: any model of `checkpoint.load`.
        windows: token ids by domain.
        workers: of the run.
        sequences_per_pass: of one process.
        precision: of the products, float32 or bfloat16.
    """
    names = list(windows)
    tokens = np.concatenate([windows[name] for name in names])
    domain_idxs = np.repeat(np.arange(len(names)), [len(windows[name]) for name in names])
    width = workers.num_data * sequences_per_pass
    sums = torch.zeros(len(names), dtype=torch.float64)
    was_training = network.training
    network.eval()
    for first in range(workers.data_idx * sequences_per_pass, _up(len(tokens), width), width):
        idxs = np.arange(first, first + sequences_per_pass)
        ids = torch.from_numpy(tokens[idxs % len(tokens)]).to(device())
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            out = output_loss(LogitsInput.of(network, ids).predicting(), next_labels(ids))
        for idx, loss in zip(idxs.tolist(), out.cross_entropy.double().mean(1).cpu(), strict=True):
            if idx < len(tokens):
                sums[domain_idxs[idx]] += loss
    network.train(was_training)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # without a backward pass the last weights would stay gathered
    total = workers.total(sums.to(device())).cpu()
    counts = [len(windows[name]) for name in names]
    return {name: float(total[i]) / counts[i] for i, name in enumerate(names)}


def _up(count: int, width: int) -> int:
    return -(-count // width) * width
