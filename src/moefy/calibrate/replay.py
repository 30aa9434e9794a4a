"""A dense model, one layer at a time: transformers' own modules, weights read when they are needed.

Memory is one layer plus the hidden states that the caller keeps, never the whole model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moefy.calibrate.sample import FfnSample, swiglu
from moefy.checkpoint.families import sliding_window
from moefy.checkpoint.reader import DenseCheckpoint, stored_form
from moefy.errors import CheckpointError, UsageError, reason
from moefy.hardware import device

WINDOWS_AT_ONCE = 8


class LayerReplay:
    """One layer of a dense model in float32, on the accelerator if there is one."""

    def __init__(self, module: Any, rotary: Any, dense: DenseCheckpoint, layer_idx: int) -> None:
        family = dense.family
        prefix = family.layer.format(layer=layer_idx)
        names = (*dense.layer_tensors, family.gate, family.up, family.down)
        state = {name: _placed(dense[prefix + name]) for name in names}
        module.load_state_dict(stored_form(family, state), assign=True)
        module.requires_grad_(False)
        self._module, self._rotary = module, rotary
        self._residual_scale = dense.residual_scale
        # Granite scales what enters the residual stream; with the scale in `down`, methods that
        # compare outputs need not know of it.
        self.gate, self.up = state[family.gate], state[family.up]
        self.down = dense.residual_scale * state[family.down]
        self.norm_gain = state[family.ffn_norm]

    def ffn(
        self, residual: Float[Tensor, "windows sequence hidden"]
    ) -> Float[Tensor, "windows sequence hidden"]:
        """Return the dense FFN's outputs, what is added to the residual stream."""
        inputs = self._module.post_attention_layernorm(residual).flatten(0, 1)
        return (swiglu(inputs, self.gate, self.up) @ self.down.T).view_as(residual)

    def attend(
        self, hidden: Float[Tensor, "windows sequence hidden"]
    ) -> Float[Tensor, "windows sequence hidden"]:
        """Return the residual stream after attention: x + attention(norm(x))."""
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotary = self._rotary(hidden, positions)
        parts = []  # attention's scores of all windows at once would not fit
        for part in hidden.split(WINDOWS_AT_ONCE):
            normed = self._module.input_layernorm(part)
            attention, _ = self._module.self_attn(
                hidden_states=normed, position_embeddings=rotary, attention_mask=None
            )
            parts.append(part + self._residual_scale * attention)
        return torch.cat(parts)

    def sample(self, residual: Float[Tensor, "windows sequence hidden"]) -> FfnSample:
        """Return the FFN with its inputs, all windows in one row of tokens.

        A token's error counts by ω = 1/mean(x²), x the residual stream that the FFN's output is
        added to, scaled to the mean 1.
        """
        # The next norm divides by the stream's size, so an equal error matters less where the
        # stream is large.
        inputs = self._module.post_attention_layernorm(residual).flatten(0, 1)
        weights = 1 / residual.flatten(0, 1).square().mean(dim=1).clamp_min(1e-12)
        return FfnSample(
            self.gate, self.up, self.down, self.norm_gain, inputs, weights / weights.mean()
        )


def weights_alone(dense: DenseCheckpoint, layer_idx: int) -> FfnSample:
    """Return a layer's FFN without calibration tokens, for weight-only methods."""
    family = dense.family
    prefix = family.layer.format(layer=layer_idx)
    gate, up, down, gain = (
        dense[prefix + name] for name in (family.gate, family.up, family.down, family.ffn_norm)
    )
    # the stored dtype is kept where nothing is computed: most of these methods only move rows
    if dense.residual_scale != 1:
        down = dense.residual_scale * down.float()
    nothing = torch.zeros(0)
    return FfnSample(gate, up, down, gain.float(), nothing.view(0, gate.shape[1]), nothing)


def _placed(stored: Tensor) -> Tensor:
    return stored.to(device(), torch.float32)


class ModelReplay:
    """A dense checkpoint as embeddings, layers that are loaded one by one, and the output head.

    Raises:
        CheckpointError: transformers cannot build the model that config.json means.
    """

    def __init__(self, dense: DenseCheckpoint) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.dense = dense
        config = AutoConfig.for_model(**dense.config)
        config._attn_implementation = "sdpa"
        try:
            with torch.device("meta"):  # modules and shapes, no memory
                self._model = AutoModelForCausalLM.from_config(config).float().eval()
            self._rotary = type(self._model.model.rotary_emb)(config).to(device())
            if not self._rotary.inv_freq.isfinite().all():
                raise ValueError("the frequencies are not finite")
        except Exception as error:  # wherever a wrong setting leads to
            raise CheckpointError(
                f"{dense.folder}: transformers cannot build the model of its config.json, with "
                f"rope_parameters (or rope_scaling) {reason(dense.config['rope_parameters'])}: "
                f"{reason(error, 100)}"
            ) from error
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
        module = type(self._model.model.layers[layer_idx])
        with torch.device("meta"):
            fresh = module(self._model.config, layer_idx).eval()
        return LayerReplay(fresh, self._rotary, self.dense, layer_idx)

    def head(self) -> Callable[[Tensor], Tensor]:
        """Load the final norm and the output matrix; return what makes logits of final states."""
        name = "model.embed_tokens.weight" if self.dense.tied else "lm_head.weight"
        norm = type(self._model.model.norm)(self._model.config.hidden_size)
        norm.variance_epsilon = self._model.model.norm.variance_epsilon
        norm.load_state_dict({"weight": _placed(self.dense["model.norm.weight"])}, assign=True)
        norm.requires_grad_(False)
        scale = 1 / self.dense.config.get("logits_scaling", 1.0)
        matrix = _placed(self.dense[name])

        def logits(hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens vocab"]:
            return (scale * norm(hidden)) @ matrix.T

        return logits
