"""Every partition reproduces its own definition, worked out independently."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from moefy.calibrate.importance import SegmentImportance
from moefy.calibrate.sample import FfnSample
from moefy.construct.ffn import Partition, Routing, stream
from moefy.construct.partition.alternating import alternating
from moefy.construct.partition.carve import carve
from moefy.construct.partition.clustering import independent_clustering
from moefy.construct.partition.coactivation import coactivation
from moefy.construct.partition.random import independent_random
from moefy.construct.partition.sharing import (
    gradient_split,
    importance_by_cluster,
    sharing_inner,
    sharing_inter,
)
from moefy.construct.pipeline import split_ffn
from moefy.construct.repair.refit import least_squares_scale, refit_down_proj
from moefy.construct.router.ascent import kept_energy_ascent, kept_energy_gradient
from moefy.construct.router.energy import expert_energies
from moefy.construct.router.prototype import mean_gate_router, representative_router
from moefy.construct.router.ridge import RidgeSystem, log_energies
from moefy.errors import CorpusError
from moefy.recipe import ConvertRecipe
from moefy.split import Split

SPLIT = Split(experts=4, active=2, shared=1)
SIZE = 5


def seeded() -> np.random.Generator:
    return stream(0, "partition", 0)


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
    partition = build(sample, SPLIT, seeded())
    assert set(partition.shared.tolist()) == set(range(3, 20, 4))
    assert groups(partition) == PLANTED


def log_ridge(sample: FfnSample, ridge: float = 0.1) -> Callable[[torch.Tensor], torch.Tensor]:
    system = RidgeSystem(sample.inputs, sample.token_weights, ridge=ridge)
    return lambda energies: system.solve(log_energies(energies))


def kept_energy(sample: FfnSample, partition: Partition, router: torch.Tensor) -> float:
    """What runs, shared experts included."""
    energies = expert_energies(sample, partition) * sample.token_weights[:, None]
    chosen = Routing(router, SPLIT.chosen).chosen(sample.inputs) > 0
    h = next(h for _, h in sample.chunks())[:, partition.shared]
    shared = (h.square() * sample.down[:, partition.shared].square().sum(0)).sum(1)
    return float(energies[chosen].sum() + (shared * sample.token_weights).sum())


def test_alternating_keeps_more_energy_than_its_start(sample: FfnSample) -> None:
    fit = log_ridge(sample)
    first = independent_random(20, SPLIT, seeded())
    partition = alternating(sample, SPLIT, fit, seeded())
    found, before = (
        kept_energy(sample, p, fit(expert_energies(sample, p))) for p in (partition, first)
    )
    assert found > before
    h = next(h for _, h in sample.chunks())
    total = (h.square() * sample.down.square().sum(0)).sum(1) * sample.token_weights
    assert found > 0.9 * float(total.sum())


def test_alternating_does_not_depend_on_the_size_of_the_logits(sample: FfnSample) -> None:
    fit, split = log_ridge(sample), Split(experts=5, active=3)
    plain, steep = (
        alternating(sample, split, lambda e, by=by: by * fit(e), seeded()).slots
        for by in (1.0, 1e6)
    )
    assert plain.tolist() == steep.tolist()


def test_alternating_does_not_depend_on_the_router_beside_it(sample: FfnSample) -> None:
    recipe = {"experts": 4, "active": 2, "shared": 1, "repair": "none"}
    slots = [
        split_ffn(sample, ConvertRecipe.build(**recipe, router=router), 0).partition.slots.tolist()
        for router in ("ridge-log", "ascent", "mean-gate", "random")
    ]
    assert all(found == slots[0] for found in slots)


def test_ascent_finds_the_experts(sample: FfnSample) -> None:
    """From a random router, ten steps take most of the way to the oracle."""
    partition = Partition(np.arange(5), np.arange(5, 20).reshape(3, 5))
    energies = expert_energies(sample, partition)
    system = RidgeSystem(sample.inputs, sample.token_weights, ridge=1.0)
    start = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    found = kept_energy_ascent(start, energies, system, SPLIT.chosen)
    oracle = energies.max(dim=1).values * sample.token_weights
    h = next(h for _, h in sample.chunks())[:, :5]
    shared = (h.square() * sample.down[:, :5].square().sum(0)).sum(1) * sample.token_weights
    ceiling = float((oracle + shared).sum())
    before, after = (kept_energy(sample, partition, router) for router in (start, found))
    assert before + 0.8 * (ceiling - before) < after <= ceiling * (1 + 1e-6)


def test_ascent_climbs_along_the_gradient() -> None:
    """Against differences, the threshold found by bisection so that the soft choices sum to k."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 7, generator=generator).double()
    energies = torch.rand(5, 7, generator=generator).double()
    top = logits.topk(3, dim=1).values[:, 1:].mean(1, keepdim=True)
    counts = torch.sigmoid((logits - top) / 0.4).sum(1)

    def kept(values: torch.Tensor) -> torch.Tensor:
        low, high = values.min(1).values - 9, values.max(1).values + 9
        for _ in range(80):
            middle = (low + high) / 2
            over = torch.sigmoid((values - middle[:, None]) / 0.4).sum(1) > counts
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        return (torch.sigmoid((values - middle[:, None]) / 0.4) * energies).sum()

    expected = torch.zeros(5, 7).double()
    for token in range(5):
        for expert in range(7):
            step = torch.zeros(5, 7).double()
            step[token, expert] = 1e-5
            expected[token, expert] = (kept(logits + step) - kept(logits - step)) / 2e-5
    found = kept_energy_gradient(logits, energies, 2, torch.tensor(0.4).double()) / 0.4
    assert torch.allclose(found, expected, atol=1e-6)


