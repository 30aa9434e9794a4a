"""An implementation of transformers' expert layers that is fast on a CPU.

Transformers' own are written for accelerators. On a CPU, decoding one token, `eager` spends its
time on finding out which token goes where, `grouped_mm` calls a matrix product for every expert,
chosen or not, and `batched_mm` copies the chosen experts' weights. Here each chosen expert is
multiplied where it lies. Use it with

    from moefy.evaluation.experts import register
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


def expert_views(
    experts: Any,
    hidden_states: Float[Tensor, "tokens hidden"],
    top_k_index: Int[Tensor, "tokens active"],
    top_k_weights: Float[Tensor, "tokens active"],
) -> Float[Tensor, "tokens hidden"]:
    """Return Σ_i w_i · down_e(act(gate_e(x)) · up_e(x)), e the i-th expert chosen for x.

    Differentiable. Works for every architecture that moefy writes.

    Args:
        experts: transformers' module with `gate_up_proj` [experts, 2·size, hidden] and `down_proj`
            [experts, hidden, size].
        hidden_states: x.
        top_k_index: e.
        top_k_weights: w.

    Raises:
        ArchitectureError: the experts have biases, another layout, no gate, or lie on several
            devices.
    """
    if (
        experts.has_bias
        or experts.is_transposed
        or not experts.has_gate
        or experts.has_post_expert_norm
        or experts._is_expert_parallel
    ):
        raise ArchitectureError(
            f"{type(experts).__name__} has biases, transposed weights, no gate, a norm behind it "
            f"or experts on several devices, which {NAME} does not compute: choose "
            "experts_implementation='grouped_mm'"
        )
    compute = _one_token if len(hidden_states) == 1 else _many_tokens
    return compute(experts, hidden_states, top_k_index, top_k_weights)


def _one_token(experts: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Few operations: 2 per expert, and the activations of all experts together."""
    gate_up, down = experts.gate_up_proj, experts.down_proj
    chosen = top_k_index[0].tolist()
    # torch's matrix-vector product is the faster one in float32 only
    vectors = x.dtype == torch.float32
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


def _many_tokens(experts: Any, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """One product over all tokens of an expert, for the experts that have any."""
    num_tokens, active = top_k_index.shape
    choices = top_k_index.flatten()
    order = choices.argsort()
    counts = choices.bincount(minlength=experts.num_experts).tolist()
    parts = []
    for e, rows in enumerate(x[order // active].split(counts)):
        if len(rows):
            gated = experts._apply_gate(F.linear(rows, experts.gate_up_proj[e]))
            parts.append(F.linear(gated, experts.down_proj[e]))
    weighted = torch.cat(parts) * top_k_weights.flatten()[order, None]
    back = order.argsort()
    return weighted[back].view(num_tokens, active, -1).sum(1).to(x.dtype)
