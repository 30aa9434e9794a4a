"""The balance loss against numbers worked out by hand and against transformers."""

from __future__ import annotations

import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moefy.training.balance import expert_load, switch_balance_loss


def test_even_use_is_one_and_collapse_is_the_number_of_experts() -> None:
    chosen = torch.tensor([[0], [1], [2], [3]])
    assert switch_balance_loss(torch.zeros(4, 4), chosen).item() == 1.0
    collapsed = torch.zeros(4, 4)
    collapsed[:, 0] = 50.0
    assert abs(switch_balance_loss(collapsed, torch.zeros(4, 1, dtype=torch.long)) - 4) < 1e-5


def test_matches_float64_by_hand() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    chosen = logits.topk(2).indices
    probs = logits.double().softmax(-1).mean(0)
    share = torch.stack([(chosen == e).sum() / 100 for e in range(6)]).double()
    expected = 6 * (share * probs).sum()
    assert abs(switch_balance_loss(logits, chosen).double() - expected) < 1e-6


def test_is_transformers_loss_of_one_layer_over_k() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    theirs = load_balancing_loss_func((logits,), num_experts=6, top_k=2)
    assert abs(switch_balance_loss(logits, logits.topk(2).indices) - theirs / 2) < 1e-6


def test_load_sums_to_one() -> None:
    load = expert_load(torch.tensor([[0, 1], [0, 3]]), 5)
    assert load.tolist() == [0.5, 0.25, 0.0, 0.25, 0.0]
