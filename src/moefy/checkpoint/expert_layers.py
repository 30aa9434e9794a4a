"""`lean`, an implementation of transformers' expert layers for training and answering.

In training it keeps little for the backward pass. transformers' `grouped_mm` keeps, of every token,
a copy of its hidden state for each expert that was chosen, and each expert's output: with 32 of 64
experts chosen that is 64 hidden states a token and layer. Kept here are the hidden states once, the
products with the gate and up matrices (which are narrow where experts are small), the weights and
the choice. The copies are gathered again in the backward pass; no product is computed twice.

For one token without gradients on a CPU, each chosen expert is multiplied where it lies. There
`eager` spends its time on finding out which token goes where, `grouped_mm` calls a product for
every expert, chosen or not, and `batched_mm` copies the chosen experts' weights. moefy loads its
models with it; so does

    from moefy.checkpoint.expert_layers import register
    model = AutoModelForCausalLM.from_pretrained(FOLDER, experts_implementation=register())
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

LEAN = "lean"
_ROUND_ROWS = 32
"""In 16 bits on a CPU every expert gets a multiple of so many rows in training, of half of it in
answering, where fewer shapes come. oneDNN compiles a product for every shape that it meets, and
routing would give it new ones in every step."""


def register() -> str:
    """Make the implementation known to transformers, and return its name there."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    # torch.compile cannot see through the gradient inside the backward pass
    ALL_EXPERTS_FUNCTIONS.register(LEAN, torch.compiler.disable(lean_experts))
    return LEAN


def is_plain(experts: Any) -> bool:
    """Say whether experts are gated, in rows, without biases or norms, all on one device."""
    return (
        experts.has_gate
        and not experts.has_bias
        and not experts.is_transposed
        and not experts.has_post_expert_norm
        and not experts._is_expert_parallel
    )


def can_run(experts: Any) -> bool:
    """Say whether `lean` computes a module of experts.

    It must be `is_plain`, not in float64, and with rows of a multiple of 16 bytes: torch's grouped
    product wants that.
    """
    weight = experts.gate_up_proj
    widths = weight.shape[1:] + experts.down_proj.shape[2:]
    # torch's grouped product does not know GPUs before NVIDIA's Ampere
    if weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    fits = weight.dtype != torch.float64 and all(width % 8 == 0 for width in widths)
    return fits and is_plain(experts)


