"""Losses on text that is not trained on, by domain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from moefy.evaluation.output_loss import LogitsInput, next_labels, output_loss
from moefy.hardware import device, products_in


@torch.no_grad()
def heldout_losses(
    network: Any,
    windows: Mapping[str, Int[np.ndarray, "_windows sequence"]],
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
        precision: dtype of matrix products, float32 or bfloat16.
        micro_batch_size: sequences that one process computes at once.
        data_idx: which share of the sequences this process computes.
        num_data: number of such shares.
        total: sums a tensor over the processes.
    """
    names = list(windows)
    tokens = np.concatenate([windows[name] for name in names])
    domain_idxs = np.repeat(np.arange(len(names)), [len(windows[name]) for name in names])
    at_once = micro_batch_size
    width = num_data * at_once
    sums = torch.zeros(len(names), dtype=torch.float64)
    was_training = network.training
    network.eval()
    for first in range(data_idx * at_once, _up(len(tokens), width), width):
        idxs = np.arange(first, first + at_once)
        ids = torch.from_numpy(tokens[idxs % len(tokens)]).to(device())
        with products_in(precision, ids.device):
            out = output_loss(LogitsInput.of(network, ids).predicting(), next_labels(ids))
        for idx, loss in zip(idxs.tolist(), out.cross_entropy.double().mean(1).cpu(), strict=True):
            if idx < len(tokens):
                sums[domain_idxs[idx]] += loss
    network.train(was_training)
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # without a backward pass the last weights would stay gathered
    sums = total(sums.to(device())).cpu()
    counts = [len(windows[name]) for name in names]
    return {name: float(sums[i]) / counts[i] for i, name in enumerate(names)}


def _up(count: int, width: int) -> int:
    return -(-count // width) * width
