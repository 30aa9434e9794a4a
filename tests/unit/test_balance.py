"""Balance losses against float64 references, written out token by token."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moefy.experts.balance import (
    RouterSums,
    importance_and_load_loss,
    router_sums,
    router_z_loss,
    squared_variation,
    switch_loss,
)
from moefy.experts.noisy_gate import choice_probs
from moefy.experts.routers import shifted_bias

LAYERS, TOKENS, EXPERTS, ACTIVE = 2, 40, 6, 2
LOSSES = [importance_and_load_loss, switch_loss]


def random_logits(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, TOKENS, EXPERTS, generator=generator, dtype=torch.float64)


def softmax_sums(
    logits: Tensor, mask: Tensor | None = None, *, std: float | None = 0.7, active: int = ACTIVE
) -> RouterSums:
    """Sums of a softmax router, with fixed noise unless std is None."""
    noisy, probs = logits, None
    if std is not None:
        generator = torch.Generator().manual_seed(9)
        noise = torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
        noisy = logits + std * noise
        stds = torch.full_like(logits[0], std)
        pairs = zip(logits, noisy, strict=True)
        probs = torch.stack([choice_probs(c, n, stds, active=active) for c, n in pairs])
    top, chosen = noisy.topk(active, dim=-1)
    return router_sums(
        noisy, top.softmax(-1), chosen, score="softmax", mask=mask, choice_probs=probs
    )


def collapsed(strength: float) -> Tensor:
    """All tokens prefer the first k experts, the more the larger the strength."""
    logits = 0.01 * random_logits(1)
    logits[..., :ACTIVE] += strength
    return logits


def even() -> Tensor:
    """Every pair of experts is preferred by as many tokens."""
    pairs = list(itertools.combinations(range(EXPERTS), ACTIVE))
    logits = torch.full((LAYERS, len(pairs), EXPERTS), -5.0, dtype=torch.float64)
    for token_idx, pair in enumerate(pairs):
        logits[:, token_idx, list(pair)] = 5.0
    return logits


def test_importance_and_load_are_shazeers_sums() -> None:
    clean, std = random_logits()[0], 0.3 + torch.rand(TOKENS, EXPERTS, dtype=torch.float64)
    noisy = clean + std * random_logits(7)[0]
    importance, load = [0.0] * EXPERTS, [0.0] * EXPERTS
    for x in range(TOKENS):
        order = sorted(range(EXPERTS), key=lambda e: -float(noisy[x, e]))
        top = order[:ACTIVE]
        total = sum(math.exp(noisy[x, e]) for e in top)
        for e in range(EXPERTS):
            if e in top:
                importance[e] += math.exp(noisy[x, e]) / total
            others = sorted((float(noisy[x, o]) for o in range(EXPERTS) if o != e), reverse=True)
            z = (float(clean[x, e]) - others[ACTIVE - 1]) / float(std[x, e])
            load[e] += 0.5 * (1 + math.erf(z / math.sqrt(2)))
    expected = 0.0
    for values in (importance, load):
        mean = sum(values) / EXPERTS
        expected += sum((v - mean) ** 2 for v in values) / EXPERTS / (mean**2 + 1e-10)

    top_logits, chosen = noisy.topk(ACTIVE)
    sums = router_sums(
        noisy[None],
        top_logits.softmax(-1)[None],
        chosen[None],
        score="softmax",
        choice_probs=choice_probs(clean, noisy, std, active=ACTIVE)[None],
    )
    assert torch.allclose(sums.importance[0], torch.tensor(importance, dtype=torch.float64))
    assert torch.allclose(sums.load[0], torch.tensor(load, dtype=torch.float64))
    assert importance_and_load_loss(sums).item() == pytest.approx(expected, rel=1e-12)


def test_choice_probabilities_are_frequencies() -> None:
    clean = random_logits()[0, :1]
    std = torch.tensor([[0.2, 0.5, 0.7, 1.0, 0.3, 0.6]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    for bias in (None, torch.tensor([0.3, 0.0, -0.2, 0.1, 0.0, 0.0], dtype=torch.float64)):
        noisy = clean + std * torch.randn(1, EXPERTS, generator=generator, dtype=torch.float64)
        by_formula = choice_probs(clean, noisy, std, active=ACTIVE, selection_bias=bias)[0]
        for e in range(EXPERTS):
            redrawn = noisy.repeat(20_000, 1)
            redrawn[:, e] = clean[0, e] + std[0, e] * torch.randn(
                20_000, generator=generator, dtype=torch.float64
            )
            by = redrawn if bias is None else redrawn.sigmoid() + bias
            frequency = (by.topk(ACTIVE).indices == e).any(-1).double().mean()
            assert abs(float(frequency - by_formula[e])) < 0.015


def test_all_experts_active_are_always_chosen() -> None:
    logits = random_logits()[0]
    assert choice_probs(logits, logits, torch.ones_like(logits), active=EXPERTS).eq(1).all()


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_switch_and_z_loss_by_hand(score: Any) -> None:
    logits = random_logits()
    chosen = logits.topk(ACTIVE).indices
    sums = router_sums(
        logits, torch.rand(LAYERS, TOKENS, ACTIVE).double(), chosen, score=score, mask=None
    )
    switch = z = 0.0
    for layer in range(LAYERS):
        share, prob = [0.0] * EXPERTS, [0.0] * EXPERTS
        for x in range(TOKENS):
            row = logits[layer, x].tolist()
            raw = [math.exp(v) if score == "softmax" else 1 / (1 + math.exp(-v)) for v in row]
            z += math.log(sum(map(math.exp, row))) ** 2 / TOKENS / LAYERS
            for e in range(EXPERTS):
                prob[e] += raw[e] / sum(raw) / TOKENS
                share[e] += float((chosen[layer, x] == e).sum()) / TOKENS / ACTIVE
        switch += EXPERTS * sum(f * p for f, p in zip(share, prob, strict=True)) / LAYERS
    assert switch_loss(sums).item() == pytest.approx(switch, rel=1e-12)
    assert router_z_loss(sums).item() == pytest.approx(z, rel=1e-12)


def test_switch_of_one_layer_is_transformers_loss_over_k() -> None:
    logits = random_logits()[:1].float()
    theirs = load_balancing_loss_func((logits[0],), num_experts=EXPERTS, top_k=ACTIVE)
    assert abs(switch_loss(softmax_sums(logits, std=None)) - theirs / ACTIVE) < 1e-6


def test_transformers_masked_loss_too() -> None:
    logits, mask = random_logits()[:1].float(), torch.arange(TOKENS).view(2, -1) % 20 < 15
    theirs = load_balancing_loss_func((logits[0],), EXPERTS, ACTIVE, attention_mask=mask.long())
    ours = switch_loss(softmax_sums(logits, mask.reshape(-1), std=None))
    assert abs(ours - theirs / ACTIVE) < 1e-6


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("std", [None, 0.7])
def test_collapse_costs_more_than_even_use(
    loss: Callable[[RouterSums], Tensor], std: float | None
) -> None:
    worst = loss(softmax_sums(collapsed(50.0), std=std)).item()
    spread = loss(softmax_sums(even(), std=std)).item()
    assert worst > spread + 1.0
    if std is None:
        least = 1.0 if loss is switch_loss else 0.0
        assert spread == pytest.approx(least, abs=1e-6)
    if loss is switch_loss:
        assert worst == pytest.approx(EXPERTS / ACTIVE, rel=1e-6)


def test_a_collapse_by_small_logits_shows_in_importance_and_not_in_switch() -> None:
    sums = softmax_sums(collapsed(0.05), std=None)
    assert importance_and_load_loss(sums).item() == pytest.approx(LAYERS * 4.0, rel=1e-2)
    assert 1.0 < switch_loss(sums).item() < 1.05


def test_z_loss_grows_with_the_logits_of_a_collapse() -> None:
    assert router_z_loss(softmax_sums(collapsed(50.0))) > router_z_loss(softmax_sums(even()))


@pytest.mark.parametrize("loss", [*LOSSES, router_z_loss])
def test_gradients_move_a_collapsed_router_to_balance(
    loss: Callable[[RouterSums], Tensor],
) -> None:
    logits = collapsed(1.0).requires_grad_()
    before = loss(softmax_sums(logits))
    before.backward()
    assert logits.grad is not None
    mean_grad = logits.grad.mean((0, 1))
    assert mean_grad[:ACTIVE].min() > mean_grad[ACTIVE:].max(), "preferred experts must lose"
    for _ in range(400):
        logits = (logits - 20.0 * logits.grad).detach().requires_grad_()
        after = loss(softmax_sums(logits))
        after.backward()
    assert after < 0.5 * before if loss is not switch_loss else after - 1 < 0.5 * (before - 1)


def test_selection_bias_moves_to_balance() -> None:
    logits, bias = collapsed(1.0), torch.zeros(LAYERS, EXPERTS, dtype=torch.float64)
    choices = []
    for _ in range(200):
        chosen = (logits.sigmoid() + bias[:, None]).topk(ACTIVE).indices
        sums = router_sums(
            logits, torch.ones(LAYERS, TOKENS, ACTIVE).double(), chosen, score="sigmoid"
        )
        choices.append(squared_variation(sums.choices).sum())
        bias = shifted_bias(bias, sums.choices, 5e-3)
    assert choices[0] == pytest.approx(2 * 2.0)  # two of six experts take everything
    assert choices[-1] < 0.2
    by_hand = shifted_bias(torch.zeros(1, 3), torch.tensor([[4.0, 1.0, 1.0]]), 1e-3)
    assert by_hand.tolist() == [pytest.approx([-1e-3, 1e-3, 1e-3])]


def test_masked_tokens_do_not_count() -> None:
    logits = random_logits()
    mask = torch.arange(TOKENS) < 25
    cut = softmax_sums(logits, std=None), softmax_sums(logits, mask, std=None)
    alone = softmax_sums(logits[:, :25], std=None)
    for loss in (*LOSSES, router_z_loss):
        assert loss(cut[1]).item() == pytest.approx(loss(alone).item(), rel=1e-12)
        assert loss(cut[1]).item() != pytest.approx(loss(cut[0]).item(), rel=1e-3)


@pytest.mark.parametrize("loss", [*LOSSES, router_z_loss])
def test_sums_of_parts_are_the_whole(loss: Callable[[RouterSums], Tensor]) -> None:
    logits = random_logits().requires_grad_()
    whole = loss(softmax_sums(logits, std=None))
    (expected,) = torch.autograd.grad(whole, logits)
    first, second = (softmax_sums(part, std=None) for part in logits.split([15, 25], dim=1))
    # what a worker sees: its own part with gradients, the others' as numbers
    found = torch.zeros_like(logits)
    for mine, others in ((first, second), (second, first)):
        together = loss(others.detach() + mine)
        assert together.item() == pytest.approx(whole.item(), rel=1e-12)
        found += torch.autograd.grad(together, logits, retain_graph=True)[0]
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("loss", LOSSES)
def test_alike_passes_have_the_gradient_of_the_batch(
    loss: Callable[[RouterSums], Tensor],
) -> None:
    logits = random_logits().requires_grad_()
    (expected,) = torch.autograd.grad(
        loss(softmax_sums(torch.cat([logits] * 3, dim=1), std=None)), logits
    )
    found, earlier = torch.zeros_like(logits), None
    for pass_idx in range(3):
        now = softmax_sums(logits, std=None)
        together = now if earlier is None else earlier + now
        found += torch.autograd.grad((pass_idx + 1) / 3 * loss(together), logits)[0]
        earlier = together.detach()
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-14)
