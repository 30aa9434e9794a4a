"""The learning rate of a step, and AdamW over parameters that may lie on several processes."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moefy.experts.routers import routers_of
from moefy.training.recipe import TrainRecipe


def build_optimizer(
    network: Any, noise: nn.Module | None, recipe: TrainRecipe
) -> torch.optim.AdamW:
    """Return AdamW with weight decay on matrices only; routers have a rate of their own.

    Each group has `rate_fraction` beside AdamW's keys. Frozen parameters stay out, and the matrices
    of `noise`, a noisy gate, are trained like routers.
    """
    routers = {id(p) for router in routers_of(network) for p in router.parameters()}
    gate = list(noise.parameters()) if noise is not None else []
    routers |= set(map(id, gate))
    by_kind: dict[tuple[Any, ...], list[nn.Parameter]] = defaultdict(list)
    for parameter in [*network.parameters(), *gate]:
        if parameter.requires_grad:
            is_router, is_matrix = id(parameter) in routers, parameter.ndim > 1
            # fused AdamW takes parameters of one layout at a time
            by_kind[is_router, is_matrix, _layout(parameter)].append(parameter)
    groups: list[dict[str, Any]] = [
        {
            "params": members,
            "weight_decay": recipe.weight_decay if is_matrix else 0.0,
            "rate_fraction": recipe.router_lr_scale if is_router else 1.0,
        }
        for (is_router, is_matrix, _), members in by_kind.items()
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=recipe.adam_betas, fused=True)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> Float[Tensor, ""]:
    """Scale all gradients so that their common norm is at most `max_norm`; return it before.

    As torch's `clip_grad_norm_`, which cannot mix parameters that lie on different processes.
    """
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[_layout(parameter)].append(parameter.grad)
    squares = []  # of the norms of groups, whole on every process
    for gradients in groups.values():
        norm = nn.utils.get_total_norm(gradients)
        squares.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).square())
    total = torch.stack(squares).sum().sqrt()
    factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradients in groups.values():
        own = [g.to_local() if isinstance(g, DTensor) else g for g in gradients]
        torch._foreach_mul_(own, factor)
    return total


def _layout(parameter: Tensor) -> Any:
    """Return what parameters must share for torch to treat them in one operation."""
    if isinstance(parameter, DTensor):
        return parameter.device_mesh, parameter.placements
    return None


def learning_rate(
    step: int,
    num_steps: int,
    *,
    peak: float,
    warmup_fraction: float,
    final_fraction: float,
    as_trainer: bool = False,
) -> float:
    """Return the learning rate of one step: linear warm-up, then cosine to a floor.

    The schedule of LLaMA-MoE (arXiv 2406.16554), which falls to 10% of the peak. `step` counts from
    0, both fractions are of `peak` and `num_steps`; `as_trainer` counts as transformers' Trainer.
    """
    # Trainer begins at the rate 0, rounds warm-up up, and ends one step before the floor
    num_warmup = (math.ceil if as_trainer else round)(num_steps * warmup_fraction)
    last = num_steps if as_trainer else num_steps - 1
    if step < num_warmup:
        return peak * (step if as_trainer else step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, last - num_warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * (final_fraction + (1 - final_fraction) * cosine)
