"""Balanced k-means on a Gram matrix: all clusters have the same size."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int

from moefy.construct.partition.balanced import balanced_assignment

_ROUNDS = 25


def balanced_kernel_kmeans(
    gram: Float[np.ndarray, "items items"], num_clusters: int, generator: np.random.Generator
) -> Int[np.ndarray, " items"]:
    """Cluster items by their inner products.

    Lloyd's iteration in the space that the Gram matrix K spans: the squared distance of item i to
    the mean of cluster C is K_ii − 2·mean_{j∈C} K_ij + mean_{j,l∈C} K_jl, so points need no
    coordinates. It stops when nothing moves, or after 25 rounds.

    Args:
        gram: K, symmetric.
        num_clusters: sizes differ by at most one where it does not divide the number of items.
        generator: draws the start, a random balanced assignment.
    """
    num_items = len(gram)
    label = generator.permutation(num_items) % num_clusters
    capacity = np.bincount(label, minlength=num_clusters)
    size = torch.from_numpy(capacity).double()
    kernel = torch.from_numpy(gram)
    for _ in range(_ROUNDS):
        member = torch.zeros(num_items, num_clusters, dtype=kernel.dtype)
        member[torch.arange(num_items), torch.from_numpy(label)] = 1.0
        member /= size
        nearness = kernel @ member  # [items, clusters], mean_{j∈C} K_ij
        # K_ii is the same for all clusters of an item, so it does not matter here
        nearness = 2 * nearness - (member * nearness).sum(0)
        new = balanced_assignment(nearness.numpy(), capacity)
        if (new == label).all():
            break
        label = new
    return label
