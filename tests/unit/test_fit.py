"""The fit of a layer's matrices: the routed FFN against a masked one, and what the fit gains."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from moefy.calibrate.sample import FfnSample
from moefy.calibrate.walk import LayerTokens
from moefy.checkpoint.targets import RouterScore
from moefy.construct import ffn
from moefy.construct.ffn import Partition, Routing, SplitFfn, routed_ffn, stream
from moefy.construct.pipeline import split_ffn
from moefy.construct.repair import fit
from moefy.construct.repair.fit import fit_ffn
from moefy.recipe import ConvertRecipe

HIDDEN, EXPERTS, SIZE, SHARED = 8, 6, 5, 4


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("small", [0, 64], ids=["by expert", "masked"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("shared", "active"), [(0, 2), (SHARED, 3), (SHARED, 0)])
def test_routed_ffn_and_its_gradients_equal_a_loop_over_tokens(
    monkeypatch: pytest.MonkeyPatch, small: int, score: RouterScore, shared: int, active: int
) -> None:
    monkeypatch.setattr(ffn, "_SMALL", small)
    slots = shared + EXPERTS * SIZE
    leaves = [normal(slots, HIDDEN, seed=s, dtype=torch.float64) for s in range(3)]
    leaves += [normal(EXPERTS, HIDDEN, seed=3, dtype=torch.float64)]
    inputs = normal(40, HIDDEN, seed=4, dtype=torch.float64)
    found, expected = ([m.clone().requires_grad_() for m in leaves] for _ in range(2))
    routing = Routing(found[3], active, score)
    outputs = routed_ffn(inputs, *found[:3], routing.weights(inputs), shared)

    gate, up, down, router = expected
    rows = []
    for z in inputs:
        hidden = F.silu(gate @ z) * (up @ z)
        factors = [torch.ones(shared, dtype=torch.float64), torch.zeros(EXPERTS * SIZE).double()]
        if active:
            top, chosen = (router @ z).topk(active)
            weight = 2 * top.sigmoid() if score == "sigmoid" else active * top.softmax(0)
            spread = torch.zeros(EXPERTS, dtype=torch.float64).scatter(0, chosen, weight)
            factors[1] = spread.repeat_interleave(SIZE)
        rows.append((hidden * torch.cat(factors)) @ down)
    reference = torch.stack(rows)
    assert (outputs - reference).abs().max() < 1e-12
    for mine, theirs in zip(found, expected, strict=True):
        if not active and mine is found[3]:
            continue
        (one,) = torch.autograd.grad(outputs.square().sum(), mine, retain_graph=True)
        (other,) = torch.autograd.grad(reference.square().sum(), theirs, retain_graph=True)
        assert (one - other).abs().max() < 1e-12 * other.abs().max()


@pytest.fixture
def sample() -> FfnSample:
    """A layer whose target is the FFN of other matrices: there is something to fit."""
    gate, up, down = normal(48, 16, seed=1), normal(48, 16, seed=2), normal(16, 48, seed=3)
    inputs = normal(4096, 16, seed=4)
    weights = torch.rand(4096, generator=torch.Generator().manual_seed(5)) + 0.5
    found = FfnSample(gate / 4, up / 4, down / 4, torch.ones(16), inputs, weights / weights.mean())
    other = replace(found, gate=found.gate + 0.1 * normal(48, 16, seed=6), _kept=[])
    return replace(found, desired=other.outputs(), _kept=[])


def recipe(**settings: object) -> ConvertRecipe:
    usual = {"experts": 8, "active": 4, "shared": 0, "fit_batch_tokens": 256, "fit_epochs": 4.0}
    return ConvertRecipe.build(**(usual | settings)).for_model(48)


@dataclass(frozen=True)
class Planted(LayerTokens):
    """Tokens of one sample, without the model that they would come from."""

    whole: FfnSample

    def sample(self, tokens: slice | np.ndarray) -> FfnSample:
        return replace(
            self.whole,
            inputs=self.whole.inputs[tokens],
            token_weights=self.whole.token_weights[tokens],
            desired=self.whole.target()[tokens],
            _kept=[],
        )


def fitted_split(sample: FfnSample, recipe: ConvertRecipe) -> SplitFfn:
    closed = split_ffn(sample, recipe, 0)
    tokens = Planted(None, None, None, sample.num_tokens, None, sample)  # type: ignore[arg-type]
    return fit_ffn(tokens, closed, recipe, stream(recipe.seed, "fit", 0))


@pytest.mark.parametrize("shared", [0, 2, 4])
def test_fit_lowers_the_error_of_tokens_that_it_does_not_read(
    sample: FfnSample, shared: int
) -> None:
    """Also where all active slices are shared: the pruned rival is fitted in the same way."""
    closed = split_ffn(sample, recipe(shared=shared, repair="refit"), 0)
    fitted = fitted_split(sample, recipe(shared=shared))
    assert closed.error is None
    assert fitted.error is not None
    assert fitted.fitted
    assert fitted.error.after < 0.9 * fitted.error.before

    def error(split: SplitFfn) -> float:
        last = slice(len(sample.inputs) * 15 // 16, None)
        difference = split(sample.inputs[last]) - sample.target()[last]
        weight = sample.token_weights[last, None]
        norm = (weight * sample.target()[last].square()).sum()
        return float((weight * difference.square()).sum() / norm)

    # the fit's own figures, up to the precision of the products that it is made with
    assert error(closed) == pytest.approx(fitted.error.before, rel=0.02)
    assert error(fitted) == pytest.approx(fitted.error.after, rel=0.02)


def test_a_fit_that_gains_nothing_is_not_taken(sample: FfnSample) -> None:
    diverged = fitted_split(sample, recipe(fit_learning_rate=1e3))
    assert not diverged.fitted
    assert diverged.error is not None
    assert diverged.error.after == diverged.error.before


def test_the_same_seed_gives_the_same_fit(sample: FfnSample) -> None:
    one, two, other = (fitted_split(sample, recipe(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one.down, two.down)
    assert torch.equal(one.routing.router, two.routing.router)
    assert not torch.equal(one.down, other.down)


@pytest.mark.parametrize("shared", [0, 2, 4])
def test_threads_share_a_fit_and_do_not_change_it(
    sample: FfnSample, monkeypatch: pytest.MonkeyPatch, shared: int
) -> None:
    monkeypatch.setattr(fit, "training_precision", lambda _: "float32")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(fitted_split(sample, recipe(shared=shared, fit_epochs=0.5)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    one, three = found
    for mine, theirs in zip(one.weights, three.weights, strict=True):
        assert (mine - theirs).abs().max() < 1e-5 * mine.abs().max()
    assert (one.routing.router - three.routing.router).abs().max() < 1e-5
    assert one.fitted
    assert three.fitted


def test_rows_of_a_fitted_split_follow_its_slots() -> None:
    partition = Partition(np.array([5, 1]), np.array([[0, 2], [4, 3]]))
    routing = Routing(normal(2, HIDDEN), 1)
    matrices = normal(6, HIDDEN), normal(6, HIDDEN, seed=1), normal(HIDDEN, 6, seed=2)
    dense = SplitFfn(partition, routing, *matrices)
    slots = torch.from_numpy(partition.slots)
    fitted = SplitFfn(
        partition, routing, matrices[0][slots], matrices[1][slots], matrices[2], fitted=True
    )
    inputs = normal(30, HIDDEN, seed=3)
    assert torch.equal(dense(inputs), fitted(inputs))
    assert fitted.rows.routed.tolist() == [[2, 3], [4, 5]]
    assert stream(0, "fit", 0).random() != stream(0, "fit", 1).random()
