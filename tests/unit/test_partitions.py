"""Every partition reproduces its own definition, worked out independently."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from moefy.calibrate.sample import FfnSample
from moefy.construct.partition.alternating import alternating
from moefy.construct.partition.carve import carve
from moefy.construct.partition.clustering import independent_clustering
from moefy.construct.partition.coactivation import coactivation
from moefy.construct.partition.sharing import gradient_split, sharing_inner, sharing_inter
from moefy.construct.repair.refit import least_squares_scale, refit_down_proj
from moefy.construct.router.energy import expert_energies
from moefy.construct.router.oracle import OracleRouting
from moefy.construct.router.prototype import mean_gate_router, representative_router
from moefy.construct.router.ridge import RidgeRouter
from moefy.construct.split import Partition, Routing, Shape, slot_weights

SHAPE = Shape(shared=1, routed=3, active=1)
SIZE = 5


@pytest.fixture
def sample() -> FfnSample:
    """Inputs in three groups, each of which moves five neurons; five more always move."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    group = torch.arange(600) % 3
    inputs = 3 * directions[group] + 4 * directions[3]
    inputs = inputs + 0.1 * torch.randn(600, 16, generator=generator)
    owner = torch.arange(20) % 4  # 3: always on
    gate = directions[owner] + 0.02 * torch.randn(20, 16, generator=generator)
    up = gate + 0.02 * torch.randn(20, 16, generator=generator)
    down = torch.randn(16, 20, generator=generator)
    weights = torch.rand(600, generator=generator) + 0.5
    return FfnSample(gate, up, down, torch.ones(16), inputs, weights / weights.mean())


def groups(partition: Partition) -> set[frozenset[int]]:
    return {frozenset(row.tolist()) for row in partition.routed}


PLANTED = {frozenset(range(g, 20, 4)) for g in range(3)}


@pytest.mark.parametrize("build", [coactivation, carve], ids=lambda build: build.__name__)
def test_planted_experts_are_found(sample: FfnSample, build: Callable[..., Partition]) -> None:
    partition = build(sample, SHAPE, seed=0, layer_idx=0)
    assert set(partition.shared.tolist()) == set(range(3, 20, 4))
    assert groups(partition) == PLANTED


def test_alternating_never_keeps_less_energy(sample: FfnSample) -> None:
    ridge = RidgeRouter(sample.inputs, sample.token_weights, target="log-energy")

    def kept(partition: Partition) -> float:
        energies = expert_energies(sample, partition) * sample.token_weights[:, None]
        routing = Routing(ridge(expert_energies(sample, partition)), SHAPE.active)
        chosen = routing.weights(sample.inputs) > 0
        h = next(h for _, h in sample.chunks())[:, partition.shared]
        shared = (h.square() * sample.down[:, partition.shared].square().sum(0)).sum(1)
        return float(energies[chosen].sum() + (shared * sample.token_weights).sum())

    start = coactivation(sample, SHAPE, seed=0, layer_idx=0)
    partition = alternating(sample, SHAPE, ridge, seed=0, layer_idx=0)
    assert kept(partition) >= kept(start) * (1 - 1e-6)
    assert groups(partition) == PLANTED


def test_clustering_finds_equal_rows(sample: FfnSample) -> None:
    shape = Shape(shared=0, routed=4, active=1)
    partition = independent_clustering(sample.up * 7, shape, seed=0, layer_idx=0)
    assert groups(partition) == {frozenset(range(g, 20, 4)) for g in range(4)}


