"""A model as transformers builds it from config.json, without memory for its weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from moefy.errors import CheckpointError, reason

Shapes = dict[str, tuple[int, ...]]


class Skeleton:
    """Modules of a dense or converted model on the device `meta`, layers one at a time.

    Raises:
        CheckpointError: transformers cannot build the model that config.json means.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        # one layer is enough to know the class of all, however many a stranger's file asks for
        layers = config["num_hidden_layers"]
        by_layer = {k: v[:1] for k, v in config.items() if isinstance(v, list) and len(v) == layers}
        short = {**config, **by_layer, "num_hidden_layers": 1}
        try:
            self.config = AutoConfig.for_model(**config)
            self.config._attn_implementation = "sdpa"
            with torch.device("meta"):
                made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**short))
            self.model = made.float().eval()
            if not self.rotary().inv_freq.isfinite().all():
                raise ValueError("the frequencies are not finite")
        except Exception as error:  # wherever a wrong setting leads to
            raise CheckpointError(
                "transformers cannot build the model of config.json, with rope_parameters (or "
                f"rope_scaling) {reason(config.get('rope_parameters'))}: {reason(error, 100)}"
            ) from error
        # layers of a kind have the same tensors
        self.kinds: list[str] = list(config.get("layer_types") or [""] * layers)

    def rotary(self) -> Any:
        """Return the module of the rotary embedding, with its frequencies, on the CPU."""
        found = (m for m in self.model.model.children() if hasattr(m, "inv_freq"))
        return type(next(found))(self.config)

    def layer(self, layer_idx: int) -> Any:
        """Return one layer's module."""
        import torch

        with torch.device("meta"):
            return type(self.model.model.layers[0])(self.config, layer_idx).float().eval()

    def shapes(self, layer_idx: int) -> Shapes:
        """Return the shape of every parameter of a layer, names behind the layer prefix."""
        kind = self.kinds.index(self.kinds[layer_idx])
        return _shapes(self, kind)

    @property
    def outside(self) -> Shapes:
        """Shapes of the parameters outside of the layers; a tied matrix counts once."""
        named = self.model.named_parameters()
        return {name: tuple(p.shape) for name, p in named if ".layers." not in name}


@lru_cache(maxsize=256)
def _shapes(skeleton: Skeleton, layer_idx: int) -> Shapes:
    named = skeleton.layer(layer_idx).named_parameters()
    return {name: tuple(parameter.shape) for name, parameter in named}


def skeleton_of(config: Mapping[str, Any]) -> Skeleton:
    """Return the skeleton of a config.json; the same one for the same config."""
    return _skeleton(json.dumps(config, sort_keys=True))


@lru_cache(maxsize=16)
def _skeleton(config: str) -> Skeleton:
    return Skeleton(json.loads(config))
