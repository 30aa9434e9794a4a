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
        try:
            self.config, self.model = _built(config)
            if not self.rotary().inv_freq.isfinite().all():
                raise ValueError("the frequencies are not finite")
        except Exception as error:  # wherever a wrong setting leads to
            key = next((key for key in config if _builds_without(key, config)), "rope_parameters")
            also = " (or rope_scaling)" if key == "rope_parameters" else ""
            raise CheckpointError(
                f"transformers cannot build the model of config.json, because of {key}{also} = "
                f"{reason(repr(config.get(key)))}: {reason(error, 100)}"
            ) from error
        # layers of a kind have the same tensors
        self.kinds: list[str] = list(
            config.get("layer_types") or [""] * config["num_hidden_layers"]
        )

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


def _built(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """Return transformers' config, and a model of one layer on the device `meta`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # one layer is enough to know the class of all, however many a stranger's file asks for
    layers = config["num_hidden_layers"]
    by_layer = {k: v[:1] for k, v in config.items() if isinstance(v, list) and len(v) == layers}
    short = {**config, **by_layer, "num_hidden_layers": 1}
    whole = AutoConfig.for_model(**config)
    whole._attn_implementation = "sdpa"
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(**short))
    return whole, made.float().eval()


def _builds_without(key: str, config: Mapping[str, Any]) -> bool:
    try:
        _built({name: value for name, value in config.items() if name != key})
    except Exception:
        return False
    return True


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