def test_clustering_finds_equal_rows(sample: FfnSample) -> None:
    split = Split(experts=4, active=1)
    partition = independent_clustering(sample.up * 7, split, seeded())
    assert groups(partition) == {frozenset(range(g, 20, 4)) for g in range(4)}


def test_sharing_by_hand() -> None:
    importance = np.array(
        [
            [9.0, 8.0, 7.0, 0.0, 0.0, 0.0, 1.0, 2.0],
            [9.0, 0.0, 0.0, 8.0, 7.0, 0.0, 2.0, 1.0],
            [9.0, 8.0, 0.0, 0.0, 0.0, 7.0, 1.5, 1.0],
        ]
    )
    inner = sharing_inner(importance, Split(4, 1))
    assert inner.routed[:3].tolist() == [[0, 1], [0, 3], [0, 1]]
    inter = sharing_inter(importance, Split(4, 2, 1))
    assert inter.shared.tolist() == [0, 1]  # on three lists and on two
    assert inter.routed.tolist() == [[2, 7], [3, 4], [5, 6]]
    dealt = gradient_split(importance, Split(4, 2, 1))
    assert dealt.shared.tolist() == [0, 1]  # sums 27 and 16
    assert dealt.routed.tolist() == [[2, 7], [3, 4], [5, 6]]
    assert sorted(dealt.slots.tolist()) == list(range(8))


def test_ridge_solves_the_normal_equations(sample: FfnSample) -> None:
    partition = coactivation(sample, SPLIT, seeded())
    energies = expert_energies(sample, partition)
    z, w = sample.inputs.double().numpy(), sample.token_weights.double().numpy()
    gram = (z * w[:, None]).T @ z
    gram += 0.1 * np.mean(np.diag(gram)) * np.eye(16)
    expected = np.linalg.solve(gram, (z * w[:, None]).T @ energies.double().numpy()).T
    found = RidgeSystem(sample.inputs, sample.token_weights, ridge=0.1).solve(energies)
    assert np.allclose(found.numpy(), expected, rtol=1e-3, atol=1e-4 * abs(expected).max())


def test_energies_by_hand(sample: FfnSample) -> None:
    partition = coactivation(sample, SPLIT, seeded())
    z = sample.inputs[5].double()
    g = sample.gate.double() @ z
    h = g * torch.sigmoid(g) * (sample.up.double() @ z)
    norms = sample.down.double().norm(dim=0)
    for expert, neurons in enumerate(partition.routed):
        expected = sum(float(h[j] * norms[j]) ** 2 for j in neurons)
        found = float(expert_energies(sample, partition)[5, expert])
        assert found == pytest.approx(expected, rel=1e-4)


