"""What the routers of a native MoE did in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from moefy.checkpoint.targets import TARGETS
from moefy.experts.balance import RouterSums, router_sums
from moefy.experts.hooks import ForwardHooks
from moefy.experts.noisy_gate import NoisyGate, choose


def routers_of(model: Any) -> list[Any]:
    """Return the router module of every layer; none for a dense model."""
    blocks = [getattr(layer, "block_sparse_moe", None) or layer.mlp for layer in model.model.layers]
    routers = [getattr(block, "router", None) or getattr(block, "gate", None) for block in blocks]
    return [router for router in routers if router is not None]


class _Routed(NamedTuple):
    """One router's last pass; `choice_probs` with noise alone."""

    logits: Tensor  # [tokens, experts]
    weights: Tensor  # [tokens, active]
    chosen: Tensor  # [tokens, active]
    choice_probs: Tensor | None  # [tokens, experts]


class RouterTrace(ForwardHooks):
    """Collects what every router did in the forward passes inside a `with` block.

    Works with gradient checkpointing: when a layer is computed again in the backward pass, the hook
    does the same operations and notes nothing.

    Args:
        model: mixtral, granitemoe(shared), qwen3_moe or glm4_moe; a dense model leaves no trace.
        noise: adds the noisy gate's noise to the logits of routers in training mode. The experts
            that run are then those that the noisy logits choose.
    """

    def __init__(self, model: Any, *, noise: NoisyGate | None = None) -> None:
        super().__init__()
        self._routers = routers_of(model)
        self._score = TARGETS[model.config.model_type].score if self._routers else "softmax"
        self._noise = noise
        self._routed: dict[int, _Routed] = {}

    def hooks(self) -> Iterable[tuple[Any, Callable[..., Any]]]:
        """Return the routers, each with its hook."""
        return [(router, self._hook(idx)) for idx, router in enumerate(self._routers)]

    def clear(self) -> None:
        """Forget the last forward pass; to be called before the next."""
        self._routed.clear()

    def runs(self) -> Bool[Tensor, "layers tokens experts"]:
        """Return which experts ran for which token in the last pass."""
        logits, _, chosen, _ = self._stacked()
        return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, chosen, True)

    def sums(self, mask: Bool[Tensor, "batch sequence"] | None = None) -> RouterSums | None:
        """Return the last pass's sums over tokens, with gradients; None for a dense model.

        Args:
            mask: True for the tokens that count, as `attention_mask.bool()`; None if all do.
        """
        if not self._routed:
            return None
        logits, weights, chosen, probs = self._stacked()
        tokens = None if mask is None else mask.reshape(-1)
        return router_sums(
            logits, weights, chosen, score=self._score, mask=tokens, choice_probs=probs
        )

    def _stacked(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return what was noted, layers first; a backward pass notes them in another order."""
        logits, weights, chosen, probs = zip(
            *(self._routed[layer_idx] for layer_idx in sorted(self._routed)), strict=True
        )
        noisy = None if probs[0] is None else torch.stack(probs)
        return torch.stack(logits), torch.stack(weights), torch.stack(chosen), noisy

    def _hook(self, layer_idx: int) -> Callable[..., tuple[Tensor, ...] | None]:
        def note(
            router: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor, Tensor]
        ) -> tuple[Tensor, ...] | None:
            logits, weights, chosen = outputs
            probs = None
            is_noisy = self._noise is not None and router.training
            if self._noise is not None and is_noisy:
                hidden = inputs[0].reshape(-1, inputs[0].shape[-1])  # [tokens, hidden]
                logits, probs = self._noise.noisy(layer_idx, router, hidden, logits)
                weights, chosen = choose(router, logits, self._score)
                weights = weights.to(outputs[1].dtype)
            # a layer that is computed again for the backward pass must not be counted again
            self._routed.setdefault(layer_idx, _Routed(logits, weights, chosen, probs))
            return (logits, weights, chosen) if is_noisy else None

        return torch.compiler.disable(note)  # or every layer would be compiled by itself
