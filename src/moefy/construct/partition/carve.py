"""CMoE's carving: shared by activation rate, the rest by who is active together."""

from __future__ import annotations

import torch

from moefy.calibrate.sample import FfnSample
from moefy.construct.ffn import Partition
from moefy.construct.partition.coactivation import cluster_rest, highest
from moefy.split import Split

ACTIVE_PER_TOKEN = 10
"""K_a: a neuron is active on a token if its |h| is among that token's ten largest."""


def carve(sample: FfnSample, split: Split, *, seed: int, layer_idx: int) -> Partition:
    """Carve experts out of a dense FFN by binary activation columns.

    a_tj = 1 if |h_tj| is among the ten largest of token t, else 0. The neurons with the highest
    rate Σ_t a_tj are shared; the others go through balanced k-means on their columns a_·j.

    Source: CMoE (arXiv 2502.04416), section 4.1. Deviations: columns are L2-normalised before the
    clustering, because most are almost empty; the k-means starts at random instead of at the
    columns with the highest rate.

    Args:
        sample: of the layer.
        split: counts of experts.
        seed: of the clustering's start.
        layer_idx: each layer has a stream of its own.
    """
    gram = sample.down.new_zeros(sample.num_neurons, sample.num_neurons)
    for _, activations in sample.chunks():
        largest = activations.abs().topk(min(ACTIVE_PER_TOKEN, sample.num_neurons), dim=1).indices
        active = torch.zeros_like(activations).scatter_(1, largest, 1.0)
        gram += active.T @ active
    shared = highest(gram.diagonal(), split.shared * (sample.num_neurons // split.experts))
    return cluster_rest(gram, shared, split, seed=seed, layer_idx=layer_idx)
