"""The routers of a native MoE in memory: what they did, and how they choose.

Hooks are in place inside a `with` block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from moefy.checkpoint.targets import TARGETS
from moefy.errors import UsageError
from moefy.experts.balance import RouterSums, router_sums
from moefy.experts.noisy_gate import NoisyGate, choose

Hooks = TypeVar("Hooks", bound="ForwardHooks")  # beartype does not know Self here


def routers_of(model: Any) -> list[Any]:
    """Return the router module of every layer; none for a dense model."""
    names = ("block_sparse_moe", "feed_forward", "mlp")
    blocks = [
        next(getattr(layer, name) for name in names if hasattr(layer, name))
        for layer in model.model.layers
    ]
    routers = [getattr(block, "router", None) or getattr(block, "gate", None) for block in blocks]
    return [router for router in routers if router is not None]


class ForwardHooks(ABC):
    """Watches forward passes; subclasses say of which modules, and how."""

    def __init__(self) -> None:
        self._handles: list[Any] = []

    @abstractmethod
    def hooks(self) -> Iterable[tuple[Any, Callable[..., Any]]]:
        """Return modules, each with its hook."""

    def __enter__(self: Hooks) -> Hooks:
        self._handles = [module.register_forward_hook(hook) for module, hook in self.hooks()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


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
        # of every layer's last pass: logits [tokens, experts], weights and chosen [tokens, active],
        # and with noise the probabilities of being chosen [tokens, experts]
        self._routed: dict[int, tuple[Tensor, Tensor, Tensor, Tensor | None]] = {}

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
        """Return the last pass's sums, with gradients, over tokens where `mask` is True.

        None for a dense model.
        """
        if not self._routed:
            return None
        *routed, probs = self._stacked()
        tokens = None if mask is None else mask.reshape(-1)
        return router_sums(*routed, score=self._score, mask=tokens, choice_probs=probs)

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
            noise = self._noise if router.training else None
            if noise is not None:
                hidden = inputs[0].reshape(-1, inputs[0].shape[-1])  # [tokens, hidden]
                logits, probs = noise.noisy(layer_idx, router, hidden, logits)
                weights, chosen = choose(router, logits, self._score)
                weights = weights.to(outputs[1].dtype)
            # a layer that is computed again for the backward pass must not be counted again
            self._routed.setdefault(layer_idx, (logits, weights, chosen, probs))
            return None if noise is None else (logits, weights, chosen)

        return torch.compiler.disable(note)  # or every layer would be compiled by itself


def shifted_bias(
    bias: Float[Tensor, "layers experts"],
    choices: Float[Tensor, "layers experts"],
    rate: float = 1e-3,
) -> Float[Tensor, "layers experts"]:
    """Return the biases of the next step: b_e - γ·sign(load_e - mean load), layer by layer.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; the load is `RouterSums.choices` of the
    step's whole batch, over all workers and passes, and γ = `rate` in units of the score.
    """
    return bias - rate * (choices - choices.mean(-1, keepdim=True)).sign()


class SelectionBias:
    """The selection biases of a native MoE, which are part of its checkpoint.

    Raises:
        UsageError: the model's routers have none. Trained with a bias that the model folder cannot
            hold, the router would choose other experts wherever the model is loaded.
    """

    def __init__(self, model: Any) -> None:
        routers = routers_of(model)
        found = [getattr(router, "e_score_correction_bias", None) for router in routers]
        self._biases = [bias for bias in found if bias is not None]
        if not routers or len(self._biases) < len(routers):
            with_bias = " or ".join(
                target.model_type for target in TARGETS.values() if target.score == "sigmoid"
            )
            raise UsageError(
                f"a {model.config.model_type} model has no selection bias to balance with: choose "
                f"the balance 'switch', or convert with --target {with_bias}"
            )

    @torch.no_grad()
    def update(self, choices: Float[Tensor, "layers experts"], rate: float = 1e-3) -> None:
        """Shift the biases after a step; see `shifted_bias`."""
        biases = torch.stack(self._biases)
        moved = shifted_bias(biases, choices.to(biases), rate)
        for bias, new in zip(self._biases, moved, strict=True):
            bias.copy_(new)
