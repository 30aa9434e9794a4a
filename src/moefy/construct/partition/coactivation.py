"""Co-activation: neurons that are active on the same tokens share an expert."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from moefy.calibrate.sample import FfnSample
from moefy.construct.ffn import Partition
from moefy.construct.partition.kmeans import balanced_kernel_kmeans
from moefy.construct.seeds import stream
from moefy.split import Split


def coactivation(sample: FfnSample, split: Split, *, seed: int, layer_idx: int) -> Partition:
    """Shared = highest energy; the rest clustered by co-activation of their contributions.

    A neuron contributes c_tj = |h_tj|·‖w_j‖ to the output at token t, w_j its column of
    `down_proj`. Shared neurons are those with the largest Σ_t c². The others are clustered by
    balanced kernel k-means on the cosine of their contributions over the tokens.

    Source: the co-activation graph of LLaMA-MoE (arXiv 2406.16554, appendix) whose adjacency is the
    summed product of activations. Deviations: contributions instead of activations, so that a
    large activation into a small column counts little; k-means instead of a METIS cut; a shared
    expert, which the paper has not (0 slices give none).

    Args:
        sample: of the layer.
        split: counts of experts.
        seed: of the clustering's start.
        layer_idx: each layer has a stream of its own.
    """
    column_norms = sample.down.norm(dim=0)
    gram = sample.down.new_zeros(sample.num_neurons, sample.num_neurons)
    for tokens, activations in sample.chunks():
        contribution = activations.abs() * column_norms
        gram += (contribution * sample.token_weights[tokens, None]).T @ contribution
    size = sample.num_neurons // split.experts
    shared = highest(gram.diagonal(), split.shared * size)
    return cluster_rest(gram, shared, split, seed=seed, layer_idx=layer_idx)


def highest(score: Float[Tensor, " neurons"], count: int) -> Int[np.ndarray, " count"]:
    """Return the neurons with the largest scores, ascending; ties go to the lower index."""
    return np.sort(np.argsort(-score.cpu().numpy(), kind="stable")[:count])


def cluster_rest(
    gram: Float[Tensor, "neurons neurons"],
    shared: Int[np.ndarray, " shared"],
    split: Split,
    *,
    seed: int,
    layer_idx: int,
) -> Partition:
    """Cluster all but the shared neurons by the cosines of a Gram matrix."""
    rest = np.setdiff1d(np.arange(len(gram)), shared)
    kernel = gram[rest][:, rest]
    scale = kernel.diagonal().clamp_min(1e-30).rsqrt()
    label = balanced_kernel_kmeans(
        (kernel * scale[:, None] * scale).cpu().numpy(),
        split.routed,
        stream(seed, "partition", layer_idx),
    )
    cluster = np.zeros(len(gram), dtype=np.int64)
    cluster[rest] = label + 1
    return Partition.of_clusters(cluster, split)
