"""Independent-Clustering: neurons with similar weights share an expert."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor

from moefy.construct.ffn import Partition
from moefy.construct.partition.kmeans import balanced_kernel_kmeans
from moefy.construct.seeds import stream
from moefy.split import Split


def independent_clustering(
    rows: Float[Tensor, "neurons hidden"], split: Split, *, seed: int, layer_idx: int
) -> Partition:
    """Cluster the L2-normalised rows of `up_proj` (or `gate_proj`) by balanced k-means.

    Source: LLaMA-MoE (arXiv 2406.16554), section 3.1, "Independent(Clustering)": balanced k-means
    on the rows of W_up; the same assignment serves gate, up and down. Deviations: the assignment
    step is an auction within 1e-4 of the optimum; shared slices, which the paper has not, are the
    first clusters.

    Args:
        rows: of the weight matrix, one per neuron.
        split: counts of experts.
        seed: of the start.
        layer_idx: each layer has a stream of its own.
    """
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    label = balanced_kernel_kmeans(
        (unit @ unit.T).cpu().numpy(), split.experts, stream(seed, "partition", layer_idx)
    )
    return Partition.of_clusters(np.maximum(label - split.shared + 1, 0), split)
