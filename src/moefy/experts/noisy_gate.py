"""The noisy gate of the sparsely-gated MoE, as a part of training that never leaves it.

Source: Shazeer et al. (arXiv 1701.06538), section 2.1 and appendix A; LLaMA-MoE (arXiv 2406.16554)
trains with it. The matrices that learn the noise belong to the trainer's state; a native router
stays as it is on disk and routes without noise at inference.

At the start W_noise = 0, so the noise has the standard deviation ln 2 + 0.01 = 0.70 in every logit.
The logits that `convert` fits differ by about 0.01 only: they need a smaller `scale`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from moefy.checkpoint.targets import RouterScore
from moefy.errors import ArchitectureError

_LEAST_STD = 1e-2
_EDGE = 1e-6


class NoisyGate(nn.Module):
    """W_noise of every router; `RouterTrace` puts it to work.

    Args:
        routers: router modules, layer by layer.
        scale: factor on the noise. 1 is the papers'; for other routers, about the standard
            deviation of their logits over the experts.

    Raises:
        ArchitectureError: a router chooses groups of experts first; moefy writes none such.
    """

    def __init__(self, routers: list[Any], *, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        for router in routers:
            if getattr(router, "num_group", 1) != 1:
                raise ArchitectureError(
                    f"the router chooses among {router.num_group} groups of experts, and the noisy "
                    "gate knows no groups: choose another balance, or n_group 1"
                )
        self.noise = nn.ParameterList(
            torch.zeros(router.weight.shape, dtype=router.weight.dtype, device=router.weight.device)
            for router in routers
        )

    def std(
        self, layer_idx: int, inputs: Float[Tensor, "tokens hidden"]
    ) -> Float[Tensor, "tokens experts"]:
        """Return the standard deviation of each logit's noise, softplus(x·W_noise) + 1e-2."""
        raw = F.linear(inputs, self.noise[layer_idx].to(inputs.dtype))
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return self.scale * (F.softplus(raw) + _LEAST_STD)

    def noisy(
        self,
        layer_idx: int,
        router: Any,
        inputs: Float[Tensor, "tokens hidden"],
        clean: Float[Tensor, "tokens experts"],
    ) -> tuple[Float[Tensor, "tokens experts"], Float[Tensor, "tokens experts"]]:
        """Return noisy logits and the probability that each expert is chosen."""
        std = self.std(layer_idx, inputs)
        clean = clean.to(std.dtype)
        noisy = clean + torch.randn_like(clean) * std
        bias = getattr(router, "e_score_correction_bias", None)
        probs = choice_probs(clean, noisy, std, active=router.top_k, selection_bias=bias)
        return noisy, probs


def choose(
    router: Any, logits: Float[Tensor, "tokens experts"], score: RouterScore
) -> tuple[Float[Tensor, "tokens active"], Int[Tensor, "tokens active"]]:
    """Return weights and indices of the k experts that a native router chooses for given logits.

    The router module, of any target, is asked for its settings alone.
    """
    probs = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    by = logits if score == "softmax" else probs + getattr(router, "e_score_correction_bias", 0.0)
    chosen = by.topk(router.top_k, dim=-1).indices
    if score == "softmax" and getattr(router, "norm_topk_prob", True):
        return logits.gather(-1, chosen).softmax(-1), chosen
    weights = probs.gather(-1, chosen)
    if getattr(router, "norm_topk_prob", False):
        weights = weights / weights.sum(-1, keepdim=True)
    return weights * getattr(router, "routed_scaling_factor", 1.0), chosen


def choice_probs(
    clean: Float[Tensor, "tokens experts"],
    noisy: Float[Tensor, "tokens experts"],
    std: Float[Tensor, "tokens experts"],
    *,
    active: int,
    selection_bias: Float[Tensor, " experts"] | None = None,
) -> Float[Tensor, "tokens experts"]:
    """Return the probability that each expert is chosen if only its own noise is drawn again.

    P_e = Φ((clean_e - t_e) / std_e), with t_e the k-th largest of the *other* experts' noisy
    logits, which e has to exceed; k is `active`. (LLaMA-MoE's code takes the threshold from the
    noise instead.) A sigmoid router chooses by sigmoid(logit) + `selection_bias`.
    """
    if active == clean.shape[-1]:
        return torch.ones_like(clean)
    by = noisy if selection_bias is None else noisy.sigmoid() + selection_bias
    # the k-th largest of the others is the (k+1)-th of all for an expert that is chosen itself
    top = by.topk(active + 1, dim=-1).values
    kth, next_one = top[:, -2:-1], top[:, -1:]
    threshold = torch.where(by >= kth, next_one, kth)
    if selection_bias is not None:
        # back from scores to logits; outside (0, 1) the choice is certain
        threshold = (threshold - selection_bias).clamp(_EDGE, 1 - _EDGE).logit()
    return torch.special.ndtr((clean - threshold) / std)
