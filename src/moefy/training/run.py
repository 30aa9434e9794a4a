"""Continual pre-training on a mixture of domains."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Unpack

from moefy.checkpoint.reader import fingerprint, read_config
from moefy.checkpoint.source import dense_of, resolve
from moefy.data.corpus import heldout_of, open_corpus
from moefy.data.mixture import Mixture
from moefy.data.strategies import for_domains, initial_weights
from moefy.errors import CheckpointError, CorpusError, MoefyError, UsageError
from moefy.hardware import freed_memory_kept, training_precision
from moefy.progress import Progress, ProgressFn, silent
from moefy.run_folder import RunFolder
from moefy.storage import replace_file
from moefy.training.loop import TrainingLoop, resolve_first
from moefy.training.models import check_context, check_model, load_teacher
from moefy.training.processes import Processes, join_processes
from moefy.training.recipe import TrainRecipe, TrainSettings
from moefy.training.samples import Windows, WindowSamples, losses_of
from moefy.training.state import REFERENCE, begin, open_folder, read_log
from moefy.training.trackers import check_trackers

_STAGE = "measure on held-out text"
_MEASURED = 25  # a held-out sequence runs twice, through both models: as one training sequence


@dataclass(frozen=True)
class Training:
    """What `train` did."""

    folder: Path  # the trained model, with `recipe.yaml` and `log.jsonl`, one line a step
    recipe: TrainRecipe  # every choice that was made
    resumed_from_step: int  # 0 for a fresh run
    # KL(dense ‖ model) on held-out text, nats per token, the mean over domains; None where no dense
    # model is named or found, no text is held out, or nothing is measured
    kl_before: float | None
    kl_after: float | None
    heldout_before: float | None  # and the loss there
    heldout_after: float | None
    elapsed_s: float  # of this process's own steps


@freed_memory_kept()
def train(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path = "demo",
    recipe: TrainRecipe | str | Path | None = None,
    overwrite: bool = False,
    report: ProgressFn = silent,
    **settings: Unpack[TrainSettings],
) -> Training:
    """Continue pre-training on a mixture of domains and write the trained model.

    Weights and optimizer are float32; matrix products run in bfloat16 where the processor has them.
    Started by torchrun, every process makes the same call, and `recipe.parallel` says how they
    share the work. The same call continues a stopped run, bit for bit with as many processes.

    Args:
        model: a converted (or dense) model folder, or any source `convert` takes.
        out: the run's folder; the model appears in it when the run is complete.
        data: a folder that `prepare` wrote, a folder of `<domain>.jsonl(.gz)` files, or `demo`.
        recipe: a `TrainRecipe` or a YAML file with its keys.
        overwrite: replace a model in `out` when the new one is complete, or an unfinished run.
        report: told about progress, in the first process.
        **settings: single `TrainRecipe` keys; they override the recipe.

    Raises:
        UsageError: recipe, model, text, output or number of processes are not usable.
        TrainingError: the loss is not finite; the last checkpoint is kept.
        StorageError: the disk is full; the last checkpoint is kept.
    """
    choice = TrainRecipe.build(recipe, **settings)
    choice = choice.model_copy(update={"precision": training_precision(choice.precision)})
    check_trackers(choice)
    if choice.is_dynamic and choice.reference_losses == "dense" and choice.teacher is None:
        raise UsageError(
            f"{choice.mixture} compares the losses with the dense model's: name it with --teacher "
            "(with distillation.alpha 0 it is used for nothing else), or set reference_losses"
        )
    processes = join_processes(choice)
    report = report if processes.is_first else silent
    read = model, data, recipe, choice.teacher
    with open_folder(out, processes, overwrite=overwrite, sources=read) as folder:
        source, parent = resolve_first(model, processes, report), None
        check_model(read_config(source), choice, str(source))
        if choice.teacher:
            parent = resolve_first(choice.teacher, processes, report)
            check_context(read_config(parent), choice.sequence_length, str(parent))
        text, samples, heldout = _open_corpus(data, source, choice, processes, report)
        taught = parent if choice.distils else None  # else only its held-out losses are needed
        identity = {
            "source": processes.of_first(lambda: fingerprint(source)),
            "parent": processes.of_first(lambda: fingerprint(parent) if parent else None),
            "data": str(data),
            "text": text,
            **choice.identity(),
        }
        loop = TrainingLoop("train", source, taught, samples, choice, processes, identity)
        first_step = choice.num_steps  # of a run that was killed behind its last step
        if not begin(folder, identity, processes):
            first_step = loop.resume(folder, report)
            if choice.is_dynamic:
                samples.follow(heldout, _reference(folder, loop, heldout, first_step, report))
            dense = parent or (_recorded_dense(source, processes, report) if heldout else None)

            def measure() -> dict[str, Any]:
                if not heldout:
                    return {}
                report(Progress(_STAGE, 0, 1))
                # loaded each time: in training the memory is for gradients and activations
                compared = loop.teacher or (dense and load_teacher(dense, choice, processes))
                found = losses_of(loop.student, heldout, choice, processes, teacher=compared)
                line = {f"heldout_{key}": each for key, each in found._asdict().items() if each}
                note = ", ".join(f"{key} {fmean(each.values()):.3f}" for key, each in line.items())
                report(Progress(_STAGE, 1, 1, note))
                return line

            loop.run(first_step, choice, measure, report)
            loop.write(result=lambda: _result(folder))
        result = processes.of_first(lambda: _result(folder))
    return Training(folder.out, choice, first_step, **result, elapsed_s=loop.elapsed_s)


def _result(folder: RunFolder) -> dict[str, float | None]:
    """Return what the first and the last line of the log have measured on held-out text."""
    log = read_log(folder.work)
    found = {"kl": "heldout_kl", "heldout": "heldout_loss"}
    ends = {"before": log[0], "after": log[-1]}
    return {
        f"{name}_{end}": fmean(line[key].values()) if key in line else None
        for name, key in found.items()
        for end, line in ends.items()
    }


def _recorded_dense(source: Path, processes: Processes, report: ProgressFn) -> Path | None:
    """Return the dense model that the source was converted from, where all processes have it."""
    try:
        dense = processes.of_first(lambda: dense_of(source))
        is_here = (dense / "config.json").is_file()
        processes.agree(None if is_here else CheckpointError(f"{dense} is not on every machine"))
    except MoefyError as error:
        note = f"without the KL to the dense model, which --teacher may name: {error}"
        report(Progress("find the dense model", 1, 1, note))
        return None
    return dense


def _open_corpus(
    data: str | Path, source: Path, choice: TrainRecipe, processes: Processes, report: ProgressFn
) -> tuple[str, WindowSamples, Windows]:
    """Return the fingerprint of the text, samples, and held-out windows if they are needed."""
    corpus = open_corpus(
        data,
        source,
        sequence_length=choice.sequence_length,
        max_sequences=choice.num_steps * choice.global_batch_size,
        seed=choice.seed,
        report=report,
    )
    mixture = Mixture(
        {name: len(windows) for name, windows in corpus.train.items()},
        initial_weights(choice.mixture, corpus.train),
        seed=choice.seed,
        global_batch_size=choice.global_batch_size,
    )
    heldout: Windows = {}
    if choice.is_dynamic or choice.evaluate_every_steps != 0:
        weighted = [name for name, weight in mixture.weights.items() if weight > 0]
        share = choice.num_steps * choice.global_batch_size // (_MEASURED * len(weighted))
        count = choice.heldout_sequences or min(8, max(1, share))
        heldout, note = heldout_of(corpus, weighted, count)
        if note and choice.is_dynamic:
            raise CorpusError(note)
        if note:
            report(Progress("hold out text", 1, 1, note))
    return corpus.fingerprint, WindowSamples(corpus, mixture, choice, processes), heldout


def _reference(
    folder: RunFolder, loop: TrainingLoop, heldout: Windows, first_step: int, report: ProgressFn
) -> dict[str, float]:
    """Return the losses that a dynamic mixture compares its own with; a resumed run keeps them."""
    choice, processes, file = loop.recipe, loop.processes, folder.work / REFERENCE
    kept: dict[str, float] = processes.of_first(
        lambda: json.loads(file.read_text()) if first_step and file.is_file() else {}
    )
    if kept:
        return kept
    if choice.reference_losses != "dense":
        losses = for_domains(choice.reference_losses, heldout, "reference_losses")
    else:
        assert choice.teacher is not None
        report(Progress("measure the dense model", 0, 1))
        # a teacher that runs in every step is loaded already
        dense = loop.teacher or load_teacher(resolve(choice.teacher), choice, processes)
        losses = losses_of(dense, heldout, choice, processes).loss
        report(Progress("measure the dense model", 1, 1))
    processes.of_first(lambda: replace_file(file, json.dumps(dict(losses), indent=2) + "\n"))
    return losses
