"""Models whose speed is compared: converted ones, and random ones of any shape."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from moefy.checkpoint.cost import SHAPES, config_of, ffn_shape, split_within
from moefy.checkpoint.families import has_qk_norm
from moefy.checkpoint.gguf_export import export_gguf
from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.checkpoint.quantise import QUANTISED, rewrite
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.source import builtin, resolve
from moefy.errors import UsageError
from moefy.hardware import device
from moefy.progress import ProgressFn
from moefy.split import PRESETS, Split
from moefy.storage import digest, whole_file

GGUF_NAMES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_FEWEST_TOKENS = 49_152
"""Vocabulary of random models in llama.cpp: it wants a tokenizer, and SmolLM2's has so many."""
_POOL = 65_537  # a prime number: rows are different


@dataclass(frozen=True)
class Contender:
    """A model whose speed is measured."""

    name: str
    config: Mapping[str, Any]  # of config.json
    folder: Path | None = None  # None for random weights

    @property
    def size(self) -> int:
        """Neurons that run for one token."""
        return ffn_shape(self.config).running

    @property
    def is_dense(self) -> bool:
        """Whether it has no experts."""
        return not ffn_shape(self.config).experts

    def with_layers(self, count: int) -> Contender:
        """Return a random model of fewer layers."""
        cut = {k: v[:count] for k, v in self.config.items() if k.endswith("layer_types") and v}
        return replace(self, config={**self.config, **cut, "num_hidden_layers": count}, folder=None)

    def load(self, dtype: str) -> Any:
        """Return the model on the device."""
        kind = getattr(torch, dtype)
        if self.folder is None:
            return random_model(self.config, kind)
        return load_model(self.folder, dtype=kind).to(device())


def contender_of(model: str | Path, report: ProgressFn) -> Contender:
    """Return a converted model, or the shape of a dense one; see `measure_speed`."""
    path = Path(model).expanduser()
    is_config = str(model) in SHAPES or (path / "config.json").is_file() or path.suffix == ".json"
    folder = path if path.is_dir() or is_config else resolve(model, report=report)
    config = read_config(folder) if folder.exists() else config_of(model)
    each = Contender(str(model), config, folder)
    return replace(each, folder=None) if each.is_dense else each


def splits_of(dense: Contender, splits: Sequence[str] | None = None) -> list[Contender]:
    """Return splits of a dense model, with random weights; of the usual ones, those it allows.

    Raises:
        UsageError: a split cannot be read, or was asked for and is not possible.
    """
    size, found = dense.config["intermediate_size"], dict[Split, Contender]()
    for text in splits or (*PRESETS, "8/16+4", "4/16+2"):
        counts = re.fullmatch(r"(\d+)/(\d+)(?:\+(\d+))?", text)
        if not counts and text not in PRESETS:
            raise UsageError(f"--splits {text!r}: write ACTIVE/ALL+SHARED, as in 8/16+4")
        try:
            if counts:
                active, experts, shared = (int(each or 0) for each in counts.groups())
                split = Split(experts, active, shared)
            else:
                split = Split.of(size, preset=text)
            split, config = split_within(dense.config, split)
        except UsageError:
            if splits:
                raise
            continue
        name = f"{split.active}/{split.experts}" + f", {split.shared} shared" * (split.shared > 0)
        if not split.chosen:
            name = f"pruned to {split.active}/{split.experts}"
        found[split] = Contender(name, config)
    return [*found.values()]


def contenders_of(
    models: Sequence[str | Path],
    names: Sequence[str] | None,
    splits: Sequence[str] | None,
    report: ProgressFn,
) -> list[Contender]:
    """Return what `measure_speed` measures; the arguments are its own."""
    found = [contender_of(model, report) for model in models]
    if names:
        found = [replace(each, name=name) for each, name in zip(found, names, strict=True)]
    if all(each.is_dense for each in found):
        found += splits_of(found[0], splits)
    return with_stand_ins(found)


def with_stand_ins(given: Sequence[Contender]) -> list[Contender]:
    """Return the models, and before the first of every active size a dense model of that size.

    Raises:
        ArchitectureError: a model that `cost` cannot count.
    """
    found, sizes = list[Contender](), {each.size for each in given if not each.is_dense}
    dense = {each.size for each in given if each.is_dense}
    for each in given:
        if not each.is_dense and each.size not in dense:
            size = f", {each.size} neurons" if len(sizes) > 1 else ""
            made = dense_of_active_size(each.config)
            found.append(Contender(f"dense (same active size{size})", made))
            dense.add(each.size)
        found.append(each)
    return found


def dense_of_active_size(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a dense model with as many neurons as a converted model runs per token.

    Multipliers and windows are left out: they change its speed by less than can be measured.
    """
    shape = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    shape += " vocab_size tie_word_embeddings max_position_embeddings"
    made = {key: config[key] for key in shape.split() if config.get(key) is not None}
    made["model_type"] = "qwen3" if has_qk_norm(config) else "llama"
    made["attention_bias"] = bool(config.get("attention_bias"))
    return {**made, "intermediate_size": ffn_shape(config).running}


def random_model(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return a model with random weights, in evaluation mode, on the device.

    The weights are few normal numbers again and again, which takes a tenth of the time.
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    with no_init_weights():
        made = AutoConfig.for_model(**config)
        network = AutoModelForCausalLM.from_config(made, dtype=dtype).eval()
    network.tie_weights()
    pool = 0.02 * torch.randn(_POOL, generator=torch.Generator().manual_seed(0))
    for parameter in network.parameters():
        flat = parameter.data.view(-1)
        if parameter.dim() == 1:  # a norm or a bias
            flat.fill_(1.0)
            continue
        whole = len(flat) // _POOL * _POOL
        flat[:whole].view(-1, _POOL).copy_(pool)
        flat[whole:] = pool[: len(flat) - whole].to(dtype)
    return network.to(device())


def gguf_file(each: Contender, dtype: str, folder: Path) -> Path:
    """Return a model's GGUF file in a folder, and write it where it is not there.

    A random one is one layer, repeated: it is made and quantised in a fraction of the time.
    """
    config = {**each.config, "vocab_size": max(each.config["vocab_size"], _FEWEST_TOKENS)}
    layers = config["num_hidden_layers"]
    stored, plain = GGUF_NAMES.get(dtype, dtype), GGUF_NAMES.get(dtype, "f16")
    known = digest([each.name, config, str(each.folder)])
    file = folder / f"{known}-{layers}-{stored}.gguf"
    if file.is_file():
        return file
    if each.folder is not None:
        return export_gguf(each.folder, file, dtype=stored)
    one = Contender(each.name, config).with_layers(1)
    layer = folder / f"{digest([each.name, one.config, None])}-layer-{plain}.gguf"
    if not layer.is_file():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            stored_as = "float32" if plain == "f32" else "bfloat16"
            one.load(stored_as).cpu().save_pretrained(made)
            load_tokenizer(builtin()).save_pretrained(made)
            export_gguf(made, layer, dtype=plain)
    with whole_file(file) as partial:
        rewrite(layer, partial, kind=dtype if dtype in QUANTISED else None, layers=layers)
    return file