def test_prototype_routers(sample: FfnSample) -> None:
    partition = coactivation(sample, SPLIT, seeded())
    mean = mean_gate_router(sample.gate, partition)
    assert torch.allclose(mean[1], sum(sample.gate[j] for j in partition.routed[1]) / SIZE)
    h = torch.cat([h for _, h in sample.chunks()]).double().abs() * sample.down.norm(dim=0).double()
    mixed = Partition(np.arange(5), np.arange(5, 20).reshape(3, 5))
    rows = representative_router(sample, mixed)
    for row, neurons in zip(rows, mixed.routed, strict=True):
        centre = h[:, neurons].sum(1)
        cosine = [float(h[:, j] @ centre / h[:, j].norm()) for j in neurons]
        assert max(cosine) > min(cosine) * 1.01
        assert torch.equal(row, sample.gate[neurons[int(np.argmax(cosine))]])


def test_importance_by_cluster_finds_planted_texts() -> None:
    kind = torch.arange(12) % 3
    features = torch.eye(5)[kind] + 0.01 * torch.randn(
        12, 5, generator=torch.Generator().manual_seed(0)
    )
    scores = torch.rand(12, 2, 7, generator=torch.Generator().manual_seed(1))
    found = importance_by_cluster(SegmentImportance(scores, features), 3, seed=0)
    expected = torch.stack([scores[kind == k].mean(0) for k in range(3)], dim=1)
    order = [int((expected[0] - row).norm(dim=1).argmin()) for row in found[0]]
    assert sorted(order) == [0, 1, 2]
    assert torch.allclose(found, expected[:, order])
    with pytest.raises(CorpusError, match="12 calibration segments cannot make 13 clusters"):
        importance_by_cluster(SegmentImportance(scores, features), 13, seed=0)


def test_experts_run_however_small_their_weight() -> None:
    """Logits that differ by hundreds: the softmax underflows, the choice stands."""
    routing = Routing(torch.tensor([[300.0], [0.0], [-300.0]]), 2)
    inputs = torch.ones(1, 1)
    assert routing.weights(inputs).tolist() == [[2.0, 0.0, 0.0]]
    assert routing.chosen(inputs).tolist() == [[1.0, 1.0, 0.0]]


@pytest.mark.parametrize("shifted", [False, True])
def test_refit_is_least_squares_and_never_worse(sample: FfnSample, shifted: bool) -> None:
    partition = coactivation(sample, SPLIT, seeded())
    system = RidgeSystem(sample.inputs, sample.token_weights, ridge=0.1)
    routing = Routing(system.solve(expert_energies(sample, partition)), 1)
    sample.desired = sample.outputs() + torch.ones(16) if shifted else None
    h = torch.cat([h for _, h in sample.chunks()])[:, partition.slots]
    weights = routing.weights(sample.inputs)
    every = torch.cat([torch.ones(600, 5), weights.repeat_interleave(5, dim=1)], dim=1)
    masked = (h * every).double()
    w, y = sample.token_weights.double(), sample.target().double()
    start = sample.down[:, partition.slots].double()

    def error(down: torch.Tensor) -> float:
        return float((w[:, None] * (y - masked @ down.T).square()).sum())

    gram = (masked * w[:, None]).T @ masked
    system = gram + 0.1 * gram.diagonal().mean() * torch.eye(20)
    change = torch.linalg.solve(system, (masked * w[:, None]).T @ (y - masked @ start.T))
    found = refit_down_proj(sample, partition, routing, ridge=0.1)
    assert torch.allclose(found.double(), start + change.T, atol=1e-4)
    assert error(found.double()) < error(start)

    scale = least_squares_scale(sample, partition, routing)
    outputs = masked @ start.T
    errors = [
        float((w[:, None] * (y - s * outputs).square()).sum())
        for s in (scale, scale * 1.01, scale * 0.99)
    ]
    assert errors[0] == min(errors)
