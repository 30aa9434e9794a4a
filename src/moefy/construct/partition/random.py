"""Independent-Random: the paper's own choice of experts."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int

from moefy.construct.seeds import stream


def independent_random(
    num_neurons: int, num_experts: int, *, seed: int, layer_idx: int
) -> Int[np.ndarray, "experts size"]:
    """Shuffle a layer's neurons and cut them into equal experts.

    Source: LLaMA-MoE (arXiv 2406.16554), section 3.1, "Independent(Random)": the intermediate
    neurons' index set is partitioned uniformly into E sets of d_ff/E. No deviation.

    Args:
        num_neurons: d_ff, the dense layer's intermediate_size.
        num_experts: E.
        seed: of the run.
        layer_idx: each layer has a stream of its own.

    Returns:
        Row e holds the neurons of expert e, ascending (their order inside an expert changes
        nothing; ascending rows make reading and undoing the split cheap).

    Raises:
        ValueError: `num_experts` does not divide `num_neurons`.
    """
    if num_neurons % num_experts:
        raise ValueError(f"{num_neurons} neurons do not divide into {num_experts} experts")
    order = stream(seed, "partition", layer_idx).permutation(num_neurons)
    return np.sort(order.reshape(num_experts, -1), axis=1)
