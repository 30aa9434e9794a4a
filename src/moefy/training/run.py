"""Continual pre-training: one plain loop, the same for one process and for torchrun's many."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moefy.checkpoint.load import device, training_precision
from moefy.checkpoint.reader import fingerprint, read_config
from moefy.checkpoint.source import resolve
from moefy.data.corpus import Corpus, heldout_of, open_corpus
from moefy.data.mixture import Batch, Mixture, MixtureState, WeightUpdate
from moefy.data.strategies import initial_weights
from moefy.errors import TrainingError
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import check_output, replace_file, storage_errors
from moefy.training.checks import check_batch, check_model
from moefy.training.follow import (
    Follower,
    check_reference,
    is_dynamic,
    keep_reference,
    kept_reference,
    reference_losses,
)
from moefy.training.heldout import heldout_losses
from moefy.training.log import RunLog, check_trackers
from moefy.training.models import load_student, load_teacher, merge_adapters
from moefy.training.objective import Objective, StepLosses
from moefy.training.optimizer import build_optimizer, clip_gradients
from moefy.training.recipe import TrainRecipe
from moefy.training.schedule import learning_rate
from moefy.training.state import LOG, RunState, Saved, read_log, remove_state
from moefy.training.throughput import flops_per_trained_token, peak
from moefy.training.workers import Workers, join_workers
from moefy.training.write import write_model

_NAMED = 32  # sequences of a batch in an error


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


def train(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path = "demo",
    recipe: str | Path | None = None,
    overwrite: bool = False,
    report: ProgressFn = silent,
    **choices: Any,
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
        recipe: a YAML file with `TrainRecipe` keys.
        overwrite: replace what is in `out`.
        report: told about progress, in the first process.
        **choices: single `TrainRecipe` keys; they override the file.

    Raises:
        UsageError: recipe, model, text or output are not usable, or the processes are not those
            that the recipe asks for.
        TrainingError: the loss is not finite; the last checkpoint is kept.
        StorageError: the disk is full; the last checkpoint is kept.
    """
    out = Path(out).expanduser()
    choice = TrainRecipe.build(recipe, **choices)
    choice = choice.model_copy(update={"precision": training_precision(choice.precision)})
    check_reference(choice)
    check_trackers(choice)
    workers = join_workers(choice.parallel)
    check_batch(choice, workers.num_data)
    report = report if workers.is_first else silent
    is_fresh = workers.of_first(overwrite or not _is_unfinished(out))
    if is_fresh:
        read = (model, data, recipe, choice.teacher, choice.reference_losses)
        sources = tuple(Path(path).expanduser() for path in read if path)
        check_output(out, overwrite=overwrite, sources=sources)
    source = _resolved(model, workers, report)
    check_model(read_config(source), choice, str(source))
    corpus = open_corpus(
        data,
        source,
        sequence_length=choice.sequence_length,
        max_sequences=choice.num_steps * choice.sequences_per_step,
        report=report,
    )
    mixture = Mixture(
        corpus.num_sequences,
        initial_weights(choice.mixture, corpus.num_sequences, normalise=choice.normalise_weights),
        seed=choice.seed,
        sequences_per_step=choice.sequences_per_step,
    )
    follows = is_dynamic(choice)
    weighted = [name for name, weight in mixture.weights.items() if weight > 0]
    heldout = {}
    if follows or choice.evaluate_every_steps:
        heldout = heldout_of(corpus, weighted, choice.heldout_sequences)
    student = load_student(source, choice, workers)
    teacher = None
    parent = _resolved(choice.teacher, workers, report) if choice.teacher else None
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
    state = RunState(
        out,
        identity=identity,
        modules={"model": student} | ({"noise": objective.noise} if objective.noise else {}),
        optimizer=optimizer,
        workers=workers,
        kept=choice.checkpoints_kept,
    )
    saved = None if is_fresh else state.load()
    first_step = saved.step if saved else 0
    if saved:
        mixture.restore(MixtureState(**saved.mixture))
    follower = None
    if follows:
        kept = workers.of_first(kept_reference(out) if saved and workers.is_first else {})
        reference = kept or reference_losses(heldout, teacher, source, choice, workers, report)
        follower = Follower(mixture, heldout, reference, choice, workers)
    if is_fresh and workers.is_first:  # only now is it sure that this run can begin
        shutil.rmtree(out, ignore_errors=True)
    workers.wait()
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    log = None
    if workers.is_first:
        log = RunLog(out, read_log(out)[:first_step] if first_step else [], choice)
        replace_file(out / "recipe.yaml", choice.to_yaml())
        if follower:
            keep_reference(out, reference)
    flops = flops_per_trained_token(read_config(source), choice.sequence_length)
    peak_flops = workers.size * peak(choice.precision).flops_per_s

    elapsed_s = 0.0
    update: WeightUpdate | None = WeightUpdate(0, mixture.weights, {}, {})
    for step in range(first_step, choice.num_steps):
        if step:
            update = follower.update(student) if follower else None
        started = time.perf_counter()
        batch = mixture.next_batch()
        line = _step(step, student, objective, optimizer, batch, corpus, choice, workers)
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
            line["heldout_loss"] = heldout_losses(
                student,
                heldout,
                workers,
                sequences_per_pass=choice.sequences_per_pass,
                precision=choice.precision,
            )
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
    write_model(student, source, out, identity, workers)
    lines = workers.of_first(read_log(out) if log else None)
    if workers.is_first:
        remove_state(out)
        _draw(lines, out)
    return Training(out, choice, first_step, lines[0]["loss"], lines[-1]["loss"], elapsed_s)


