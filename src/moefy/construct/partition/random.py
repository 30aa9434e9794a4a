"""Independent-Random: the paper's own choice of experts."""

from __future__ import annotations

import numpy as np

from moefy.construct.ffn import Partition
from moefy.construct.seeds import stream
from moefy.split import Split


def independent_random(num_neurons: int, split: Split, *, seed: int, layer_idx: int) -> Partition:
    """Shuffle a layer's neurons and cut them into equal experts.

    Source: LLaMA-MoE (arXiv 2406.16554), section 3.1, "Independent(Random)": the intermediate
    neurons' index set is partitioned uniformly into E sets of d_ff/E. Deviation: the paper has no
    shared expert here; with one, its neurons are drawn like the others.

    Args:
        num_neurons: d_ff, the dense layer's intermediate_size.
        split: counts of experts; its slices must divide `num_neurons`.
        seed: of the run.
        layer_idx: each layer has a stream of its own.

    Raises:
        ValueError: the slices do not divide `num_neurons`.
    """
    if num_neurons % split.experts:
        raise ValueError(f"{num_neurons} neurons do not divide into {split.experts} experts")
    order = stream(seed, "partition", layer_idx).permutation(num_neurons)
    slices = order.reshape(split.experts, -1)
    shared, routed = slices[: split.shared].ravel(), slices[split.shared :]
    return Partition(np.sort(shared), np.sort(routed, axis=1))
