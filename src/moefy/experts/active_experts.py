"""A model in memory that chooses another number of experts than it was saved with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefy.checkpoint.targets import TARGETS, RouterScore
from moefy.experts.hooks import ForwardHooks
from moefy.experts.router_trace import routers_of

Self = TypeVar("Self", bound="ActiveExperts")  # see `training.hooks`


class ActiveExperts(ForwardHooks):
    """Lets every router choose k experts inside a `with` block, each with the weight it always has.

    Routers whose weights are made to sum to a constant would give an expert another weight as soon
    as k changes, and a conversion has folded that constant for the k it was saved with into
    `down_proj`. Here the weight of a chosen expert is

        w_e = c·p_e / Σ_{f in T} p_f

    with p the softmax (or sigmoid) of the logits, c the constant, and T the experts that would be
    chosen with the saved k. So fewer experts are the saved model with some outputs left out, and
    more are the saved model with some added. Where the logits are nearly equal, as a conversion
    leaves them, w_e is c / saved k whatever k is. Routers that do not normalise (moefy's glm4_moe)
    need nothing. With the saved k nothing is touched.

    Args:
        model: mixtral, granitemoe (shared, SWA), qwen3_moe or glm4_moe.
        active: k.
    """

    def __init__(self, model: Any, active: int) -> None:
        super().__init__()
        self._routers = routers_of(model)
        self._score: RouterScore = TARGETS[model.config.model_type].score
        self._saved: int = model.config.num_experts_per_tok
        self._active = active

    def hooks(self) -> Iterable[tuple[Any, Callable[..., Any]]]:
        """Return the routers whose weights depend on k."""
        if self._active == self._saved:
            return []
        default = self._score == "softmax"
        return [
            (router, self._keep_weights)
            for router in self._routers
            if getattr(router, "norm_topk_prob", default)
        ]

    def __enter__(self: Self) -> Self:
        self._choose(self._active)
        return super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._choose(self._saved)

    def _choose(self, active: int) -> None:
        for router in self._routers:
            router.top_k = active

    def _keep_weights(
        self, router: Any, _: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, chosen = outputs
        bias = getattr(router, "e_score_correction_bias", None)
        factor = weight_factor(logits, chosen, saved=self._saved, score=self._score, bias=bias)
        return logits, (weights * factor).to(weights.dtype), chosen


def weight_factor(
    logits: Float[Tensor, "tokens experts"],
    chosen: Int[Tensor, "tokens active"],
    *,
    saved: int,
    score: RouterScore,
    bias: Float[Tensor, " experts"] | None = None,
) -> Float[Tensor, "tokens 1"]:
    """Return Σ_{e chosen} p_e / Σ_{f in T} p_f, T the experts with the `saved` largest p_f + b_f.

    Args:
        logits: of the router.
        chosen: experts over which the router's weights are normalised.
        saved: experts over which they should be.
        score: p is the softmax or the sigmoid of the logits.
        bias: b, shifts the choice alone.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    probs = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    usual = (probs if bias is None else probs + bias).topk(saved, dim=-1).indices
    sums = [probs.gather(-1, experts).sum(-1, keepdim=True) for experts in (chosen, usual)]
    return sums[0] / sums[1]
