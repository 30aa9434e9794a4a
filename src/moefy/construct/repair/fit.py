"""Gradient descent on all matrices of one split FFN, towards that layer's own target."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from moefy.calibrate.walk import LayerTokens
from moefy.construct.ffn import FitError, SplitFfn, routed_ffn
from moefy.hardware import training_precision
from moefy.recipe import ConvertRecipe

_BETAS = (0.9, 0.95)
_WARMUP = 0.05
_CHUNK = 4096  # tokens
_HELD_OUT = 16
"""One calibration token in so many is not fitted: it judges the fit."""


def fit_ffn(
    tokens: LayerTokens, split: SplitFfn, recipe: ConvertRecipe, generator: np.random.Generator
) -> SplitFfn:
    """Fit gate, up, down and router of a split FFN with Adam.

    Minimises Σ_t ω_t·‖y_t − f(z_t)‖², f the split FFN with its k chosen experts, y the sample's
    target. The rate of each matrix is `fit_learning_rate` times its root mean square at the start,
    with a warm-up of 5% and a cosine to 0. The gradient reaches the router through the chosen
    experts' weights. Where the tokens that are held out are not fitted better than before, the
    split is returned as it was.

    Source: none for a split; for pruned models EBFT (arXiv 2402.12419) fits a block to its dense
    outputs in the same way. Deviation: the target is what brings the residual stream back to the
    dense model's, and one FFN is fitted, not a block.

    Args:
        tokens: the calibration tokens in front of the layer's FFN.
        split: the start, usually the closed form.
        recipe: has the number of passes, the rate and the tokens of a step.
        generator: draws the batches.
    """
    num_shared, chosen = len(split.partition.shared), split.routing.active
    num_fitted = tokens.num_tokens - tokens.num_tokens // _HELD_OUT
    masters = [matrix.clone() for matrix in split.weights]
    if chosen:
        masters.append(split.routing.router.clone())
    batch = recipe.fit_batch_tokens
    assert recipe.fit_epochs is not None
    num_steps = max(1, round(recipe.fit_epochs * num_fitted / batch))
    optimizer, schedule = adam(masters, recipe.fit_learning_rate, num_steps)
    dtype = torch.bfloat16 if training_precision("auto") == "bfloat16" else torch.float32

    def squares(which: slice | np.ndarray, leaves: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Return Σ ω·‖y − f‖² and Σ ω·‖y‖² of some tokens."""
        sample = tokens.sample(which)
        *experts, router = leaves if chosen else [*leaves, split.routing.router]
        gate, up, down = (m.to(dtype) for m in experts)
        routing = replace(split.routing, router=router)
        outputs = routed_ffn(sample.inputs, gate, up, down, routing, num_shared)
        target, weights = sample.target(), sample.token_weights
        return (weights @ (outputs - target).square().sum(1)), weights @ target.square().sum(1)

    @torch.no_grad()
    def held_out_error() -> float:
        starts = range(num_fitted, tokens.num_tokens, _CHUNK)
        parts = [squares(slice(at, min(at + _CHUNK, tokens.num_tokens)), masters) for at in starts]
        error, norm = (float(sum(part)) for part in zip(*parts, strict=True))
        return error / max(norm, 1e-30)

    before = held_out_error()
    for which in shuffled(num_fitted, batch, num_steps, generator):
        leaves = [m.detach().requires_grad_() for m in masters]
        with torch.enable_grad():
            error, norm = squares(which, leaves)
            gradients = torch.autograd.grad(error / norm, leaves)
        for master, gradient in zip(masters, gradients, strict=True):
            master.grad = gradient
        optimizer.step()
        schedule.step()
    after = held_out_error()
    if not after < before:  # also where it is not a number
        return replace(split, error=FitError(before, before))
    gate, up, down, *router = masters
    routing = replace(split.routing, router=router[0]) if router else split.routing
    down = down.T.contiguous()
    return SplitFfn(
        split.partition, routing, gate, up, down, fitted=True, error=FitError(before, after)
    )


def adam(
    tensors: list[Tensor], rate: float, num_steps: int
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    """Return an optimizer whose rate is `rate` times each tensor's root mean square now.

    The schedule is a warm-up of 5% and half a cosine to 0.
    """
    sizes = [float(tensor.detach().square().mean().sqrt()) for tensor in tensors]
    groups = [{"params": [t], "lr": rate * s} for t, s in zip(tensors, sizes, strict=True)]
    optimizer = torch.optim.Adam(groups, betas=_BETAS, fused=True)
    factor = partial(_rate, num_steps=num_steps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def shuffled(
    count: int, size: int, num_batches: int, generator: np.random.Generator
) -> Iterator[Int[np.ndarray, " size"]]:
    """Iterate over batches of indices below `count`, shuffled anew when all were given."""
    order = np.empty(0, dtype=np.int64)
    for _ in range(num_batches):
        while len(order) < size:
            order = np.concatenate([order, generator.permutation(count)])
        batch, order = order[:size], order[size:]
        yield batch


def _rate(step: int, num_steps: int) -> float:
    """Return the factor of the learning rate: a linear warm-up, then half a cosine."""
    warm = min(1.0, (step + 1) / (_WARMUP * num_steps))
    return warm * 0.5 * (1 + math.cos(math.pi * step / num_steps))
