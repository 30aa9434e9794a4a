"""The conversion pipeline: dense checkpoint in, native MoE checkpoint out, one layer at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from moefy.calibrate.importance import window_importance
from moefy.calibrate.replay import ModelReplay, weights_alone
from moefy.calibrate.text import calibration_windows
from moefy.calibrate.walk import CalibrationWalk
from moefy.checkpoint.families import O_BIAS, attention_bias
from moefy.checkpoint.reader import DenseCheckpoint, fingerprint, side_files
from moefy.checkpoint.source import resolve
from moefy.checkpoint.targets import NativeTarget, Score, native_target, target_config
from moefy.checkpoint.writer import ShardWriter
from moefy.construct.partition.sharing import importance_by_cluster
from moefy.construct.pipeline import shape_of, split_ffn
from moefy.construct.split import SplitFfn
from moefy.progress import Progress, ProgressFn, silent
from moefy.recipe import ConvertRecipe
from moefy.storage import check_output, whole_folder


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread, so that results do not depend on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
    data: str | Path = "demo",
    recipe: str | Path | None = None,
    overwrite: bool = False,
    report: ProgressFn = silent,
    **choices: Any,
) -> Conversion:
    """Split every FFN of a dense model into experts and write a native MoE checkpoint.

    The output loads with plain `AutoModelForCausalLM.from_pretrained(out)`, in the weights'
    original dtype. The same seed gives the same bytes, for weight-only methods whatever the number
    of threads; calibrated methods promise that for the same machine and number of threads.

    Args:
        source: a model folder, a `.gguf` file, `smollm2-135m`, or a hub name.
        out: folder to write; it appears whole or not at all.
        data: calibration text for the methods that need it: a folder of `<domain>.jsonl(.gz)`
            files, `demo`, or `self` (the dense model samples it); held-out documents are left out.
        recipe: a YAML file with `ConvertRecipe` keys.
        overwrite: replace an existing model in `out`.
        report: told about progress.
        **choices: single `ConvertRecipe` keys (`experts=16, active=4, repair="paper", seed=0`);
            they override the file.

    Raises:
        UsageError: the recipe, the source or the output is not usable; nothing was written.
        StorageError: the disk is full; nothing was left behind.
    """
    out = Path(out).expanduser()
    asked = ConvertRecipe.build(recipe, **choices)
    check_output(out, overwrite=overwrite, sources=(Path(source).expanduser(),))
    folder = resolve(source, report=report)
    dense = DenseCheckpoint(folder)
    choice = asked.for_model(dense.config["intermediate_size"])
    shape = shape_of(choice)
    target = native_target(
        dense.config, shared=shape.shared, routed=shape.routed, asked=choice.target
    )
    choice = choice.model_copy(update={"target": target.model_type})
    config = target_config(
        target,
        dense.config,
        experts=shape.slices,
        active=shape.running,
        shared=shape.shared,
        dtype=dense.dtype,
    )
    windows = None
    if choice.calibrated:
        windows = calibration_windows(
            data,
            folder,
            tokens=choice.calibration_tokens,
            sequence_length=choice.calibration_length,
            needed_tokens=dense.config["intermediate_size"],
            seed=choice.seed,
            report=report,
        )
    with whole_folder(out, needed_bytes=dense.total_bytes()) as partial:
        for file in side_files(folder):
            shutil.copyfile(file, partial / file.name)
        writer = ShardWriter(partial)
        for name in dense.model_tensors():
            writer.add(name, dense[name])
        for layer_idx, split in enumerate(
            split_layers(dense, choice, windows, target.score, report)
        ):
            _write_layer(dense, layer_idx, split, target, writer)
            report(Progress("convert", layer_idx + 1, dense.num_layers))
        (partial / "moefy.json").write_text(_provenance(source, dense, choice))
        writer.finish(config)
    return Conversion(
        folder=out,
        recipe=choice,
        num_layers=dense.num_layers,
        expert_size=config[target.expert_size_key],
        written_bytes=writer.total_bytes,
    )


def split_layers(
    dense: DenseCheckpoint,
    recipe: ConvertRecipe,
    windows: Int[np.ndarray, "windows sequence"] | None,
    score: Score = "softmax",
    report: ProgressFn = silent,
) -> Iterator[SplitFfn]:
    """Split the FFNs in the order of the layers.

    With calibration windows, each layer is fitted on the inputs that the layers already converted
    give it (see `calibrate.walk`).

    Args:
        dense: the source.
        recipe: the choices.
        windows: calibration tokens, or None for weight-only methods.
        score: how the target's router turns logits into weights.
        report: told about the importance pass; the layers are counted by the caller.

    Raises:
        CorpusError: an activation is not finite.
    """
    if windows is None:
        for layer_idx in range(dense.num_layers):
            with one_thread():  # sums in another order could give other experts
                split = split_ffn(weights_alone(dense, layer_idx), recipe, layer_idx, score)
            yield split
        return
    replay = ModelReplay(dense)
    importance = None
    if recipe.needs_gradients:
        clusters = shape_of(recipe).routed
        segments = window_importance(replay, windows, clusters, report=report)
        importance = importance_by_cluster(segments, clusters, seed=recipe.seed)
    walk = CalibrationWalk(replay, windows, follow_dense=recipe.follows_dense)
    for layer_idx in range(dense.num_layers):
        sample = walk.enter(replay.layer(layer_idx))
        if importance is not None:
            sample.importance = importance[layer_idx]
        split = split_ffn(sample, recipe, layer_idx, score)
        walk.leave(sample, split)
        yield split


def _write_layer(
    dense: DenseCheckpoint,
    layer_idx: int,
    split: SplitFfn,
    target: NativeTarget,
    writer: ShardWriter,
) -> None:
    """Write one layer in the target's form."""
    family = dense.family
    prefix = family.layer.format(layer=layer_idx)
    for name in dense.layer_tensors:
        writer.add(prefix + name, dense[prefix + name])
    if target.attention_bias == "qkvo" and attention_bias(dense.config) == "qkv":
        queries = dense[prefix + "self_attn.q_proj.weight"]
        writer.add(prefix + O_BIAS, queries.new_zeros(queries.shape[1]))

    dtype = dense[prefix + family.down].dtype
    num_shared = len(split.partition.shared)
    experts = split.partition.routed.shape[0]
    gate, up, down = split.gate, split.up, split.down / dense.residual_scale

    def add(name: str, tensor: Tensor) -> None:
        writer.add(prefix + name, tensor.to(dtype))

    add(target.router, split.routing.router)
    if target.selection_bias:
        writer.add(prefix + target.selection_bias, torch.zeros(experts))
    if target.shared_gate and target.shared_up and target.shared_down:
        shared_gate, shared_up = gate[:num_shared], up[:num_shared]
        if target.shared_gate == target.shared_up:
            add(target.shared_gate, torch.cat([shared_gate, shared_up]))
        else:
            add(target.shared_gate, shared_gate)
            add(target.shared_up, shared_up)
        add(target.shared_down, down[:, :num_shared])
    gates = gate[num_shared:].unflatten(0, (experts, -1))
    ups = up[num_shared:].unflatten(0, (experts, -1))
    downs = down[:, num_shared:].unflatten(1, (experts, -1)).transpose(0, 1)
    downs = split.routing.folded_factor * downs
    if target.gate == target.up:
        add(target.gate, torch.cat([gates, ups], dim=1))
        add(target.down, downs)
        return
    for expert in range(experts):
        add(target.gate.format(expert=expert), gates[expert])
        add(target.up.format(expert=expert), ups[expert])
        add(target.down.format(expert=expert), downs[expert])


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
