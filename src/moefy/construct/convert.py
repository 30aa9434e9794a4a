"""The conversion pipeline: dense checkpoint in, native MoE checkpoint out, one layer at a time."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Int

from moefy.calibrate.importance import window_importance
from moefy.calibrate.replay import ModelReplay, weights_alone
from moefy.calibrate.text import calibration_windows
from moefy.calibrate.walk import CalibrationWalk
from moefy.checkpoint.card import model_card, read_record
from moefy.checkpoint.load import mended_generation
from moefy.checkpoint.reader import (
    GENERATION,
    DenseCheckpoint,
    fingerprint,
    side_files,
    weight_files,
)
from moefy.checkpoint.source import name_of, origin, resolve
from moefy.checkpoint.targets import (
    NativeTarget,
    RouterScore,
    expressible,
    is_unbiased_in_vllm,
    native_target,
    pruned_config,
    target_config,
)
from moefy.checkpoint.tensor_file import open_tensors
from moefy.checkpoint.whole import WHOLE, for_whole, stored_name
from moefy.checkpoint.writer import ShardWriter
from moefy.construct.ffn import SplitFfn, stream
from moefy.construct.kept import keep_layer, load_layer
from moefy.construct.native import native_layer
from moefy.construct.partition.sharing import importance_by_cluster
from moefy.construct.pipeline import split_ffn
from moefy.construct.repair.end_to_end import train_end_to_end
from moefy.construct.repair.fit import fit_ffn
from moefy.errors import ArchitectureError
from moefy.hardware import freed_memory_kept, training_precision
from moefy.progress import Progress, ProgressFn, silent
from moefy.recipe import ConvertRecipe, ConvertSettings
from moefy.run_folder import MARKER, RunFolder
from moefy.split import Split
from moefy.storage import replace_file, storage_errors
from moefy.version import __version__

PARTITION = "partition.npy"
"""Which neuron of the dense model fills each slot, [layers, slots]; see `construct.merge`."""
LAYERS = "layers"
"""Folder of the finished layers of an unfinished conversion with `--effort high`."""
_MOST_BYTES = 4 << 30
"""Larger models, in float32, are not trained end to end unless the recipe asks for it."""


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
    """What `convert` did: the output folder, every choice that was made, and sizes."""

    folder: Path
    recipe: ConvertRecipe
    num_layers: int
    expert_size: int  # neurons
    written_bytes: int  # of weights
    # nats to the dense model, on calibration windows that were not fitted (their documents may be)
    kl: float | None


def convert(
    source: str | Path,
    out: str | Path,
    *,
    data: str | Path = "demo",
    recipe: ConvertRecipe | str | Path | None = None,
    overwrite: bool = False,
    report: ProgressFn = silent,
    **settings: Unpack[ConvertSettings],
) -> Conversion:
    """Split every FFN of a dense model into experts and write a native MoE checkpoint.

    The output loads with plain `AutoModelForCausalLM.from_pretrained(out)`, in the weights'
    original dtype. Where all active slices are shared there is nothing to route: a dense model with
    a smaller FFN is written. The same seed gives the same bytes, for weight-only methods whatever
    the number of threads; calibrated methods promise that for the same machine and threads.

    Args:
        source: a model folder, a `.gguf` file, `smollm2-135m`, or a hub name.
        out: folder to write; it appears whole or not at all. With the effort `high`, a conversion
            that was stopped goes on behind its last finished layer.
        data: calibration text for the methods that need it: a folder of `<domain>.jsonl(.gz)`
            files, `demo`, or `self` (the dense model samples it); held-out documents are left out.
        recipe: a `ConvertRecipe` or a YAML file with its keys.
        overwrite: replace an existing model in `out`.
        report: told about progress.
        **settings: single `ConvertRecipe` keys (`experts=16, active=4, repair="paper", seed=0`);
            they override the recipe.

    Raises:
        UsageError: the recipe, the source or the output is not usable; nothing was written.
        StorageError: the disk is full.
    """
    asked = ConvertRecipe.build(recipe, **settings)
    resumes = asked.effort == "high"  # the others take minutes, and leave nothing behind
    with RunFolder(
        out,
        "model",
        overwrite=overwrite,
        sources=[source],
        resumes=resumes,
        scratch=[LAYERS] if resumes else (),
    ) as run:
        dense = DenseCheckpoint(resolve(source, report=report), asked.part)
        choice, target = _for_model(asked, dense)
        replay = ModelReplay(dense)  # also for its errors
        generation, left_out = mended_generation(dense.folder)
        if left_out:
            note = f"without {', '.join(left_out)}: they mean nothing beside its other keys"
            report(Progress(f"write {GENERATION}", 1, 1, note))
        # text and recipe are refused before the folder is touched
        windows = _windows(data, dense, choice, report) if choice.calibrated else None
        record = _record(source, dense, choice, data, windows)
        identity = {"source": str(source), "data": str(data), "recipe": record["recipe"]}
        if resumes:
            identity["calibration"] = record.get("calibration")
        goes_on = run.begin(identity)
        if not run.was_finished:
            run.require_bytes(dense.total_bytes())
            with storage_errors(run.out):
                for file in run.work.iterdir() if goes_on else ():
                    if file.name not in (MARKER, LAYERS):
                        file.unlink()
                kept = run.work / LAYERS if resumes else None
                _convert(run.work, replay, choice, target, windows, record, report, kept)
                if left_out:
                    replace_file(run.work / GENERATION, json.dumps(generation, indent=2) + "\n")
        run.finish()
    return read_conversion(run.out)


def read_conversion(folder: Path) -> Conversion:
    """Return what `convert` did when it wrote a folder."""
    record = read_record(folder)
    assert record is not None
    recipe, config = ConvertRecipe.build(**record["recipe"]), record["source"]["config"]
    trained = record.get("end_to_end")
    return Conversion(
        folder=folder,
        recipe=recipe,
        num_layers=config["num_hidden_layers"],
        expert_size=recipe.split.size(config["intermediate_size"]),
        written_bytes=sum(open_tensors(folder / name).num_bytes for name in weight_files(folder)),
        kl=trained["after"] if trained else None,
    )


def _for_model(
    asked: ConvertRecipe, dense: DenseCheckpoint
) -> tuple[ConvertRecipe, NativeTarget | None]:
    """Return the recipe with every choice made, and the architecture to write.

    The architecture is None where nothing is routed and the model stays dense.

    Raises:
        UsageError: the model does not allow the split.
        ArchitectureError: no target fits, or one was asked for that does not.
    """
    if WHOLE in dense.config:
        asked = for_whole(asked, dense.config)
    recipe = asked.for_model(dense.config["intermediate_size"])
    size = 4 * dense.total_bytes() / getattr(torch, dense.dtype).itemsize
    if asked.end_to_end_epochs is None and (
        size > _MOST_BYTES or recipe.repair != "fit" or not recipe.follows_dense
    ):
        recipe = recipe.model_copy(update={"end_to_end_epochs": 0.0})
    split = recipe.split
    if split.chosen:
        if asked.shared is None and recipe.partition != "sharing-inner":
            split, target = expressible(dense.config, split, asked=recipe.target)
        else:
            target = native_target(dense.config, split, asked=recipe.target)
        made = {"shared": split.shared, "target": target.model_type}
        return recipe.model_copy(update=made), target
    if recipe.target:
        raise ArchitectureError(
            f"all {split.shared} active slices are shared, so the result is a smaller dense model "
            f"and not {recipe.target}: leave --target out, or lower --shared"
        )
    return recipe, None


def _windows(
    data: str | Path, dense: DenseCheckpoint, recipe: ConvertRecipe, report: ProgressFn
) -> Int[np.ndarray, "windows sequence"]:
    assert recipe.calibration_tokens is not None
    return calibration_windows(
        data,
        dense.folder,
        tokens=recipe.calibration_tokens,
        sequence_length=recipe.calibration_length,
        needed_tokens=dense.config["intermediate_size"],
        seed=recipe.seed,
        report=report,
    )


def _convert(
    folder: Path,
    replay: ModelReplay,
    recipe: ConvertRecipe,
    target: NativeTarget | None,
    windows: Int[np.ndarray, "windows sequence"] | None,
    record: dict[str, Any],
    report: ProgressFn,
    kept: Path | None,
) -> None:
    """Make the converted model in a folder; `kept` as for `split_layers`."""
    dense = replay.dense
    walk = None if windows is None else calibration_walk(replay, recipe, windows, folder)
    with closing(walk) if walk else nullcontext():
        score = target.score if target else "softmax"
        layers = split_layers(dense, recipe, walk, score, report, kept)
        config = _write(folder, dense, recipe.split, target, layers, record, report)
        if recipe.end_to_end_epochs:
            assert walk is not None
            divergence = train_end_to_end(
                folder, walk, recipe, target, stream(recipe.seed, "end to end", 0), report
            )
            record["end_to_end"] = asdict(divergence)
    (folder / "moefy.json").write_text(json.dumps(record, indent=2) + "\n")
    (folder / "README.md").write_text(model_card(record, config))


def _write(
    folder: Path,
    dense: DenseCheckpoint,
    split: Split,
    target: NativeTarget | None,
    layers: Iterator[SplitFfn],
    record: dict[str, Any],
    report: ProgressFn,
) -> dict[str, Any]:
    """Write the converted layers, one at a time, and return config.json.

    The source is hashed meanwhile.
    """
    config = pruned_config(dense.config, split)
    if target:
        config = target_config(target, dense.config, split, dtype=dense.dtype)
    if is_unbiased_in_vllm(config):
        note = "vLLM 0.32 answers nonsense from it: see Limits in its README.md"
        report(Progress(f"write {config['model_type']} with biases", 1, 1, note))
    # an upper bound: the header's size must be known before the tensors are
    tensors_per_layer = len(dense.layer_tensors(0)) + 3 * split.routed + 6
    max_tensors = (dense.num_layers + 1) * tensors_per_layer + len(dense.vision_files)
    with ShardWriter(folder, max_tensors=max_tensors) as writer, ThreadPoolExecutor(1) as beside:
        hashes = beside.submit(fingerprint, dense.folder)
        for file in side_files(dense.folder):
            shutil.copyfile(file, folder / file.name)
        placed = stored_name if WHOLE in dense.config else str
        for name, tensor in dense.outside_layers():
            writer.add(placed(name), tensor)
        # not every runtime lets a target's output matrix be the embeddings, see `NativeTarget.tied`
        if dense.tied and not config["tie_word_embeddings"]:
            writer.add("lm_head.weight", dense["model.embed_tokens.weight"])
        slots, errors = [], []
        report(Progress("convert", 0, dense.num_layers))
        for layer_idx, ffn in enumerate(layers):
            for name, tensor in native_layer(dense, layer_idx, ffn, target):
                writer.add(placed(name), tensor)
            slots.append(ffn.partition.slots)
            error = ffn.error
            errors += [asdict(error)] if error else []
            note = f"held-out error {error.before:.3f} → {error.after:.3f}" if error else ""
            del ffn  # before the next layer is made, so that only one is in memory
            report(Progress("convert", layer_idx + 1, dense.num_layers, note))
        np.save(folder / PARTITION, np.array(slots, dtype=np.int32))
        record["source"]["sha256"] = hashes.result()
        if errors:
            record["fit_errors"] = errors  # by layer
        writer.finish(config)
    return config


def calibration_walk(
    replay: ModelReplay,
    recipe: ConvertRecipe,
    windows: Int[np.ndarray, "windows sequence"],
    scratch: Path | None = None,
) -> CalibrationWalk:
    """Return the tokens' way through the layers for a recipe; `scratch` as for the walk."""
    precision = training_precision("auto") if recipe.repair == "fit" else "float32"
    return CalibrationWalk(
        replay, windows, follow_dense=recipe.follows_dense, precision=precision, scratch=scratch
    )


