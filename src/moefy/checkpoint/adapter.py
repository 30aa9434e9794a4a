"""LoRA adapters of the peft library: a base's tensors with the adapter added while reading."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from moefy.checkpoint.reader import read_json
from moefy.checkpoint.tensor_file import TensorFile, open_tensors
from moefy.errors import ArchitectureError, CheckpointError, reason

ADAPTER = "adapter_config.json"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_PREFIX = "base_model.model."
_REFUSED = (
    *("use_dora", "modules_to_save", "lora_bias", "fan_in_fan_out", "layer_replication"),
    *("target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora"),
    *("arrow_config", "use_bdlora", "kasa_config", "monteclora_config", "megatron_config"),
)
_HALVES = {
    ".lora_A.weight": ".lora_B.weight",
    ".lora_embedding_A": ".lora_embedding_B",  # of which the product is the other way round
}


class LoraAdapter:
    """An adapter folder, checked when it is opened.

    Raises:
        CheckpointError: files are missing or damaged, or do not fit together.
        ArchitectureError: it is more than a product added to weights.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._settings = settings = read_json(folder / ADAPTER)
        kind, base = settings.get("peft_type"), settings.get("base_model_name_or_path")
        bias = settings.get("bias") or "none"
        asked = [f"{key} = {settings[key]!r}" for key in _REFUSED if settings.get(key)]
        asked += [f"bias = {bias!r}"] * (bias != "none")
        asked += [f"peft_type = {kind!r}"] * (kind != "LORA")
        if asked:
            raise ArchitectureError(
                f"{folder / ADAPTER} has {reason(asked[0], 80)}; moefy merges plain LoRA: merge "
                "this adapter with peft (merge_and_unload) and convert the result"
            )
        if not isinstance(base, str) or not base:
            raise CheckpointError(
                f"{folder / ADAPTER} names no base model: put its folder or hub name into "
                "base_model_name_or_path"
            )
        self.base = base
        found = [folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]
        if not found:
            raise CheckpointError(f"{folder} has no {ADAPTER_WEIGHTS[0]}: fetch it again")
        self.weights = found[0]
        self._file = open_tensors(self.weights)
        self._pairs: dict[str, tuple[str, str]] = {}  # by the weight that they are added to
        left = set(self._file.headers)
        for first in self._file.headers:
            for half, other in _HALVES.items():
                module, second = first.removesuffix(half), first.removesuffix(half) + other
                if module != first and second in left:
                    self._pairs[f"{module.removeprefix(_PREFIX)}.weight"] = (first, second)
                    left -= {first, second}
        if left:
            raise ArchitectureError(
                f"{self.weights} holds {min(left)}, which is no half of a LoRA product: merge this "
                "adapter with peft (merge_and_unload) and convert the result"
            )

    def merged(self, files: Mapping[str, TensorFile]) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the base's tensors, in their dtypes, with the adapter's products added."""
        if foreign := self._pairs.keys() - files.keys():
            raise CheckpointError(
                f"{self.weights} is for {min(foreign)}, which the base {self.base} does not hold"
            )
        for name, file in files.items():
            tensor = file.read(name)
            if pair := self._pairs.get(name):
                first, second = (self._file.read(half).float() for half in pair)
                if len(first) != second.shape[-1]:
                    raise CheckpointError(f"{self.weights}: {pair[0]} and {pair[1]} do not fit")
                scale = self._scale(name.removesuffix(".weight"), len(first))
                product = second @ first if pair[0].endswith(".weight") else (second @ first).T
                if product.shape != tensor.shape:
                    raise CheckpointError(
                        f"{self.weights}: {pair[0]} is for a weight of shape "
                        f"{list(product.shape)}, {name} has {list(tensor.shape)}"
                    )
                tensor = product.mul_(scale).add_(tensor.float()).to(tensor.dtype)
            yield name, tensor

    def _scale(self, module: str, rank: int) -> float:
        """Return the factor of a module's product, as peft computes it."""
        alphas: Any = self._settings.get("alpha_pattern") or {}
        alpha = self._settings.get("lora_alpha", 8)
        for key, value in alphas.items() if isinstance(alphas, dict) else [(alphas, None)]:
            if not re.fullmatch(r"[\w.]+", str(key)):  # they are regular expressions
                raise ArchitectureError(
                    f"{self.folder / ADAPTER} has the alpha_pattern {reason(repr(key), 60)}; moefy "
                    "reads names of modules: merge this adapter with peft (merge_and_unload)"
                )
            if f".{module}".endswith(f".{key}"):
                alpha = value
                break
        if not isinstance(alpha, int | float) or not math.isfinite(alpha):
            raise CheckpointError(f"{self.folder / ADAPTER} has lora_alpha = {alpha!r}, no number")
        return alpha / (math.sqrt(rank) if self._settings.get("use_rslora") else max(rank, 1))
