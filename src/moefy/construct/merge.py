"""Undo a split: all experts back into one dense FFN."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moefy.checkpoint.card import RECORD, read_record
from moefy.checkpoint.families import FAMILIES, dense_config, layer_shapes
from moefy.checkpoint.reader import read_config, side_files, stored_form, tensor_files
from moefy.checkpoint.targets import TARGETS, NativeTarget
from moefy.checkpoint.writer import ShardWriter
from moefy.construct.convert import PARTITION
from moefy.construct.repair.rescale import fixed_scale
from moefy.errors import ArchitectureError, CheckpointError, UsageError
from moefy.progress import Progress, ProgressFn, silent
from moefy.recipe import ConvertRecipe
from moefy.run_folder import RunFolder
from moefy.storage import storage_errors


def export_dense(
    model: str | Path, out: str | Path, *, overwrite: bool = False, report: ProgressFn = silent
) -> Path:
    """Put a converted model's experts back into dense FFNs, neurons in their original order.

    The weights equal the source's, bit for bit where the constants that `convert` folded into
    `down_proj` are powers of two, else to one rounding of the stored dtype.

    Args:
        model: a folder that `convert` wrote.
        out: folder to write; it appears whole or not at all.
        overwrite: replace an existing model in `out`.
        report: told about progress.

    Raises:
        ArchitectureError: the model's experts do not add up to its dense source: its weights were
            fitted or trained, or its experts overlap.
        CheckpointError: the folder was not written by `convert`, or is damaged.
    """
    folder = Path(model).expanduser()
    config = read_config(folder)
    target = TARGETS.get(config.get("model_type", ""))
    if target is None:
        raise ArchitectureError(
            f"{folder} is a {config.get('model_type')!r} model and no split one: nothing to undo"
        )
    # what cannot be undone is refused before anything is written
    recipe, config = _record(folder)
    slots = _slots(folder, config)
    family, tied = FAMILIES[config["model_type"]], config["tie_word_embeddings"]
    with RunFolder(out, "model", overwrite=overwrite, sources=[folder]) as run:
        stored = tensor_files(folder)
        if not run.begin({"export": str(model)}):
            run.require_bytes(sum(file.num_bytes for file in set(stored.values())))
            with (
                storage_errors(run.out),
                ShardWriter(run.work, max_tensors=16 * (len(slots) + 1)) as writer,
            ):
                for file in side_files(folder):
                    shutil.copyfile(file, run.work / file.name)
                for name in family.model_tensors:
                    if name in stored and not (tied and name == "lm_head.weight"):
                        writer.add(name, stored[name].read(name))
                for layer_idx, order in enumerate(slots):
                    prefix = family.layer.format(layer=layer_idx)

                    def read(name: str, prefix: str = prefix) -> Tensor:
                        if prefix + name not in stored:
                            raise CheckpointError(f"{folder} holds no {prefix + name}")
                        return stored[prefix + name].read(prefix + name)

                    ffn = (family.gate, family.up, family.down)
                    shapes = layer_shapes(config, layer_idx)
                    shapes = {name: shape for name, shape in shapes.items() if name not in ffn}
                    layer = {name: read(name) for name in shapes}
                    wrong = [name for name in shapes if tuple(layer[name].shape) != shapes[name]]
                    if wrong:
                        raise CheckpointError(
                            f"{folder / RECORD} is damaged: {prefix + wrong[0]} has another shape "
                            "than its source.config says"
                        )
                    matrices = _merged(read, target, recipe, order)
                    layer |= zip(ffn, matrices, strict=True)
                    for name, tensor in stored_form(family, layer).items():
                        writer.add(prefix + name, tensor)
                    report(Progress("export dense", layer_idx + 1, len(slots)))
                writer.finish({**config, "architectures": [family.architecture]})
        run.finish()
    return run.out


def _record(folder: Path) -> tuple[ConvertRecipe, dict[str, Any]]:
    """Return the recipe and the dense config that `convert` stored."""
    record = read_record(folder)
    if record is None:
        raise CheckpointError(
            f"{folder} has no moefy.json: only what `moefy convert` wrote can be merged"
        )
    if record["stage"] != "convert":
        raise ArchitectureError(
            f"{folder} was trained after its conversion: its experts no longer add up to a dense "
            "FFN; export the converted model, or use the dense source"
        )
    try:
        recipe = ConvertRecipe.build(**record["recipe"])
    except UsageError as error:
        raise CheckpointError(f"{folder / RECORD} is damaged (recipe: {error})") from error
    if recipe.fitted:
        raise ArchitectureError(
            f"{folder} was made with --repair {recipe.repair}, which fitted its weights to the "
            "routing: its experts no longer add up to the dense FFN; use the dense source "
            f"({record['source']['name']})"
        )
    return recipe, dense_config(record["source"]["config"], f"{folder / RECORD}, source.config")


def _slots(folder: Path, config: dict[str, Any]) -> np.ndarray:
    neurons, layers = config["intermediate_size"], config["num_hidden_layers"]
    try:
        slots = np.load(folder / PARTITION, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{folder / PARTITION} cannot be read ({error})") from error
    # sharing methods put a neuron into several experts and leave others out
    if slots.shape != (layers, neurons) or not (np.sort(slots, axis=1) == np.arange(neurons)).all():
        raise ArchitectureError(
            f"{folder} does not hold every neuron once (its experts overlap): they do not add up "
            "to the dense FFN"
        )
    return slots


def _merged(
    read: Callable[[str], Tensor], target: NativeTarget, recipe: ConvertRecipe, slots: np.ndarray
) -> tuple[Tensor, Tensor, Tensor]:
    """Return gate, up and down of one dense layer; `read` takes names behind the layer prefix."""
    split = recipe.split
    gates, ups, downs = [], [], []
    if split.shared and target.shared_gate and target.shared_up and target.shared_down:
        gate, up = read(target.shared_gate), read(target.shared_up)
        if target.shared_gate == target.shared_up:  # gate lies above up
            gate, up = gate.chunk(2)
        gates.append(gate)
        ups.append(up)
        downs.append(_divided(read(target.shared_down), 2.0 if target.shared_switch else 1.0))
    # undo what the conversion folded into the routed experts, see `Routing.folded_factor`
    scale = fixed_scale(recipe) * (1.0 if target.score == "sigmoid" else split.chosen)
    if "{expert}" in target.gate:
        for expert in range(split.routed):
            gates.append(read(target.gate.format(expert=expert)))
            ups.append(read(target.up.format(expert=expert)))
            downs.append(_divided(read(target.down.format(expert=expert)), scale))
    else:
        gate, up = read(target.gate).chunk(2, dim=1)  # of [experts, 2·size, hidden]
        gates.append(gate.flatten(0, 1))
        ups.append(up.flatten(0, 1))
        downs.append(_divided(read(target.down), scale).transpose(0, 1).flatten(1))
    order = torch.from_numpy(np.argsort(slots))  # the slot of every neuron
    return torch.cat(gates)[order], torch.cat(ups)[order], torch.cat(downs, dim=1)[:, order]


def _divided(down: Float[Tensor, "..."], scale: float) -> Float[Tensor, "..."]:
    return (down.float() / scale).to(down.dtype)