def lean_experts(
    experts: Any,
    hidden_states: Float[Tensor, "tokens hidden"],
    top_k_index: Int[Tensor, "tokens active"],
    top_k_weights: Float[Tensor, "tokens active"],
) -> Float[Tensor, "tokens hidden"]:
    """Return Σ_i w_i · down_e(act(gate_e(x)) · up_e(x)), e the i-th expert chosen for x.

    What `can_run` refuses is left to transformers: experts on several processes to `grouped_mm`,
    which knows which tokens are elsewhere, the rest to the module's own loop.

    Args:
        experts: transformers' module with `gate_up_proj` [experts, 2·size, hidden] and `down_proj`
            [experts, hidden, size].
        hidden_states: x.
        top_k_index: e.
        top_k_weights: w.
    """
    if experts._is_expert_parallel:
        from transformers.integrations.moe import grouped_mm_experts_forward

        return grouped_mm_experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    is_real = not isinstance(hidden_states, FakeTensor)  # which has no numbers to count
    if is_real and _decodes(experts, hidden_states):
        weights = top_k_weights[0, :, None]
        return _decode(experts, hidden_states, top_k_index[0].tolist(), weights)
    if not can_run(experts):
        loop = type(experts).forward.__wrapped__
        return loop(experts, hidden_states, top_k_index, top_k_weights)
    # stable, so that an expert's rows, and with them its sums, are always in the same order
    chosen, order = top_k_index.reshape(-1).sort(stable=True)
    experts_at = torch.arange(experts.num_experts + 1, device=chosen.device)
    starts = torch.searchsorted(chosen, experts_at)
    rows, ends = torch.arange(len(order), device=order.device), starts[1:]
    tokens, weights = order // top_k_index.shape[1], top_k_weights.reshape(-1)[order]
    on_cpu = hidden_states.device.type == "cpu"
    if is_real and on_cpu and _computes_in(hidden_states).itemsize == 2:
        counts = starts.diff()
        multiple = _ROUND_ROWS if torch.is_grad_enabled() else _ROUND_ROWS // 2
        rounded = -(counts // -multiple) * multiple
        rows += (rounded - counts).cumsum(0)[chosen]  # the empty ones come first
        ends = rounded.cumsum(0)
        num_rows = int(ends[-1])
        tokens = tokens.new_zeros(num_rows).scatter_(0, rows, tokens)
        weights = weights.new_zeros(num_rows).scatter(0, rows, weights)
    places = torch.empty_like(order).scatter_(0, order, rows)
    return _Experts.apply(
        hidden_states,
        experts.gate_up_proj,
        experts.down_proj,
        weights,
        tokens,
        places.view(top_k_index.shape),
        ends.int(),
        experts._apply_gate,
    )


def _computes_in(hidden: Tensor) -> torch.dtype:
    kind = hidden.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype


class _Experts(torch.autograd.Function):
    """Rows are pairs of a token and an expert, sorted by expert.

    `tokens` says whose each row is, `places` where each token's rows are. A padding row has the
    weight 0, so that it adds nothing, forward or backward.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        gate_up: Tensor,
        down: Tensor,
        weights: Tensor,
        tokens: Tensor,
        places: Tensor,
        offsets: Tensor,
        apply_gate: Any,
    ) -> Tensor:
        dtype = _computes_in(hidden)
        with torch.autocast(hidden.device.type, enabled=False):
            rows = hidden.to(dtype)[tokens]
            products = F.grouped_mm(rows, gate_up.to(dtype).mT, offs=offsets)
            gated = apply_gate(products) * weights[:, None].to(dtype)
            out = F.grouped_mm(gated, down.to(dtype).mT, offs=offsets)
        # neither the gathered rows nor the experts' outputs are kept
        ctx.save_for_backward(hidden, gate_up, down, weights, tokens, places, offsets, products)
        ctx.apply_gate, ctx.dtype = apply_gate, dtype
        return F.embedding_bag(places, out, mode="sum").to(hidden.dtype)  # a sum of rows

    @staticmethod
    def backward(ctx: Any, out_grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, gate_up, down, weights, tokens, places, offsets, products = ctx.saved_tensors
        dtype = ctx.dtype
        with torch.autocast(hidden.device.type, enabled=False):
            row_weights = weights[:, None].to(dtype)
            with torch.enable_grad():  # the activation is cheap, and may be any function
                products = products.detach().requires_grad_()
                ungated = ctx.apply_gate(products)
            rows_grad = out_grad.to(dtype)[tokens]
            # [rows, size], then [experts, hidden, size]
            gated_grad = F.grouped_mm(rows_grad, down.to(dtype), offs=offsets)
            gated = (ungated.detach() * row_weights).to(dtype)
            gate_up_grad = down_grad = None  # frozen weights need none
            if ctx.needs_input_grad[2]:
                down_grad = F.grouped_mm(rows_grad.T, gated, offs=offsets).to(down.dtype)
            del rows_grad
            weights_grad = (gated_grad * ungated.detach()).sum(-1).to(weights.dtype)
            (products_grad,) = torch.autograd.grad(ungated, products, gated_grad * row_weights)
            if ctx.needs_input_grad[1]:
                rows = hidden.to(dtype)[tokens]
                gate_up_grad = F.grouped_mm(products_grad.T, rows, offs=offsets).to(gate_up.dtype)
                del rows
            hidden_grad = F.grouped_mm(products_grad, gate_up.to(dtype), offs=offsets)
            # always in the same order
            hidden_grad = F.embedding_bag(places, hidden_grad, mode="sum")
        return hidden_grad.to(hidden.dtype), gate_up_grad, down_grad, weights_grad, *[None] * 4


def _decodes(experts: Any, hidden: Tensor) -> bool:
    """Say whether it is one token on a CPU, nothing is trained and no product in another type."""
    idle = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
    alone = len(hidden) == 1 and hidden.device.type == "cpu"
    return alone and idle and is_plain(experts) and hidden.dtype == experts.gate_up_proj.dtype


def _decode(experts: Any, x: Tensor, chosen: list[int], weights: Tensor) -> Tensor:
    """Compute `lean_experts` for one token, each chosen expert where it lies."""
    gate_up, down = experts.gate_up_proj, experts.down_proj
    # torch's product of a matrix and a vector is the faster one in float32 only
    vectors = x.dtype == torch.float32
    # [active, 2·size]
    if vectors:
        products = torch.stack([torch.mv(gate_up[e], x[0]) for e in chosen])
    else:
        products = torch.cat([F.linear(x, gate_up[e]) for e in chosen])
    gated = (experts._apply_gate(products) * weights).to(x.dtype)
    if not vectors:
        # faster than with the vector on the left: oneDNN then leaves the matrix as it lies
        columns = gated.mT.split(1, dim=1)
        parts = [torch.mm(down[e], g) for g, e in zip(columns, chosen, strict=True)]
        return torch.cat(parts, dim=1).sum(1)[None]
    out = torch.mv(down[chosen[0]], gated[0])
    for g, e in zip(gated[1:], chosen[1:], strict=True):
        out = out.addmv_(down[e], g)
    return out[None]
