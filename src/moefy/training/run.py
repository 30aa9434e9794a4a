"""Continual pre-training: one plain loop, the same for one process and for torchrun's many."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

from moefy.checkpoint.reader import fingerprint, read_config
from moefy.checkpoint.source import resolve
from moefy.data.corpus import heldout_of, open_corpus
from moefy.data.mixture import Mixture, MixtureState, WeightUpdate
from moefy.data.strategies import initial_weights
from moefy.hardware import freed_memory_kept, training_precision
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import check_output, put_in_place, replace_file, run_folder, storage_errors
from moefy.training.checks import check_batch, check_context, check_model
from moefy.training.follow import (
    Follower,
    check_reference,
    is_dynamic,
    keep_reference,
    kept_reference,
    losses_of,
    reference_losses,
)
from moefy.training.log import RunLog, check_trackers
from moefy.training.models import load_student, load_teacher, merge_adapters
from moefy.training.objective import Objective
from moefy.training.optimizer import build_optimizer
from moefy.training.processes import Workers, join_workers
from moefy.training.recipe import TrainRecipe, TrainSettings
from moefy.training.state import LOG, RunState, Saved, read_log, remove_state
from moefy.training.step import train_step
from moefy.training.throughput import flops_per_trained_token, peak
from moefy.training.write import versions, was_written, write_model


@dataclass(frozen=True)
class Training:
    """What `train` did.

    Attributes:
        folder: the trained model, with `recipe.yaml`, `log.jsonl` (one line a step) and figures.
        recipe: every choice that was made.
        resumed_from_step: 0 for a fresh run.
        first_loss, last_loss: training loss of the first and the last step, nats per token.
        elapsed_s: seconds of this process's own steps.
    """

    folder: Path
    recipe: TrainRecipe
    resumed_from_step: int
    first_loss: float
    last_loss: float
    elapsed_s: float


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

    What is minimised is in `training.objective`. Weights and optimizer are float32; matrix products
    run in bfloat16 where the processor has them. One document in twenty is held out (see
    `data.domains.is_held_out`).

    Started by torchrun, every process calls this with the same arguments, and `recipe.parallel`
    says how they share the work. A run that was stopped goes on when the same call is made again,
    with the same result, bit for bit, on the same machine with as many processes. The model appears
    in `out` when the run is complete.

    Args:
        model: a converted (or dense) model folder, or any source `convert` takes.
        out: the run's folder.
        data: a folder that `prepare` wrote, a folder of `<domain>.jsonl(.gz)` files, or `demo`.
        recipe: a `TrainRecipe` or a YAML file with its keys.
        overwrite: replace what is in `out`: a model when the new one is complete; until then the
            run lies beside it, in `.NAME.next`, where the same call goes on. An unfinished run is
            begun again.
        report: told about progress, in the first process.
        **settings: single `TrainRecipe` keys; they override the recipe.

    Raises:
        UsageError: recipe, model, text or output are not usable, or the processes are not those
            that the recipe asks for.
        TrainingError: the loss is not finite; the last checkpoint is kept.
        StorageError: the disk is full; the last checkpoint is kept.
    """
    out = Path(out).expanduser()
    choice = TrainRecipe.build(recipe, **settings)
    choice = choice.model_copy(update={"precision": training_precision(choice.precision)})
    check_reference(choice)
    check_trackers(choice)
    workers = join_workers(choice.parallel)
    check_batch(choice, workers.num_data)
    report = report if workers.is_first else silent
    folder = workers.of_first(run_folder(out, overwrite=overwrite) if workers.is_first else None)
    is_beside = folder != out
    is_fresh = workers.of_first((overwrite and not is_beside) or not _is_unfinished(folder))
    if is_fresh or is_beside:
        read = (model, data, recipe, choice.teacher, choice.reference_losses)
        sources = tuple(Path(path).expanduser() for path in read if isinstance(path, str | Path))
        check_output(out, overwrite=overwrite, sources=sources)
    source = _resolved(model, workers, report)
    check_model(read_config(source), choice, str(source))
    parent = _resolved(choice.teacher, workers, report) if choice.teacher else None
    if parent is not None:
        check_context(read_config(parent), choice.sequence_length, str(parent))
    corpus = open_corpus(
        data,
        source,
        sequence_length=choice.sequence_length,
        max_sequences=choice.num_steps * choice.global_batch_size,
        report=report,
    )
    mixture = Mixture(
        corpus.num_sequences,
        initial_weights(choice.mixture, corpus.num_sequences, normalise=choice.normalise_weights),
        seed=choice.seed,
        global_batch_size=choice.global_batch_size,
    )
    follows = is_dynamic(choice)
    weighted = [name for name, weight in mixture.weights.items() if weight > 0]
    heldout = {}
    if follows or choice.evaluate_every_steps:
        heldout = heldout_of(corpus, weighted, choice.heldout_sequences)
    student = load_student(source, choice, workers)
    teacher = None
    if choice.distils:
        assert parent is not None
        teacher = load_teacher(parent, choice, workers)
    objective = Objective(student, teacher, choice, workers)
    optimizer = build_optimizer(student, objective.noise, choice)
    identity = {
        "source": workers.of_first(fingerprint(source) if workers.is_first else None),
        "parent": workers.of_first(fingerprint(parent) if parent and workers.is_first else None),
        "data": str(data),
        "text": corpus.fingerprint,
        **choice.identity(),
    }
    if is_beside and workers.of_first(workers.is_first and was_written(folder, identity)):
        return _finish(folder, out, choice, workers, choice.num_steps, 0.0)  # killed just before
    state = RunState(
        folder,
        identity=identity,
        modules={"model": student} | ({"noise": objective.noise} if objective.noise else {}),
        optimizer=optimizer,
        workers=workers,
        kept=choice.checkpoints_kept,
    )
    saved = None if is_fresh else state.load(or_begin_again=is_beside)
    first_step = saved.step if saved else 0
    if saved:
        mixture.restore(MixtureState(**saved.mixture))
    follower = None
    if follows:
        kept = workers.of_first(kept_reference(folder) if saved and workers.is_first else {})
        reference = kept or reference_losses(heldout, teacher, source, choice, workers, report)
        follower = Follower(mixture, heldout, reference, choice, workers)
    begins_again = is_fresh or (is_beside and saved is None)
    if begins_again and workers.is_first:  # only now is it sure that this run can begin
        shutil.rmtree(folder, ignore_errors=True)
    workers.wait()
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    log = None
    if workers.is_first:
        log = RunLog(folder, read_log(folder)[:first_step] if first_step else [], choice)
        replace_file(folder / "recipe.yaml", choice.to_yaml())
        if follower:
            keep_reference(folder, reference)
    flops = flops_per_trained_token(read_config(source), choice.sequence_length)
    peak_flops = workers.size * peak(choice.precision).flops_per_s

    elapsed_s = 0.0
    update: WeightUpdate | None = WeightUpdate(0, mixture.weights, {}, {})
    for step in range(first_step, choice.num_steps):
        if step:
            update = follower.update(student) if follower else None
        started = time.perf_counter()
        batch = mixture.next_batch()
        line = train_step(step, objective, optimizer, batch, corpus, choice, workers)
        seconds = time.perf_counter() - started
        elapsed_s += seconds
        line["tokens_per_s"] = choice.tokens_per_step / seconds
        line["mfu"] = flops * line["tokens_per_s"] / peak_flops
        if update:
            line["mixture"] = asdict(update)
        if batch.repeats:
            line["repeats"] = dict(batch.repeats)
        every = choice.evaluate_every_steps
        if every and ((step + 1) % every == 0 or step + 1 == choice.num_steps):
            line["heldout_loss"] = losses_of(student, heldout, choice, workers)
        if log:
            log.write(line)
        report(Progress("train", step + 1, choice.num_steps, _note(line)))
        every = choice.checkpoint_every_steps
        if every and (step + 1) % every == 0 and step + 1 < choice.num_steps:
            state.save(Saved(step + 1, asdict(mixture.state())))
    if log:
        log.close()
    if choice.lora:
        merge_adapters(student)
    record = {
        "stage": "train",
        "run": identity,
        "versions": versions("torch", "transformers", "numpy"),
    }
    write_model(student, source, folder, record, workers)
    return _finish(folder, out, choice, workers, first_step, elapsed_s)