def test_sharing_by_hand() -> None:
    importance = np.array(
        [
            [9.0, 8.0, 7.0, 0.0, 0.0, 0.0, 1.0, 2.0],
            [9.0, 0.0, 0.0, 8.0, 7.0, 0.0, 2.0, 1.0],
            [9.0, 8.0, 0.0, 0.0, 0.0, 7.0, 1.5, 1.0],
        ]
    )
    inner = sharing_inner(importance, Shape(0, 4, 1))
    assert inner.routed[:3].tolist() == [[0, 1], [0, 3], [0, 1]]
    inter = sharing_inter(importance, Shape(1, 3, 1))
    assert inter.shared.tolist() == [0, 1]  # on three lists and on two
    assert inter.routed.tolist() == [[2, 7], [3, 4], [5, 6]]
    split = gradient_split(importance, Shape(1, 3, 1))
    assert split.shared.tolist() == [0, 1]  # sums 27 and 16
    assert split.routed.tolist() == [[2, 7], [3, 4], [5, 6]]
    assert sorted(split.slots.tolist()) == list(range(8))


def test_ridge_solves_the_normal_equations(sample: FfnSample) -> None:
    partition = coactivation(sample, SHAPE, seed=0, layer_idx=0)
    energies = expert_energies(sample, partition)
    z, w = sample.inputs.double().numpy(), sample.token_weights.double().numpy()
    gram = (z * w[:, None]).T @ z
    gram += 1e-3 * np.mean(np.diag(gram)) * np.eye(16)
    expected = np.linalg.solve(gram, (z * w[:, None]).T @ energies.double().numpy()).T
    found = RidgeRouter(sample.inputs, sample.token_weights, target="energy")(energies)
    assert np.allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4 * abs(expected).max())


def test_energies_by_hand(sample: FfnSample) -> None:
    partition = coactivation(sample, SHAPE, seed=0, layer_idx=0)
    z = sample.inputs[5].double()
    g = sample.gate.double() @ z
    h = g * torch.sigmoid(g) * (sample.up.double() @ z)
    norms = sample.down.double().norm(dim=0)
    for expert, neurons in enumerate(partition.routed):
        expected = sum(float(h[j] * norms[j]) ** 2 for j in neurons)
        found = float(expert_energies(sample, partition)[5, expert])
        assert found == pytest.approx(expected, rel=1e-4)
    oracle = OracleRouting(torch.zeros(3, 16), 1, sample, partition).weights(sample.inputs)
    assert (oracle.argmax(1) == expert_energies(sample, partition).argmax(1)).all()


def test_prototype_routers(sample: FfnSample) -> None:
    partition = coactivation(sample, SHAPE, seed=0, layer_idx=0)
    mean = mean_gate_router(sample.gate, partition)
    assert torch.allclose(mean[1], sum(sample.gate[j] for j in partition.routed[1]) / SIZE)
    rows = representative_router(sample, partition)
    for row, neurons in zip(rows, partition.routed, strict=True):
        assert any(torch.equal(row, sample.gate[j]) for j in neurons)


def test_refit_is_least_squares_and_never_worse(sample: FfnSample) -> None:
    partition = coactivation(sample, SHAPE, seed=0, layer_idx=0)
    ridge = RidgeRouter(sample.inputs, sample.token_weights, target="energy")
    routing = Routing(ridge(expert_energies(sample, partition)), 1)
    target = sample.outputs()
    h = torch.cat([h for _, h in sample.chunks()])[:, partition.slots]
    masked = (h * slot_weights(partition, routing.weights(sample.inputs))).double()
    w, y = sample.token_weights.double(), target.double()
    start = sample.down[:, partition.slots].double()

    def error(down: torch.Tensor) -> float:
        return float((w[:, None] * (y - masked @ down.T).square()).sum())

    gram = (masked * w[:, None]).T @ masked
    system = gram + 0.1 * gram.diagonal().mean() * torch.eye(20)
    change = torch.linalg.solve(system, (masked * w[:, None]).T @ (y - masked @ start.T))
    found = refit_down_proj(sample, target, partition, routing, ridge=0.1)
    assert torch.allclose(found.double(), start + change.T, atol=1e-4)
    assert error(found.double()) < error(start)

    scale = least_squares_scale(sample, target, partition, routing)
    outputs = masked @ start.T
    errors = [
        float((w[:, None] * (y - s * outputs).square()).sum())
        for s in (scale, scale * 1.01, scale * 0.99)
    ]
    assert errors[0] == min(errors)
