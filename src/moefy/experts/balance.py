"""Keeping the experts evenly used: losses on what the routers did.

Every loss is a function of a few sums over tokens (`RouterSums`), which can be added over passes
and over workers. Over workers all losses are exact, with `over_workers`. Over the passes of one
step `router_z_loss`, a mean over tokens, is exact; of the others the value is exact, and the
gradient of a pass knows the passes before it and not those after it.

A step of P passes adds p/P times the loss of the sums up to pass p, for p = 1 … P. Where the passes
are alike, that is the gradient of the whole batch; in general it is nearer to it than the mean of
each pass's own loss, which forces every single pass to be even. (For the counts of the Switch loss
this is the buffer of arXiv 2501.11873.)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefy.checkpoint.targets import RouterScore


@dataclass(frozen=True)
class RouterSums:
    """Sums over tokens by layer and expert."""

    tokens: Float[Tensor, ""]
    choices: Float[Tensor, "layers experts"]  # how often each expert was chosen
    # the router's probabilities: softmax of the logits, or sigmoids divided by their sum
    probs: Float[Tensor, "layers experts"]
    importance: Float[Tensor, "layers experts"]  # weights with which outputs were added
    # probabilities that an expert is chosen when its own noise is drawn again; with no noise,
    # `choices`, which has no gradient
    load: Float[Tensor, "layers experts"]
    squared_logsumexp: Float[Tensor, " layers"]  # logsumexp(logits)²

    def __add__(self, other: RouterSums) -> RouterSums:
        return RouterSums(*map(torch.add, self._values(), other._values()))

    def detach(self) -> RouterSums:
        """Return the sums without gradients, as those of an earlier pass."""
        return RouterSums(*(value.detach() for value in self._values()))

    def over_workers(self, group: Any = None) -> RouterSums:
        """Return the sums over all data-parallel workers; gradients reach this worker's own part.

        The gradients of all workers then *sum* to that of the global batch. Where they are
        averaged, as DDP and FSDP do, multiply the loss by the number of workers. `group` is that of
        torch.distributed, None for all processes.
        """
        totals = []
        for value in self._values():
            # all_reduce has no gradient: the sum's value, with the gradient of the own part
            total = value.detach().clone()
            dist.all_reduce(total, group=group)
            totals.append(total + (value - value.detach()))
        return RouterSums(*totals)

    def shares(self) -> Float[Tensor, "layers experts"]:
        """Return each expert's share of its layer's choices; they sum to 1."""
        return self.choices / self.choices.sum(-1, keepdim=True)

    def _values(self) -> list[Tensor]:
        return [getattr(self, field.name) for field in fields(self)]


def router_sums(
    logits: Float[Tensor, "layers tokens experts"],
    weights: Float[Tensor, "layers tokens active"],
    chosen: Int[Tensor, "layers tokens active"],
    *,
    score: RouterScore,
    mask: Bool[Tensor, " tokens"] | None = None,
    choice_probs: Float[Tensor, "layers tokens experts"] | None = None,
) -> RouterSums:
    """Sum what the routers did over the tokens that count, those where `mask` is True.

    `choice_probs` are those of `noisy_gate.choice_probs`, None without noise.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    counted = logits.new_ones(logits.shape[1]) if mask is None else mask.to(logits.dtype)

    def summed(values: Float[Tensor, "layers tokens experts"]) -> Float[Tensor, "layers experts"]:
        return torch.einsum("lte,t->le", values, counted)

    if score == "softmax":
        probs = logits.softmax(-1)
    else:
        sigmoids = logits.sigmoid()
        probs = sigmoids / sigmoids.sum(-1, keepdim=True)
    nothing = torch.zeros_like(logits)
    choices = summed(nothing.scatter(-1, chosen, 1.0))
    return RouterSums(
        tokens=counted.sum(),
        choices=choices,
        probs=summed(probs),
        importance=summed(nothing.scatter(-1, chosen, weights.to(logits.dtype))),
        load=choices if choice_probs is None else summed(choice_probs.to(logits.dtype)),
        squared_logsumexp=logits.logsumexp(-1).square() @ counted,
    )


def squared_variation(values: Float[Tensor, "layers experts"]) -> Float[Tensor, " layers"]:
    """Return CV² = var / (mean² + 1e-10) over the experts, 0 where all are equal."""
    # these are all experts and no sample of them, so var divides by E
    return values.var(-1, correction=0) / (values.mean(-1).square() + 1e-10)


def importance_and_load_loss(sums: RouterSums) -> Float[Tensor, ""]:
    """Return the balance loss of the sparsely-gated MoE, summed over layers; 0 when even.

    Source: Shazeer et al. (arXiv 1701.06538), section 4 and appendix A, as used by LLaMA-MoE
    (arXiv 2406.16554): L = Σ_layers CV²(importance) + CV²(load), with importance_e = Σ_x G_e(x) and
    load_e = Σ_x P_e(x); P is `noisy_gate.choice_probs`. Both papers multiply L by 1e-2 or so.
    """
    return (squared_variation(sums.importance) + squared_variation(sums.load)).sum()


def switch_loss(sums: RouterSums) -> Float[Tensor, ""]:
    """Return the mean over layers of the Switch load-balancing loss; 1 when even, at most E / k.

    Source: Switch Transformer (arXiv 2101.03961), equations 4-6: L = E·Σ_e f_e·P_e, with f_e the
    share of choices that fall on expert e and P_e the mean over tokens of its probability. It is
    the auxiliary loss of mixtral, granitemoe and qwen3_moe. Deviations: f_e counts all k choices of
    a token and is divided by k, so that Σ f_e = 1 for any k; every layer counts by itself, where
    transformers' `load_balancing_loss_func` pools the tokens of all layers before multiplying,
    which lets one layer's imbalance cancel another's; sigmoid routers, for which transformers has
    no loss, take the P_e of DeepSeek-V3 (arXiv 2412.19437, equations 17-20).
    """
    num_experts = sums.probs.shape[-1]
    # f is a count and has no gradient; tokens may be 0 on a worker whose batch is all padding
    mean_probs = sums.probs / sums.tokens.clamp(min=1)
    return num_experts * (sums.shares().detach() * mean_probs).sum(-1).mean()


def router_z_loss(sums: RouterSums) -> Float[Tensor, ""]:
    """Return the mean over tokens and layers of logsumexp(logits)², which keeps logits small.

    Source: ST-MoE (arXiv 2202.08906), equation 5; its coefficient is 1e-3.
    """
    return (sums.squared_logsumexp / sums.tokens.clamp(min=1)).mean()
