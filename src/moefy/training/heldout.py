"""Losses on text that is not trained on, by domain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch.distributed.fsdp import FSDPModule

from moefy.checkpoint.load import device, products_in
from moefy.training.output_loss import LogitsInput, next_labels, output_loss
from moefy.training.recipe import TrainRecipe
from moefy.training.workers import Workers


@torch.no_grad()
def heldout_losses(
    network: Any,
    windows: Mapping[str, Int[np.ndarray, "_windows sequence"]],
    recipe: TrainRecipe,
    workers: Workers,
) -> dict[str, float]:
    """Return the mean next-token loss of each domain, nats per token.

    Every process computes as many passes, the last ones possibly again on sequences that then do
    not count.

    Args:
        network: any model of `checkpoint.load`.
        windows: token ids by domain.
        recipe: of the run, its precision decided.
        workers: of the run.
    """
    names = list(windows)
    tokens = np.concatenate([windows[name] for name in names])
    domain_idxs = np.repeat(np.arange(len(names)), [len(windows[name]) for name in names])
    at_once = recipe.sequences_per_pass
    width = workers.num_data * at_once
    sums = torch.zeros(len(names), dtype=torch.float64)
    was_training = network.training
    network.eval()
    for first in range(workers.data_idx * at_once, _up(len(tokens), width), width):
        idxs = np.arange(first, first + at_once)
        ids = torch.from_numpy(tokens[idxs % len(tokens)]).to(device())
        with products_in(recipe.precision, ids.device):
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
