"""Experts that keep little for the backward pass: the same numbers, fewer bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moefy.checkpoint.expert_layers import can_run, register

HIDDEN, TOKENS = 48, 40
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PLACES = pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])


def made(implementation: str, dtype: torch.dtype, size: int = 16) -> Any:
    register()
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=size, num_local_experts=8, num_experts_per_tok=4
    )
    config._experts_implementation = implementation
    torch.manual_seed(0)
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts.to(dtype)


def run(
    experts: Any, dtype: torch.dtype, autocast: bool = False, place: str = "cpu"
) -> list[Tensor]:
    """Return output and gradients of x, weights, gate_up and down; expert 7 is never chosen."""
    experts = experts.to(place)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, HIDDEN, generator=generator).to(place, dtype).requires_grad_()
    chosen = torch.stack([torch.randperm(7, generator=generator)[:4] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, 4, generator=generator).to(place, dtype).requires_grad_()
    with torch.autocast(place, torch.bfloat16, enabled=autocast):
        out = experts(x, chosen.to(place), weights)
    slopes = torch.randn(out.shape, generator=generator).to(out)
    out.backward(slopes)
    gradients = [x.grad, weights.grad, experts.gate_up_proj.grad, experts.down_proj.grad]
    return [tensor.cpu() for tensor in (out.detach(), *gradients)]


@PLACES
def test_against_float64(place: str) -> None:
    exact = run(made("eager", torch.float64), torch.float64)
    found = run(made("lean", torch.float32), torch.float32, place=place)
    for mine, true in zip(found, exact, strict=True):
        assert (mine - true).norm() < 1e-6 * true.norm()


@PLACES
def test_bfloat16_products_are_as_near_as_transformers(place: str) -> None:
    exact = run(made("eager", torch.float64), torch.float64)
    lean, plain = (
        [
            float((mine - true).norm() / true.norm())
            for mine, true in zip(
                run(made(i, torch.float32), torch.float32, True, place), exact, strict=True
            )
        ]
        for i in ("lean", "eager")
    )
    assert all(mine < 1.5 * theirs + 1e-3 for mine, theirs in zip(lean, plain, strict=True))
    assert max(lean) < 2e-2


def test_bfloat16_products_on_a_cpu_have_few_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[Tensor] = []
    product = torch.nn.functional.grouped_mm

    def note(*matrices: Tensor, offs: Tensor) -> Tensor:
        ends.append(offs)
        return product(*matrices, offs=offs)

    monkeypatch.setattr(torch.nn.functional, "grouped_mm", note)
    run(made("lean", torch.float32), torch.float32, True)
    assert len(ends) == 6
    assert all((found % 32 == 0).all() for found in ends)
    run(made("lean", torch.float32), torch.float32)
    assert ends[-1][-1] == TOKENS * 4  # float32 needs no rounding


def test_sizes_that_torch_refuses_are_left_to_transformers() -> None:
    for size in (12, 43):
        experts = made("lean", torch.float32, size=size)
        assert not can_run(experts)
        expected = run(made("eager", torch.float32, size=size), torch.float32)
        for mine, theirs in zip(run(experts, torch.float32), expected, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("implementation", ["lean", "grouped_mm"])
def test_what_is_kept_does_not_grow_with_the_hidden_states_copies(implementation: str) -> None:
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    experts = made(implementation, torch.float32)
    x = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    chosen = torch.arange(4).expand(TOKENS, 4)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        experts(x, chosen, torch.rand(TOKENS, 4, requires_grad=True))
    weights = {p.untyped_storage()._cdata for p in experts.parameters()}
    floats = sum(
        t.untyped_storage().nbytes() // 4
        for place, t in kept.items()
        if place not in weights and t.is_floating_point()
    )
    copies = TOKENS * 4 * HIDDEN
    if implementation == "lean":
        assert floats <= TOKENS * HIDDEN + TOKENS * 4 * (2 * 16 + 1)
    else:
        assert floats > 2 * copies
