"""Importance-based partitions: Sharing-Inner, Sharing-Inter, and the gradient split.

Their input is the importance v of every neuron for every cluster of text, one row per routed
expert (see `calibrate.importance`).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moefy.calibrate.importance import SegmentImportance, check_segments
from moefy.construct.ffn import Partition, stream
from moefy.construct.partition.kmeans import balanced_kernel_kmeans
from moefy.split import Split


def importance_by_cluster(
    segments: SegmentImportance, num_clusters: int, *, seed: int
) -> Float[Tensor, "layers clusters neurons"]:
    """Return the mean importance by cluster of text, clustered by balanced k-means on features.

    Raises:
        CorpusError: fewer segments than clusters.
    """
    check_segments(len(segments.scores), num_clusters)
    features = F.normalize(segments.features.double(), dim=1)
    gram = (features @ features.T).cpu().numpy()
    # layer 0, because all layers share the clusters
    labels = balanced_kernel_kmeans(gram, num_clusters, stream(seed, "text clusters", 0))
    label = torch.from_numpy(labels)
    means = [segments.scores[label == cluster].mean(dim=0) for cluster in range(num_clusters)]
    return torch.stack(means, dim=1)


def sharing_inner(importance: Float[np.ndarray, "experts neurons"], split: Split) -> Partition:
    """Give each expert the d_ff/E neurons that matter most to its cluster of text.

    Experts may overlap, and neurons that no expert lists are lost: all experts active is not the
    dense model.

    Source: LLaMA-MoE (arXiv 2406.16554), section 3.1, "Sharing(Inner)". No deviation.
    """
    return Partition(np.zeros(0, dtype=np.int64), _top(importance, split.size(importance.shape[1])))


def sharing_inter(importance: Float[np.ndarray, "experts neurons"], split: Split) -> Partition:
    """Put the neurons that most experts list into the shared block, and let experts take the rest.

    The lists are those of Sharing-Inner. The shared block holds the neurons on most lists (ties:
    larger summed importance) until it is full; each expert then takes its most important ones of
    the others. Experts may overlap.

    Source: LLaMA-MoE (arXiv 2406.16554), section 3.1, "Sharing(Inter)". No deviation.
    """
    num_neurons = importance.shape[1]
    size = split.size(num_neurons)
    listed = np.bincount(_top(importance, size).ravel(), minlength=num_neurons)
    order = np.lexsort((-importance.sum(axis=0), -listed))  # by the last key first
    shared = np.sort(order[: split.shared * size])
    rest = importance.copy()
    rest[:, shared] = -np.inf
    return Partition(shared, _top(rest, size))


def gradient_split(importance: Float[np.ndarray, "experts neurons"], split: Split) -> Partition:
    """Deal the neurons out greedily by importance, without overlap.

    Shared neurons are those with the largest summed importance. The others go, in the order of
    their largest scores, to the expert that scores them highest and still has room.

    Source: LLaMA-MoE v2 (its repository's gradient split): greedy on the same scores as Sharing,
    beside one residual expert. Deviation: the size of the shared block is free.
    """
    experts, num_neurons = importance.shape
    size = split.size(num_neurons)
    cluster = np.full(num_neurons, -1)
    cluster[np.argsort(-importance.sum(axis=0), kind="stable")[: split.shared * size]] = 0
    room = np.full(experts, size)
    # all pairs of an expert and a neuron, the largest score first
    for flat in np.argsort(-importance, axis=None, kind="stable"):
        expert, neuron = divmod(int(flat), num_neurons)
        if cluster[neuron] < 0 and room[expert]:
            cluster[neuron] = expert + 1
            room[expert] -= 1
    return Partition.of_clusters(cluster, split)


def _top(
    importance: Float[np.ndarray, "experts neurons"], size: int
) -> Int[np.ndarray, "experts size"]:
    return np.sort(np.argsort(-importance, axis=1, kind="stable")[:, :size], axis=1)
