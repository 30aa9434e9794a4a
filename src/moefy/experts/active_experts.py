"""A model in memory that chooses another number of experts than it was saved with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from moefy.checkpoint.targets import TARGETS
from moefy.experts.hooks import ForwardHooks
from moefy.experts.router_trace import routers_of


class ActiveExperts(ForwardHooks):
    """Lets every router choose k experts inside a `with` block, each with the weight it always has.

    Routers whose weights are made to sum to a constant would give an expert another weight as soon
    as k changes, and a conversion has folded that constant for the k it was saved with into
    `down_proj`. Here the weight of a chosen expert is

        w_e = c·p_e / Σ_{f in T} p_f

    with p the softmax (or sigmoid) of the logits, c the constant, and T the experts that would be
    chosen with the saved k. So fewer experts are the saved model with some outputs left out, and
    more are the saved model with some added. Routers that do not normalise (moefy's glm4_moe) need
    nothing. With the saved k nothing is touched.

    Args:
        model: mixtral, granitemoe (shared, SWA), qwen3_moe or glm4_moe.
        active: k.
    """

    def __init__(self, model: Any, active: int) -> None:
        super().__init__()
        self._routers = routers_of(model)
        self._is_softmax = TARGETS[model.config.model_type].score == "softmax"
        self._saved: int = model.config.num_experts_per_tok
        self._active = active

    def hooks(self) -> Iterable[tuple[Any, Callable[..., Any]]]:
        """Return the routers whose weights depend on k."""
        if self._active == self._saved:
            return []
        # without the attribute, transformers' softmax routers normalise and sigmoid ones do not
        default = self._is_softmax
        routers = (r for r in self._routers if getattr(r, "norm_topk_prob", default))
        return [(router, self._keep_weights) for router in routers]

    def begin(self) -> None:
        """Choose k experts."""
        for router in self._routers:
            router.top_k = self._active

    def end(self) -> None:
        """Choose as many as the model was saved with."""
        for router in self._routers:
            router.top_k = self._saved

    def _keep_weights(
        self, router: Any, _: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Multiply the weights, which were normalised over the chosen, by Σ_chosen p / Σ_T p."""
        logits, weights, chosen = outputs
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        probs = exact.softmax(-1) if self._is_softmax else exact.sigmoid()
        # a selection bias shifts the choice and not the weights
        usual = (probs + getattr(router, "e_score_correction_bias", 0.0)).topk(self._saved).indices
        sums = [probs.gather(-1, experts).sum(-1, keepdim=True) for experts in (chosen, usual)]
        return logits, (weights * (sums[0] / sums[1])).to(weights.dtype), chosen
