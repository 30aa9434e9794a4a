"""Two implementations of transformers' expert layers.

`lean` keeps little for the backward pass. `grouped_mm` keeps, of every token, a copy of its hidden
state for each expert that was chosen, and each expert's output: with 32 of 64 experts chosen that
is 64 hidden states a token and layer. Kept here are the hidden states once, the products with the
gate and up matrices (which are narrow where experts are small), the weights and the choice. The
copies are gathered again in the backward pass; no product is computed twice.

`expert_views` decodes faster on a CPU. For one token there, transformers' `eager` spends its time
on finding out which token goes where, `grouped_mm` calls a matrix product for every expert, chosen
or not, and `batched_mm` copies the chosen experts' weights. Here each chosen expert is multiplied
where it lies. Use it with

    from moefy.experts.layers import VIEWS, register
    model = AutoModelForCausalLM.from_pretrained(FOLDER, experts_implementation=register(VIEWS))
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from moefy.errors import ArchitectureError

LEAN, VIEWS = "lean", "expert_views"
_ROUND_ROWS = 32
"""In bfloat16 on a CPU every expert gets a multiple of so many rows. oneDNN compiles a product for
every shape that it meets, and routing would give it new ones in every step."""


def register(name: str = LEAN) -> str:
    """Make both implementations known to transformers; return the name to ask for one."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    # torch.compile cannot see through the gradient inside the backward pass
    ALL_EXPERTS_FUNCTIONS.register(LEAN, torch.compiler.disable(lean_experts))
    ALL_EXPERTS_FUNCTIONS.register(VIEWS, expert_views)
    return name


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

    It must be `is_plain`, with rows of a multiple of 16 bytes, which torch's grouped product wants.
    """
    weight = experts.gate_up_proj
    widths = weight.shape[1:] + experts.down_proj.shape[2:]
    # torch's grouped product does not know GPUs before NVIDIA's Ampere
    if weight.device.type == "cuda" and torch.cuda.get_device_capability(weight.device) < (8, 0):
        return False
    return is_plain(experts) and all(width % 8 == 0 for width in widths)


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
    if not can_run(experts):
        loop = type(experts).forward.__wrapped__
        return loop(experts, hidden_states, top_k_index, top_k_weights)
    # stable, so that an expert's rows, and with them its sums, are always in the same order
    chosen, order = top_k_index.reshape(-1).sort(stable=True)
    experts_at = torch.arange(experts.num_experts + 1, device=chosen.device)
    starts = torch.searchsorted(chosen, experts_at)
    rows, ends = torch.arange(len(order), device=order.device), starts[1:]
    tokens, weights = order // top_k_index.shape[1], top_k_weights.reshape(-1)[order]
    is_real = not isinstance(hidden_states, FakeTensor)  # which has no numbers to count
    on_cpu = hidden_states.device.type == "cpu"
    if is_real and on_cpu and _computes_in(hidden_states) == torch.bfloat16:
        counts = starts.diff()
        rounded = -(counts // -_ROUND_ROWS) * _ROUND_ROWS
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
        return out[places].sum(1).to(hidden.dtype)

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
            hidden_grad = hidden_grad[places].sum(1)  # always in the same order
        return hidden_grad.to(hidden.dtype), gate_up_grad, down_grad, weights_grad, *[None] * 4


def expert_views(
    experts: Any,
    hidden_states: Float[Tensor, "tokens hidden"],
    top_k_index: Int[Tensor, "tokens active"],
    top_k_weights: Float[Tensor, "tokens active"],
) -> Float[Tensor, "tokens hidden"]:
    """Return Σ_i w_i · down_e(act(gate_e(x)) · up_e(x)), e the i-th expert chosen for x.

    Differentiable. Works for every architecture that moefy writes. The arguments are those of
    `lean_experts`.

    Raises:
        ArchitectureError: the experts have biases, another layout, no gate, or lie on several
            devices.
    """
    if not is_plain(experts):
        raise ArchitectureError(
            f"{type(experts).__name__} has biases, transposed weights, no gate, a norm behind it "
            f"or experts on several devices, which {VIEWS} does not compute: choose "
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
