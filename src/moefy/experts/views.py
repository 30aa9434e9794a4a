"""An implementation of transformers' expert layers that decodes faster on a CPU.

For one token on a CPU, transformers' `eager` spends its time on finding out which token goes where,
`grouped_mm` calls a matrix product for every expert, chosen or not, and `batched_mm` copies the
chosen experts' weights. Here each chosen expert is multiplied where it lies. Use it with

    from moefy.experts.views import register
    model = AutoModelForCausalLM.from_pretrained(FOLDER, experts_implementation=register())
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moefy.errors import ArchitectureError

NAME = "expert_views"


def register() -> str:
    """Make `expert_views` known to transformers; return the name to ask for it."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, expert_views)
    return NAME


def is_plain(experts: Any) -> bool:
    """Say whether experts are gated, in rows, without biases or norms, all on one device."""
    return (
        experts.has_gate
        and not experts.has_bias
        and not experts.is_transposed
        and not experts.has_post_expert_norm
        and not experts._is_expert_parallel
    )


def expert_views(
    experts: Any,
    hidden_states: Float[Tensor, "tokens hidden"],
    top_k_index: Int[Tensor, "tokens active"],
    top_k_weights: Float[Tensor, "tokens active"],
) -> Float[Tensor, "tokens hidden"]:
    """Return Σ_i w_i · down_e(act(gate_e(x)) · up_e(x)), e the i-th expert chosen for x.

    Differentiable. Works for every architecture that moefy writes. The arguments are those of
    `lean.lean_experts`.

    Raises:
        ArchitectureError: the experts have biases, another layout, no gate, or lie on several
            devices.
    """
    if not is_plain(experts):
        raise ArchitectureError(
            f"{type(experts).__name__} has biases, transposed weights, no gate, a norm behind it "
            f"or experts on several devices, which {NAME} does not compute: choose "
            "experts_implementation='grouped_mm'"
        )
    from transformers.integrations.moe import grouped_mm_experts_forward

    if len(hidden_states) > 1:  # as fast there
        return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    gate_up, down, x = experts.gate_up_proj, experts.down_proj, hidden_states
    chosen = top_k_index[0].tolist()
    # torch's product of a matrix and a vector is the faster one in float32 only
    vectors = x.dtype == torch.float32
    # [active, 2·size]
    if vectors:
        products = torch.stack([torch.mv(gate_up[e], x[0]) for e in chosen])
    else:
        products = torch.cat([F.linear(x, gate_up[e]) for e in chosen])
    gated = (experts._apply_gate(products) * top_k_weights[0, :, None]).to(x.dtype)
    if not vectors:
        parts = [F.linear(g, down[e]) for g, e in zip(gated.split(1), chosen, strict=True)]
        return torch.cat(parts).sum(0, keepdim=True)
    out = torch.mv(down[chosen[0]], gated[0])
    for g, e in zip(gated[1:], chosen[1:], strict=True):
        out = out.addmv_(down[e], g)
    return out[None]
