"""Keeping the experts evenly used."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor


def expert_load(
    chosen: Int[Tensor, "tokens active"], num_experts: int
) -> Float[Tensor, " experts"]:
    """Return each expert's share of all choices; the shares sum to 1."""
    counts = torch.bincount(chosen.reshape(-1), minlength=num_experts)
    return counts.float() / chosen.numel()


def switch_balance_loss(
    router_logits: Float[Tensor, "tokens experts"], chosen: Int[Tensor, "tokens active"]
) -> Float[Tensor, ""]:
    """Return one layer's load-balancing loss: 1 when the experts are used evenly.

    Source: Switch Transformer (arXiv 2101.03961), equations 4-6: L = E·Σ_e f_e·P_e, with f_e the
    share of choices that fall on expert e and P_e the mean over tokens of its softmax probability.
    Deviation: f_e counts all k choices of a token and is divided by k, so that Σ f_e = 1 for any k.
    transformers' own `load_balancing_loss_func` pools the tokens of all layers before multiplying,
    which lets one layer's imbalance cancel another's; here every layer counts by itself.

    Args:
        router_logits: of one layer.
        chosen: indices of the k chosen experts.
    """
    num_experts = router_logits.shape[-1]
    probs = router_logits.float().softmax(-1).mean(0)
    return num_experts * (expert_load(chosen, num_experts) * probs).sum()


def routers_of(model: Any) -> list[Any]:
    """Return the router module of every layer; none for a dense model."""
    blocks = [getattr(layer, "block_sparse_moe", None) or layer.mlp for layer in model.model.layers]
    routers = [getattr(block, "router", None) or getattr(block, "gate", None) for block in blocks]
    return [router for router in routers if router is not None]


class RouterTrace:
    """Collects what every router of a model did in the forward passes inside a `with` block.

    Attributes:
        logits: one tensor [tokens, experts] per layer of the last forward pass.
        chosen: one tensor [tokens, active] per layer.
    """

    def __init__(self, model: Any) -> None:
        self._routers = routers_of(model)
        self._handles: list[Any] = []
        self.logits: list[Tensor] = []
        self.chosen: list[Tensor] = []

    def __enter__(self) -> RouterTrace:
        self._handles = [router.register_forward_hook(self._note) for router in self._routers]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def clear(self) -> None:
        """Forget the last forward pass."""
        self.logits, self.chosen = [], []

    def _note(self, _router: Any, _inputs: Any, outputs: tuple[Tensor, Tensor, Tensor]) -> None:
        logits, _, chosen = outputs
        self.logits.append(logits)
        self.chosen.append(chosen)

    def balance_loss(self) -> Tensor:
        """Return the mean of the layers' `switch_balance_loss`; 0 for a dense model."""
        if not self.logits:
            return torch.zeros(())
        pairs = zip(self.logits, self.chosen, strict=True)
        return torch.stack([switch_balance_loss(logits, chosen) for logits, chosen in pairs]).mean()

    def loads(self) -> Float[Tensor, "layers experts"]:
        """Return each layer's `expert_load`; shape [0, 0] for a dense model."""
        if not self.logits:
            return torch.zeros(0, 0)
        pairs = zip(self.logits, self.chosen, strict=True)
        return torch.stack([expert_load(chosen, logits.shape[-1]) for logits, chosen in pairs])
