"""Independent-Clustering: neurons with similar weights share an expert."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor

from moefy.construct.ffn import Partition
from moefy.construct.partition.kmeans import balanced_kernel_kmeans
from moefy.split import Split


def independent_clustering(
    rows: Float[Tensor, "neurons hidden"], split: Split, generator: np.random.Generator
) -> Partition:
    """Cluster the L2-normalised rows of `up_proj` (or `gate_proj`) by balanced k-means.

    Source: LLaMA-MoE (arXiv 2406.16554), section 3.1, "Independent(Clustering)": balanced k-means
    on the rows of W_up; the same assignment serves gate, up and down. Deviations: the assignment
    step is an auction within 1e-4 of the optimum; shared slices, which the paper has not, are the
    first clusters.
    """
    unit = rows.double() / rows.double().norm(dim=1, keepdim=True).clamp_min(1e-12)
    label = balanced_kernel_kmeans((unit @ unit.T).cpu().numpy(), split.experts, generator)
    # clusters 0 … shared - 1 become the shared expert, 0; the others count on from 1
    return Partition.of_clusters(np.maximum(label - split.shared + 1, 0), split)
