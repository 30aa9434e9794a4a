"""Numbers about choices against numbers by hand and SciPy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from moefy.evaluation.routing import (
    divergence,
    load_shares,
    relative_entropy,
)

CHOICES = np.array([[4.0, 2.0, 2.0, 0.0], [2.0, 2.0, 2.0, 2.0], [8.0, 0.0, 0.0, 0.0]])


def test_load_and_entropy() -> None:
    load = load_shares(CHOICES)
    assert load.tolist() == [[0.5, 0.25, 0.25, 0], [0.25] * 4, [1, 0, 0, 0]]
    assert relative_entropy(load).tolist() == [1.5 / 2, 1, 0]


def test_a_single_expert_is_used_evenly() -> None:
    assert relative_entropy(np.ones((2, 1))).tolist() == [1, 1]


def test_divergence_by_hand() -> None:
    apart = [[[1.0, 0.0]], [[0.0, 1.0]]]
    assert divergence(np.array(apart)).tolist() == [1]
    assert divergence(np.array([*apart, *apart])).tolist() == [1]
    assert divergence(np.full((4, 1, 8), 1 / 8)).tolist() == [0]
    four_apart = np.eye(4)[:, None]
    assert divergence(four_apart).tolist() == [2]


def test_divergence_of_two_is_scipys() -> None:
    p, q = np.random.default_rng(0).dirichlet(np.ones(6), size=(2, 3))
    expected = [jensenshannon(*pair, base=2) ** 2 for pair in zip(p, q, strict=True)]
    assert divergence(np.stack([p, q])) == pytest.approx(np.array(expected))