def split_layers(
    dense: DenseCheckpoint,
    recipe: ConvertRecipe,
    walk: CalibrationWalk | None,
    score: RouterScore = "softmax",
    report: ProgressFn = silent,
    kept: Path | None = None,
) -> Iterator[SplitFfn]:
    """Split the FFNs in the order of the layers.

    With calibration tokens, each layer is fitted on the inputs that the layers already converted
    give it (see `CalibrationWalk`); without, only weight-only methods work. `report` is told about
    the importance pass alone. Layers that lie in the folder `kept` are taken from there, the others
    are put into it.

    Raises:
        CorpusError: an activation is not finite.
    """
    if walk is None:
        for layer_idx in range(dense.num_layers):
            # weight-only methods promise the same bytes whatever the number of threads
            with one_thread():  # sums in another order could give other experts
                alone = split_ffn(weights_alone(dense, layer_idx), recipe, layer_idx, score)
            yield alone
        return
    importance = None
    if recipe.needs_gradients:
        clusters = recipe.split.routed
        segments = window_importance(walk.replay, walk.windows, clusters, report=report)
        importance = importance_by_cluster(segments, clusters, seed=recipe.seed)
    with freed_memory_kept():
        for layer_idx in range(dense.num_layers):
            tokens = walk.enter(walk.replay.layer(layer_idx))
            file = kept / f"{layer_idx:03}.safetensors" if kept else None
            split = load_layer(file, recipe.split.chosen, score) if file else None
            if split is None:
                # the closed form needs few tokens, and its cost grows with them
                sample = tokens.sample(slice(min(recipe.refit_tokens, tokens.num_tokens)))
                if importance is not None:
                    sample.importance = importance[layer_idx]
                split = split_ffn(sample, recipe, layer_idx, score)
                del sample  # before the next one is made: a 7B layer's takes 2 GiB
                if recipe.repair == "fit":
                    split = fit_ffn(tokens, split, recipe, stream(recipe.seed, "fit", layer_idx))
                if file:
                    keep_layer(file, split)
            walk.leave(tokens, split)
            yield split
            del split


def _record(
    source: str | Path,
    dense: DenseCheckpoint,
    recipe: ConvertRecipe,
    data: str | Path,
    windows: Int[np.ndarray, "windows sequence"] | None,
) -> dict[str, Any]:
    """Return moefy.json: the recipe, the versions and the inputs' hashes.

    It has no times and no paths, so that the same conversion gives the same bytes on any machine.
    """
    record: dict[str, Any] = {
        "moefy": __version__,
        "stage": "convert",
        "recipe": recipe.model_dump(mode="json"),
        "source": {
            "name": name_of(source),
            **origin(source, dense.folder),
            "sha256": {},  # known when all files have been read
            "config": dense.config,
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
    }
    if windows is not None:
        # the same bytes on machines of either byte order
        read = hashlib.sha256(windows.astype("<i8").tobytes()).hexdigest()
        record["calibration"] = {"data": name_of(data), "tokens": windows.size, "sha256": read}
    return record
