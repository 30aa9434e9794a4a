"""Independent-Random: the paper's own choice of experts."""

from __future__ import annotations

import numpy as np

from moefy.construct.ffn import Partition
from moefy.split import Split


def independent_random(num_neurons: int, split: Split, generator: np.random.Generator) -> Partition:
    """Shuffle a layer's neurons and cut them into equal experts.

    Source: LLaMA-MoE (arXiv 2406.16554), section 3.1, "Independent(Random)": the neurons' index set
    is partitioned uniformly into E sets of d_ff/E. Deviation: the neurons of a shared expert, which
    the paper has not, are drawn like the others.

    Raises:
        ValueError: the slices do not divide `num_neurons`.
    """
    if num_neurons % split.experts:
        raise ValueError(f"{num_neurons} neurons do not divide into {split.experts} experts")
    # the first slices are shared; which they are is random, like the rest
    slices = generator.permutation(num_neurons).reshape(split.experts, -1)
    shared, routed = slices[: split.shared].ravel(), slices[split.shared :]
    return Partition(np.sort(shared), np.sort(routed, axis=1))