def _finish(
    folder: Path,
    out: Path,
    choice: TrainRecipe,
    workers: Workers,
    first_step: int,
    elapsed_s: float,
) -> Training:
    """Put the folder of a written model in its place and draw its figures."""
    lines = workers.of_first(read_log(folder) if workers.is_first else None)
    if workers.is_first:
        remove_state(folder)
        put_in_place(folder, out)
        from moefy.report.training_charts import draw_training

        draw_training(out)
    return Training(out, choice, first_step, lines[0]["loss"], lines[-1]["loss"], elapsed_s)


def _note(line: dict[str, Any]) -> str:
    note = f"loss {line['loss']:.3f}, {line['tokens_per_s']:,.0f} tokens/s, MFU {line['mfu']:.0%}"
    for name, epoch in line.get("repeats", {}).items():
        note += f"; {name} begins again ({epoch + 1}. time)"
    return note


def _is_unfinished(out: Path) -> bool:
    # not by recipe.yaml: a corpus that `prepare` wrote has one too
    return (out / LOG).is_file() and not (out / "config.json").exists()


def _resolved(model: str | Path, workers: Workers, report: ProgressFn) -> Path:
    """Resolve a model; the first process fetches what must be fetched."""
    if workers.is_first:
        resolve(model, report=report)
    workers.wait()
    return resolve(model)
