"""A dense model, one layer at a time: transformers' own modules, weights read when they are needed.

Memory is one layer plus the hidden states that the caller keeps, never the whole model.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moefy.calibrate.sample import FfnSample, swiglu
from moefy.checkpoint.families import DenseFamily, sliding_window
from moefy.checkpoint.reader import DenseCheckpoint, stored_form
from moefy.checkpoint.skeleton import skeleton_of
from moefy.errors import UsageError
from moefy.hardware import device

WINDOWS_AT_ONCE = 8


class _FfnStub(torch.nn.Module):
    """Stands in the FFN's place and adds nothing to the residual stream."""

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.zeros_like(inputs)


class LayerReplay:
    """One layer of a dense model in float32, on the accelerator if there is one."""

    def __init__(self, module: Any, rotary: Any, dense: DenseCheckpoint, layer_idx: int) -> None:
        family = dense.family
        prefix = family.layer.format(layer=layer_idx)
        names = (*dense.layer_tensors(layer_idx), family.gate, family.up, family.down)
        state = {name: _placed(dense[prefix + name]) for name in names}
        module.load_state_dict(stored_form(family, state), assign=True)
        module.requires_grad_(False)
        setattr(module, family.gate.partition(".")[0], _FfnStub())
        self._module, self._rotary = module, rotary
        self.parallel, self.normed = family.parallel, bool(family.after_ffn)
        self._norm, self._after = (
            getattr(module, name.partition(".")[0]) if name else None
            for name in (family.ffn_norm, family.after_ffn)
        )
        # Granite scales what enters the residual stream; with the scale in `down`, methods that
        # compare outputs need not know of it.
        self.gate, self.up = state[family.gate], state[family.up]
        self.down = dense.residual_scale * state[family.down]
        self.norm_gain = _gain(family, state)

    def ffn(
        self, residual: Float[Tensor, "windows sequence hidden"]
    ) -> Float[Tensor, "windows sequence hidden"]:
        """Return the dense FFN's outputs, what is added to the residual stream.

        `residual` is the stream behind attention, or in front of it where both are parallel.
        """
        inputs = self.inputs(residual, residual)
        outputs = swiglu(inputs, self.gate, self.up) @ self.down.T
        return self.added(outputs).view_as(residual)

    def inputs(
        self,
        residual: Float[Tensor, "windows sequence hidden"],
        entered: Float[Tensor, "windows sequence hidden"] | None,
    ) -> Float[Tensor, "tokens hidden"]:
        """Return what the FFN reads; the arguments are those of `sample`."""
        read = entered if self.parallel else residual
        assert read is not None
        return (self._norm(read) if self._norm else read).flatten(0, 1)

    def added(self, outputs: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
        """Return what is added to the residual stream for the FFN's outputs."""
        found: Tensor = self._after(outputs) if self._after else outputs
        return found

    def attend(
        self, hidden: Float[Tensor, "windows sequence hidden"]
    ) -> Float[Tensor, "windows sequence hidden"]:
        """Return the residual stream after attention: x + attention(norm(x))."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotary = self._rotary(hidden, positions)
        # attention's scores of all windows at once would not fit
        parts = [
            self._module(
                part, position_embeddings=rotary, position_ids=positions, attention_mask=None
            )
            for part in hidden.split(WINDOWS_AT_ONCE)
        ]
        return torch.cat(parts)

    def sample(
        self,
        residual: Float[Tensor, "windows sequence hidden"],
        entered: Float[Tensor, "windows sequence hidden"] | None = None,
    ) -> FfnSample:
        """Return the FFN with its inputs, all windows in one row of tokens.

        A token's error counts by ω = 1/mean(x²), x the residual stream that the FFN's output is
        added to, scaled to the mean 1. Where that output is normed first, x is the output.

        Args:
            residual: x, behind attention.
            entered: the stream in front of attention, which the FFN reads where both are parallel.
        """
        # The next norm divides by the stream's size, so an equal error matters less where the
        # stream is large.
        inputs, size = self.inputs(residual, entered), residual.flatten(0, 1)
        if self._after:
            size = swiglu(inputs, self.gate, self.up) @ self.down.T
        weights = 1 / size.detach().square().mean(dim=1).clamp_min(1e-12)
        return FfnSample(
            self.gate, self.up, self.down, self.norm_gain, inputs, weights / weights.mean()
        )


def weights_alone(dense: DenseCheckpoint, layer_idx: int) -> FfnSample:
    """Return a layer's FFN without calibration tokens, for weight-only methods."""
    family = dense.family
    prefix = family.layer.format(layer=layer_idx)
    names = filter(None, (family.gate, family.up, family.down, family.ffn_norm))
    state = {name: dense[prefix + name] for name in names}
    gate, up, down = (state[name] for name in (family.gate, family.up, family.down))
    # the stored dtype is kept where nothing is computed: most of these methods only move rows
    if dense.residual_scale != 1:
        down = dense.residual_scale * down.float()
    nothing = torch.zeros(0)
    return FfnSample(gate, up, down, _gain(family, state), nothing.view(0, gate.shape[1]), nothing)


def _gain(family: DenseFamily, state: Mapping[str, Tensor]) -> Float[Tensor, " hidden"]:
    """Return what the norm in front of the FFN multiplies by."""
    if family.ffn_norm is None:
        down = state[family.down]
        return torch.ones(len(down), device=down.device)
    return family.norm_offset + state[family.ffn_norm].float()


def _placed(stored: Tensor) -> Tensor:
    return stored.to(device(), torch.float32)


class ModelReplay:
    """A dense checkpoint as embeddings, layers that are loaded one by one, and the output head.

    Raises:
        CheckpointError: transformers cannot build the model that config.json means.
    """

    def __init__(self, dense: DenseCheckpoint) -> None:
        self.dense, self._skeleton = dense, skeleton_of(dense.config)
        self._rotary = self._skeleton.rotary().to(device())
        self.num_layers = dense.num_layers
        self.hidden_size: int = dense.config["hidden_size"]

    def embed(
        self, ids: Int[Tensor, "windows sequence"]
    ) -> Float[Tensor, "windows sequence hidden"]:
        """Return the residual stream in front of the first layer.

        Raises:
            UsageError: the windows are longer than the model's sliding window, which the replay
                does not have.
        """
        window = sliding_window(self.dense.config)
        if window and ids.shape[1] > window:
            raise UsageError(
                f"windows of {ids.shape[1]} tokens are longer than the model's sliding window of "
                f"{window}: calibrate on shorter ones, --set calibration_length={window}"
            )
        embedded = F.embedding(ids, self.dense["model.embed_tokens.weight"].float())
        return embedded.to(device()) * self.dense.config.get("embedding_multiplier", 1.0)

    def layer(self, layer_idx: int) -> LayerReplay:
        """Load one layer; it is freed with the returned object."""
        module = self._skeleton.layer(layer_idx)
        return LayerReplay(module, self._rotary, self.dense, layer_idx)

    def head(self) -> Callable[[Tensor], Tensor]:
        """Load the final norm and the output matrix; return what makes logits of final states."""
        name = "model.embed_tokens.weight" if self.dense.tied else "lm_head.weight"
        stored = self.dense.family.final_norm
        norm = copy.deepcopy(self._skeleton.model.get_submodule(stored.rpartition(".")[0]))
        norm.load_state_dict({"weight": _placed(self.dense[stored])}, assign=True)
        norm.requires_grad_(False)
        config = self.dense.config  # Granite divides the logits, Cohere multiplies them
        scale = config.get("logit_scale", 1.0) / config.get("logits_scaling", 1.0)
        matrix = _placed(self.dense[name])

        def logits(hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
            return (scale * norm(hidden)) @ matrix.T

        return logits
