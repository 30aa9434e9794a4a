"""The conversion pipeline: dense checkpoint in, native MoE checkpoint out, one layer at a time."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moefy.checkpoint.reader import DenseCheckpoint, fingerprint, side_files
from moefy.checkpoint.source import resolve
from moefy.checkpoint.targets import TARGETS, NativeTarget, target_config
from moefy.checkpoint.writer import ShardWriter
from moefy.construct.partition.random import independent_random
from moefy.construct.repair.rescale import down_proj_factor
from moefy.construct.router.random import random_router, zero_router
from moefy.progress import Progress, ProgressFn, silent
from moefy.recipe import ConvertRecipe, check_split
from moefy.storage import check_output, whole_folder


@dataclass(frozen=True)
class Conversion:
    """What `convert` did.

    Attributes:
        folder: the converted model.
        recipe: every choice that was made.
        num_layers: layers converted.
        expert_size: neurons per expert.
        written_bytes: size of the output's weights.
    """

    folder: Path
    recipe: ConvertRecipe
    num_layers: int
    expert_size: int
    written_bytes: int


def convert(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | None = None,
    overwrite: bool = False,
    report: ProgressFn = silent,
    **choices: Any,
) -> Conversion:
    """Split every FFN of a dense model into experts and write a native MoE checkpoint.

    The output loads with plain `AutoModelForCausalLM.from_pretrained(out)`, in the weights'
    original dtype. The same seed gives the same bytes, whatever the number of threads.

    Args:
        source: a model folder, a `.gguf` file, `smollm2-135m`, or a hub name.
        out: folder to write; it appears whole or not at all.
        recipe: a YAML file with `ConvertRecipe` keys.
        overwrite: replace an existing model in `out`.
        report: told about progress.
        **choices: single `ConvertRecipe` keys (`experts=16, active=4, rescale="paper", seed=0`);
            they override the file.

    Raises:
        UsageError: the recipe, the source or the output is not usable; nothing was written.
        StorageError: the disk is full; nothing was left behind.
    """
    out = Path(out).expanduser()
    choice = ConvertRecipe.build(recipe, **choices)
    check_output(out, overwrite=overwrite, sources=(Path(source).expanduser(),))
    folder = resolve(source, report=report)
    dense = DenseCheckpoint(folder)
    check_split(dense.config["intermediate_size"], choice.experts, choice.active)

    target = TARGETS[choice.target]
    config = target_config(
        target,
        dense.config,
        experts=choice.experts,
        active=choice.active,
        dtype=dense.dtype,
    )
    with whole_folder(out, needed_bytes=dense.total_bytes()) as partial:
        for file in side_files(folder):
            shutil.copyfile(file, partial / file.name)
        writer = ShardWriter(partial)
        for name in dense.model_tensors():
            writer.add(name, dense[name])
        for layer_idx in range(dense.num_layers):
            _convert_layer(dense, layer_idx, target, choice, writer)
            report(Progress("convert", layer_idx + 1, dense.num_layers))
        (partial / "moefy.json").write_text(_provenance(source, dense, choice))
        writer.finish(config)
    return Conversion(
        folder=out,
        recipe=choice,
        num_layers=dense.num_layers,
        expert_size=config["intermediate_size"],
        written_bytes=writer.total_bytes,
    )


def _convert_layer(
    dense: DenseCheckpoint,
    layer_idx: int,
    target: NativeTarget,
    recipe: ConvertRecipe,
    writer: ShardWriter,
) -> None:
    family = dense.family
    prefix = family.layer.format(layer=layer_idx)
    for name in family.layer_tensors:
        writer.add(prefix + name, dense[prefix + name])
    gate, up, down = (dense[prefix + name] for name in (family.gate, family.up, family.down))

    partition = independent_random(
        gate.shape[0], recipe.experts, seed=recipe.seed, layer_idx=layer_idx
    )
    if recipe.active == recipe.experts:
        router = zero_router(recipe.experts, gate.shape[1])
    else:
        norm_gain = dense[prefix + family.ffn_norm]
        router = random_router(norm_gain, recipe.experts, seed=recipe.seed, layer_idx=layer_idx)
    factor = down_proj_factor(recipe.rescale, num_experts=recipe.experts, num_active=recipe.active)

    writer.add(prefix + target.router, router.to(gate.dtype))
    for expert, neurons in enumerate(torch.from_numpy(partition)):
        writer.add(prefix + target.gate.format(expert=expert), gate[neurons])
        writer.add(prefix + target.up.format(expert=expert), up[neurons])
        writer.add(prefix + target.down.format(expert=expert), down[:, neurons] * factor)


def _provenance(source: str | Path, dense: DenseCheckpoint, recipe: ConvertRecipe) -> str:
    """Return moefy.json: the recipe, the versions and the inputs' hashes. No times, no paths.

    Without those, the same conversion gives the same bytes on any machine.
    """
    record = {
        "moefy": version("moefy"),
        "stage": "convert",
        "recipe": recipe.model_dump(mode="json"),
        "source": {"name": Path(source).name, "sha256": fingerprint(dense.folder)},
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
    }
    return json.dumps(record, indent=2) + "\n"
