"""Gradient descent on all matrices of one split FFN, towards that layer's own target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefy.calibrate.sample import FfnSample
from moefy.calibrate.walk import LayerTokens
from moefy.construct.ffn import FitError, SplitFfn, routed_ffn
from moefy.hardware import training_precision, worker_threads
from moefy.recipe import ConvertRecipe

_BETAS = (0.9, 0.95)
_WARMUP = 0.05
_CHUNK = 4096  # tokens
_MOST_PARTS = 8
"""Threads that share a step; where there are more, each has several."""
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
    num_fitted = tokens.num_tokens - tokens.num_tokens // _HELD_OUT
    batch, held_out = recipe.fit_batch_tokens, range(num_fitted, tokens.num_tokens, _CHUNK)
    assert recipe.fit_epochs is not None
    num_steps = max(1, round(recipe.fit_epochs * num_fitted / batch))
    with worker_threads(_MOST_PARTS) as (count, each):
        fitting = _Fitting(split, count, each)
        optimizer, schedule = adam(fitting.groups(), recipe.fit_learning_rate, num_steps)

        def held_out_error() -> float:
            chunks = (slice(at, min(at + _CHUNK, tokens.num_tokens)) for at in held_out)
            found = [fitting.error(tokens.sample(chunk)) for chunk in chunks]
            error, norm = (math.fsum(part) for part in zip(*found, strict=True))
            return error / max(norm, 1e-30)

        before = held_out_error()
        for which in shuffled(num_fitted, batch, num_steps, generator):
            fitting.differentiate(tokens.sample(which))
            optimizer.step()
            schedule.step()
        after = held_out_error()
    if not after < before:  # also where it is not a number
        return replace(split, error=FitError(before, before))
    return replace(fitting.split(), error=FitError(before, after))


@dataclass(frozen=True)
class _Part:
    """What one thread computes: some of the shared neurons and some of the experts."""

    num_shared: int
    experts: slice
    rows: Int[Tensor, " slots"]  # of the split's weights
    masters: list[Tensor]  # gate, up and transposed down, in float32


class _Fitting:
    """The split FFN while it is fitted, in parts for threads."""

    def __init__(
        self, split: SplitFfn, num_parts: int, each: Callable[[Any, Iterable[Any]], list[Any]]
    ) -> None:
        self._start, self._each = split, each
        self._dtype = getattr(torch, training_precision("auto"))
        self._router = split.routing.router.clone()
        self._parts = []
        routed, num_shared = split.partition.routed, len(split.partition.shared)
        slots = np.arange(num_shared + routed.size)
        of_shared = np.array_split(slots[:num_shared], num_parts)
        of_routed = np.array_split(slots[num_shared:].reshape(routed.shape), num_parts)
        first = 0
        for shared, experts in zip(of_shared, of_routed, strict=True):
            rows = torch.from_numpy(np.concatenate([shared, experts.ravel()]))
            masters = [matrix[rows] for matrix in split.weights]
            which = slice(first, first + len(experts))
            self._parts.append(_Part(len(shared), which, rows, masters))
            first += len(experts)

    def groups(self) -> list[list[Tensor]]:
        """Return what is fitted: the pieces of each matrix, and the router."""
        matrices = zip(*(part.masters for part in self._parts), strict=True)
        return [*map(list, matrices), [self._router]]

    def error(self, sample: FfnSample) -> tuple[float, float]:
        """Return Σ ω·‖f − y‖² and Σ ω·‖y‖²."""
        weights = replace(self._start.routing, router=self._router).weights(sample.inputs)
        by_part, target = self._forward(sample.inputs, weights, learns=False), sample.target()
        found = reduce(torch.add, (outputs for outputs, _ in by_part))
        return _squares(sample, found - target), _squares(sample, target)

    def differentiate(self, sample: FfnSample) -> None:
        """Set the gradients of the error, divided by Σ ω·‖y‖²."""
        target, router = sample.target(), self._router.detach().requires_grad_()
        with torch.enable_grad():
            weights = replace(self._start.routing, router=router).weights(sample.inputs)
        by_part = self._forward(sample.inputs, weights, learns=True)
        found = reduce(torch.add, (outputs.detach() for outputs, _ in by_part))
        slope = sample.token_weights[:, None] * (found - target) * (2 / _squares(sample, target))

        def backward(task: tuple[_Part, tuple[Tensor, list[Tensor]]]) -> Tensor:
            part, (outputs, leaves) = task
            found = torch.autograd.grad(
                outputs, leaves, slope, allow_unused=True, materialize_grads=True
            )
            for master, gradient in zip(part.masters, found[:3], strict=True):
                master.grad = gradient.float()
            return found[3]

        of_weights = self._each(backward, zip(self._parts, by_part, strict=True))
        if weights.requires_grad:  # experts are chosen
            gradient = torch.cat(of_weights, 1)
            (self._router.grad,) = torch.autograd.grad(weights, router, gradient)

    def _forward(
        self, inputs: Tensor, weights: Tensor, *, learns: bool
    ) -> list[tuple[Tensor, list[Tensor]]]:
        """Return the outputs of each part, and what they have gradients for."""

        def forward(part: _Part) -> tuple[Tensor, list[Tensor]]:
            leaves = [matrix.detach().to(self._dtype) for matrix in part.masters]
            leaves.append(weights.detach()[:, part.experts])
            gate, up, down, mine = (leaf.requires_grad_(learns) for leaf in leaves)
            with torch.set_grad_enabled(learns):
                return routed_ffn(inputs, gate, up, down, mine, part.num_shared), leaves

        return self._each(forward, self._parts)

    def split(self) -> SplitFfn:
        """Return the split with the matrices as they are now."""
        gate, up, down = (torch.empty_like(matrix) for matrix in self._start.weights)
        for part in self._parts:
            for whole, master in zip((gate, up, down), part.masters, strict=True):
                whole[part.rows] = master
        routing = replace(self._start.routing, router=self._router)
        partition = self._start.partition
        return SplitFfn(partition, routing, gate, up, down.T.contiguous(), fitted=True)


def _squares(sample: FfnSample, outputs: Float[Tensor, "tokens hidden"]) -> float:
    """Return Σ ω·‖output‖²."""
    return float(sample.token_weights @ outputs.square().sum(1))


def adam(
    groups: list[list[Tensor]], rate: float, num_steps: int
) -> tuple[torch.optim.Adam, torch.optim.lr_scheduler.LambdaLR]:
    """Return an optimizer whose rate is `rate` times each group's root mean square now.

    The schedule is a warm-up of 5% and half a cosine to 0.
    """
    rated = []
    for tensors in groups:
        size = torch.cat([tensor.detach().flatten() for tensor in tensors]).square().mean().sqrt()
        rated.append({"params": tensors, "lr": rate * float(size)})
    optimizer = torch.optim.Adam(rated, betas=_BETAS, fused=True)
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
