"""Co-activation: neurons that are active on the same tokens share an expert."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from torch import Tensor

from moefy.calibrate.sample import FfnSample
from moefy.construct.ffn import Partition
from moefy.construct.partition.kmeans import balanced_kernel_kmeans
from moefy.split import Split


def coactivation(sample: FfnSample, split: Split, generator: np.random.Generator) -> Partition:
    """Share the neurons of highest energy; cluster the rest by co-activation.

    A neuron contributes c_tj = |h_tj|·‖w_j‖ to the output at token t, w_j its column of
    `down_proj`. Shared neurons are those with the largest Σ_t c². The others are clustered by
    balanced kernel k-means on the cosine of their contributions over the tokens.

    Source: the co-activation graph of LLaMA-MoE (arXiv 2406.16554, appendix) whose adjacency is the
    summed product of activations. Deviations: contributions instead of activations, so that a
    large activation into a small column counts little; k-means instead of a METIS cut; a shared
    expert, which the paper has not (0 slices give none).
    """
    return cluster_by_gram(contribution_gram(sample, sample.token_weights), split, generator)


def contribution_gram(
    sample: FfnSample, token_weights: Float[Tensor, " tokens"] | None = None
) -> Float[Tensor, "neurons neurons"]:
    """Return Σ_t ω_t·c_ti·c_tj; ω = 1 without weights."""
    column_norms = sample.down.norm(dim=0)
    gram = sample.down.new_zeros(sample.num_neurons, sample.num_neurons)
    for tokens, activations in sample.chunks():
        contribution = activations.abs() * column_norms
        weighted = contribution
        if token_weights is not None:
            weighted = contribution * token_weights[tokens, None]
        gram += weighted.T @ contribution
    return gram


def cluster_by_gram(
    gram: Float[Tensor, "neurons neurons"], split: Split, generator: np.random.Generator
) -> Partition:
    """Share the neurons with the largest diagonal; cluster the rest by cosine."""
    num_shared = split.shared * split.size(len(gram))
    # stable: ties go to the lower index
    shared = np.argsort(-gram.diagonal().cpu().numpy(), kind="stable")[:num_shared]
    rest = np.setdiff1d(np.arange(len(gram)), shared)
    kernel = gram[rest][:, rest]
    scale = kernel.diagonal().clamp_min(1e-30).rsqrt()  # a neuron that is never active has 0
    cosines = (kernel * scale[:, None] * scale).cpu().numpy()
    cluster = np.zeros(len(gram), dtype=np.int64)
    cluster[rest] = balanced_kernel_kmeans(cosines, split.routed, generator) + 1
    return Partition.of_clusters(cluster, split)
