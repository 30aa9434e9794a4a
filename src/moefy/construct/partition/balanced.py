"""Balanced assignment: every cluster gets exactly its capacity."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


def balanced_assignment(
    value: Float[np.ndarray, "items clusters"], capacity: Int[np.ndarray, " clusters"]
) -> Int[np.ndarray, " items"]:
    """Give every item to one cluster, so that the sum of value[i, cluster(i)] is large.

    At the best prices, one per cluster, every item takes the cluster with the largest
    value − price, and all capacities are met. Bertsekas' auction finds them: unassigned items bid
    for their best cluster by their margin over the second best plus ε, a full cluster keeps its
    highest bids and its price rises to the lowest of them. ε falls in steps to 1e-4 times the
    spread of all values. The result is within items·ε of the optimum, so one huge value costs the
    others their accuracy. Ties go to the lower index.

    Source: D. Bertsekas, D. Castañon, "The auction algorithm for the transportation problem",
    Annals of Operations Research 20 (1989).

    Raises:
        ValueError: the capacities do not sum to the number of items, or a value is not finite.
    """
    num_items, num_clusters = value.shape
    if capacity.sum() != num_items:
        raise ValueError(f"capacities sum to {capacity.sum()}, there are {num_items} items")
    if not np.isfinite(value).all():
        raise ValueError("a value is not finite")
    # exact assignment costs O(n³), which at 14,336 neurons and 128 experts is hours
    if num_clusters == 1:
        return np.zeros(num_items, dtype=np.int64)
    value = value.astype(np.float64)
    open_clusters = np.flatnonzero(capacity)  # e.g. without shared slices, the first is closed
    value = value[:, open_clusters]
    prices = np.zeros(len(open_clusters))
    spread = float(np.ptp(value)) or 1.0
    cluster = np.zeros(num_items, dtype=np.int64)
    # prices of a coarse auction let the next, finer one begin near its end
    for step in (1e-1, 1e-2, 1e-3, 1e-4):
        cluster, prices = _auction(value, capacity[open_clusters], prices, step * spread)
        prices -= prices.min()
    return open_clusters[cluster]


def _auction(
    value: Float[np.ndarray, "items clusters"],
    capacity: Int[np.ndarray, " clusters"],
    prices: Float[np.ndarray, " clusters"],
    epsilon: float,
) -> tuple[Int[np.ndarray, " items"], Float[np.ndarray, " clusters"]]:
    prices = prices.copy()
    if value.shape[1] == 1:
        return np.zeros(len(value), dtype=np.int64), prices
    cluster = np.full(len(value), -1)
    bids = np.zeros(len(value))
    waiting = np.arange(len(value))
    while len(waiting):
        # all unassigned items bid at once, so that a round is a few array operations
        net = value[waiting] - prices  # [waiting, clusters]
        best = net.argmax(axis=1)
        rows = np.arange(len(waiting))
        top = net[rows, best]
        net[rows, best] = -np.inf
        bids[waiting] = prices[best] + top - net.max(axis=1) + epsilon
        cluster[waiting] = best
        for target in np.unique(best):
            members = np.flatnonzero(cluster == target)
            if len(members) < capacity[target]:
                continue
            # full: the lowest bids lose their place and wait again
            order = members[np.argsort(-bids[members], kind="stable")]
            cluster[order[capacity[target] :]] = -1
            prices[target] = bids[order[capacity[target] - 1]]
        waiting = np.flatnonzero(cluster < 0)
    return cluster, prices
