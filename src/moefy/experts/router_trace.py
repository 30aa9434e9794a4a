"""What the routers of a native MoE did in a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from moefy.checkpoint.targets import TARGETS
from moefy.experts.balance import RouterSums, router_sums
from moefy.experts.hooks import ForwardHooks
from moefy.experts.noisy_gate import NoisyGate, choice_probs, choose


def routers_of(model: Any) -> list[Any]:
    """Return the router module of every layer; none for a dense model."""
    blocks = [getattr(layer, "block_sparse_moe", None) or layer.mlp for layer in model.model.layers]
    routers = [getattr(block, "router", None) or getattr(block, "gate", None) for block in blocks]
    return [router for router in routers if router is not None]


@dataclass(frozen=True)
class _Routed:
    """One router's last pass: what it chose by, how, and with noise also how surely."""

    logits: Float[Tensor, "tokens experts"]
    weights: Float[Tensor, "tokens active"]
    chosen: Int[Tensor, "tokens active"]
    choice_probs: Float[Tensor, "tokens experts"] | None


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
        layers = [self._routed[layer_idx] for layer_idx in sorted(self._routed)]
        return torch.stack(
            [
                torch.zeros_like(layer.logits, dtype=torch.bool).scatter_(-1, layer.chosen, True)
                for layer in layers
            ]
        )

    def sums(self, mask: Bool[Tensor, "batch sequence"] | None = None) -> RouterSums | None:
        """Return the last pass's sums over tokens, with gradients; None for a dense model.

        Args:
            mask: True for the tokens that count, as `attention_mask.bool()`; None if all do.
        """
        layers = [self._routed[layer_idx] for layer_idx in sorted(self._routed)]
        if not layers:
            return None
        probs = [layer.choice_probs for layer in layers if layer.choice_probs is not None]
        return router_sums(
            torch.stack([layer.logits for layer in layers]),
            torch.stack([layer.weights for layer in layers]),
            torch.stack([layer.chosen for layer in layers]),
            score=self._score,
            mask=None if mask is None else mask.reshape(-1),
            choice_probs=torch.stack(probs) if probs else None,
        )

    def _hook(self, layer_idx: int) -> Callable[..., tuple[Tensor, ...] | None]:
        def note(
            router: Any, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, Tensor, Tensor]
        ) -> tuple[Tensor, ...] | None:
            logits, weights, chosen = outputs
            probs = None
            is_noisy = self._noise is not None and router.training
            if is_noisy:
                hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
                logits, probs = self._noisy(layer_idx, router, hidden, logits)
                weights, chosen = choose(router, logits, self._score)
                weights = weights.to(outputs[1].dtype)
            if layer_idx not in self._routed:
                self._routed[layer_idx] = _Routed(logits, weights, chosen, probs)
            return (logits, weights, chosen) if is_noisy else None

        return torch.compiler.disable(note)  # or every layer would be compiled by itself

    def _noisy(
        self, layer_idx: int, router: Any, inputs: Tensor, clean: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return noisy logits and the probability that each expert is chosen."""
        assert self._noise is not None
        std = self._noise.std(layer_idx, inputs)
        clean = clean.to(std.dtype)
        noisy = clean + torch.randn_like(clean) * std
        bias = getattr(router, "e_score_correction_bias", None)
        probs = choice_probs(clean, noisy, std, active=router.top_k, selection_bias=bias)
        return noisy, probs