def _step(
    step: int,
    student: Any,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    corpus: Corpus,
    recipe: TrainRecipe,
    workers: Workers,
) -> dict[str, Any]:
    """Do one optimizer step and return its line of the log."""
    rate = learning_rate(
        step,
        recipe.num_steps,
        peak=recipe.learning_rate,
        warmup_fraction=recipe.warmup_fraction,
        final_fraction=recipe.final_learning_rate_fraction,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_fraction"]
    mine = batch.of_worker(workers.data_idx, workers.num_data)
    with _randomness_of(recipe.seed, step, workers), objective.step() as passes:
        for first in range(0, len(mine), recipe.sequences_per_pass):
            samples = mine[first : first + recipe.sequences_per_pass]
            ids = np.stack([corpus.sequence(name, idx) for name, idx, _ in samples])
            tokens = torch.from_numpy(ids).to(device())
            with torch.autocast(
                tokens.device.type, torch.bfloat16, enabled=recipe.precision == "bfloat16"
            ):
                loss = passes.loss(tokens)
            loss.backward()
    objective.reduce_noise_gradients()
    if step < recipe.router_warmup_fraction * recipe.num_steps:
        for group in optimizer.param_groups:
            if not group["is_router"]:
                for parameter in group["params"]:
                    parameter.grad = None
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = float(clip_gradients(learned, recipe.clip_grad_norm))
    line = {
        "step": step + 1,
        "tokens": (step + 1) * recipe.tokens_per_step,
        **_losses(passes.done, batch, mine, workers),
        "learning_rate": rate,
        "grad_norm": grad_norm,
    }
    if not (line["loss"] < float("inf") and grad_norm < float("inf")):
        drawn = ", ".join(f"{name}[{idx}]" for name, idx, _ in batch.samples[:_NAMED])
        if len(batch.samples) > _NAMED:
            drawn += f" and {len(batch.samples) - _NAMED} more"
        raise TrainingError(
            f"step {step + 1}: loss {line['loss']}, gradient norm {grad_norm}, on the sequences "
            f"{drawn} of {recipe.sequence_length} tokens: lower --learning-rate, or look at these "
            "documents; the last checkpoint is kept"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    objective.after_step(passes.done)
    return line


def _losses(
    done: StepLosses, batch: Batch, mine: tuple[Any, ...], workers: Workers
) -> dict[str, Any]:
    """Put together what all workers' passes came to."""
    names = sorted({sample.domain for sample in batch.samples})
    by_domain = torch.zeros(2, len(names), dtype=torch.float64)
    for sample, loss in zip(mine, torch.stack(done.cross_entropy).double().cpu(), strict=True):
        idx = names.index(sample.domain)
        by_domain[0, idx] += loss
        by_domain[1, idx] += 1
    sums, counts = workers.total(by_domain.to(device())).cpu()
    line: dict[str, Any] = {
        "loss": float(sums.sum()) / len(batch.samples),
        "domain_loss": {name: float(sums[i] / counts[i]) for i, name in enumerate(names)},
    }
    for name in ("kl", "layer_loss"):
        if name in done.terms:
            line[name] = float(workers.total(done.terms[name])) / workers.num_data
    for name in ("balance_loss", "z_loss"):
        if name in done.terms:
            line[name] = float(done.terms[name])
    if done.router is not None:
        load = done.router.shares().double().cpu()
        entropy = torch.special.entr(load).sum(-1) / np.log(load.shape[-1])
        line["router_entropy"] = [round(x, 5) for x in entropy.tolist()]
        line["expert_load"] = [[round(x, 5) for x in row] for row in load.tolist()]
    return line


def _draw(log: list[dict[str, Any]], out: Path) -> None:
    from moefy.report.figures import training_figures

    for name, figure in training_figures(log, kept_reference(out)).items():
        with storage_errors(out):
            figure.savefig(out / name, dpi=150)


def _note(line: dict[str, Any]) -> str:
    note = f"loss {line['loss']:.3f}, {line['tokens_per_s']:,.0f} tokens/s, MFU {line['mfu']:.0%}"
    for name, epoch in line.get("repeats", {}).items():
        note += f"; {name} begins again ({epoch + 1}. time)"
    return note


@contextmanager
def _randomness_of(seed: int, step: int, workers: Workers) -> Iterator[None]:
    """Give a step its own dropout and noise, so that a resumed run draws the same."""
    own = device()
    with torch.random.fork_rng(devices=[own] if own.type == "cuda" else []):
        torch.manual_seed(((seed * 1_000_003 + step) * 4099 + workers.data_idx) % 2**63)
        yield


def _is_unfinished(out: Path) -> bool:
    # not by recipe.yaml: a corpus that `prepare` wrote has one too
    return (out / LOG).is_file() and not (out / "config.json").exists()


def _resolved(model: str | Path, workers: Workers, report: ProgressFn) -> Path:
    """Resolve a model; the first process fetches what must be fetched."""
    if workers.is_first:
        resolve(model, report=report)
    workers.wait()
    return resolve(model)
