"""The training loop of `train` and `tune`: the same for one process and for torchrun's many.

transformers' Trainer and TRL were tried for `tune`: transformers 5.23 saves fused experts in their
on-disk form and does not find them when it resumes, its checkpoints are pickles, and its balance
loss pools the tokens of all layers. One loop resumes exactly, and shares work among processes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from moefy.checkpoint.card import model_card, read_record
from moefy.checkpoint.load import mended_generation
from moefy.checkpoint.reader import GENERATION, read_config, side_files, weight_files
from moefy.checkpoint.source import name_of, origin, resolve
from moefy.errors import CheckpointError
from moefy.progress import Progress, ProgressFn
from moefy.recipe import Recipe
from moefy.run_folder import RunFolder
from moefy.storage import replace_file, storage_errors
from moefy.training.models import load_student, load_teacher, merge_adapters
from moefy.training.objective import Objective
from moefy.training.optimizer import build_optimizer, learning_rate
from moefy.training.processes import Processes
from moefy.training.recipe import TrainRecipe
from moefy.training.samples import Samples
from moefy.training.state import FINISHED, LOG, RunState, log_step
from moefy.training.step import train_step
from moefy.training.trackers import numbers, open_trackers
from moefy.version import __version__


class TrainingLoop:
    """A run's models and samples, its steps, its checkpoints, and the model that it writes.

    `stage` decides how the steps of the schedule are counted, `parent` is the teacher's folder
    (None without distillation), the recipe's precision is decided, and `identity` goes into
    moefy.json. What `write` needs of the source is read here, so that no training ends in it.
    """

    def __init__(
        self,
        stage: Literal["train", "tune"],
        source: Path,
        parent: Path | None,
        samples: Samples,
        recipe: TrainRecipe,
        processes: Processes,
        identity: dict[str, Any],
    ) -> None:
        self._stage, self._samples, self._identity = stage, samples, identity
        self.source, self.recipe, self.processes = source, recipe, processes
        self._source_files = processes.of_first(lambda: _Source.read(source, stage, identity))
        self.student = load_student(source, recipe, processes)
        self.teacher = load_teacher(parent, recipe, processes) if parent else None
        self._objective = Objective(self.student, self.teacher, recipe, processes)
        self._optimizer = build_optimizer(self.student, self._objective.noise, recipe)
        self.elapsed_s = 0.0  # of this process's own steps

    def resume(self, folder: RunFolder, report: ProgressFn) -> int:
        """Go on from the last whole checkpoint in a folder; return the first step to do."""
        self._folder, noise = folder, self._objective.noise
        learned = {"model": self.student} | ({"noise": noise} if noise else {})
        kept = self.recipe.checkpoints_kept
        self._state = RunState(folder, learned, self._optimizer, self.processes, kept=kept)
        step, samples = self._state.load() or (0, None)
        if samples:
            self._samples.restore(samples)
        for damage in self._state.damaged:
            report(Progress("resume", step, step, f"passed over {damage}"))
        return step

    def run(
        self,
        first_step: int,
        shown: Recipe,
        heldout: Callable[[], dict[str, Any]],
        report: ProgressFn,
    ) -> None:
        """Do the steps from `first_step` on, with a line of the log for each.

        `shown` becomes `recipe.yaml`. What `heldout` measures, if anything, is in the log before
        the first step, in the line of step 0, and behind every interval of the recipe and the last.
        """
        recipe, num_steps = self.recipe, self.recipe.num_steps
        every = recipe.checkpoint_every_steps
        num_saved = num_steps // every - first_step // every if every else 0
        model_bytes = self._source_files.weights_bytes
        self.processes.of_first(lambda: self._state.require_space(num_saved, model_bytes))
        if names := self._source_files.left_out:
            note = f"without {', '.join(names)}: they mean nothing beside its other keys"
            report(Progress(f"read {GENERATION}", 1, 1, note))
        work, writes = self._folder.work, self.processes.is_first
        trackers = open_trackers(work, first_step, recipe) if writes else []
        if writes:
            replace_file(work / "recipe.yaml", shown.to_yaml())
        interval = recipe.evaluate_every_steps
        interval = num_steps if interval is None else interval
        if not first_step:  # else the log is the checkpoint's, without later steps
            begun = heldout() if interval else {}
            if writes:
                replace_file(work / LOG, json.dumps({"step": 0, **begun}) + "\n" if begun else "")
        for step in range(first_step, num_steps):
            samples = self._samples.next_step(self.student)
            rate = learning_rate(
                step,
                num_steps,
                peak=recipe.learning_rate,
                warmup_fraction=recipe.warmup_fraction,
                final_fraction=recipe.min_lr_ratio,
                as_trainer=self._stage == "tune",
            )
            started = time.perf_counter()
            losses = train_step(step, rate, self._objective, self._optimizer, samples)
            seconds = time.perf_counter() - started
            self.elapsed_s += seconds
            line = {"step": step + 1, "tokens": self._samples.tokens, **losses, **samples.notes}
            line["tokens_per_s"] = samples.num_tokens / seconds
            if interval and ((step + 1) % interval == 0 or step + 1 == num_steps):
                line |= heldout()
            if writes:
                log_step(work, line)
            for tracker in trackers:
                tracker.log(dict(numbers(line)), step=step + 1)
            note = f"loss {line['loss']:.3f}, {line['tokens_per_s']:,.0f} tokens/s"
            for name, epoch in line.get("epochs", {}).items():
                note += f"; {name} in epoch {epoch + 1}"
            report(Progress(self._stage, step + 1, num_steps, note))
            # also behind the last step: writing the model may fail
            if every and (step + 1) % every == 0:
                self._state.save(step + 1, self._samples.state())
        for tracker in trackers:
            tracker.finish()

    def write(
        self,
        *,
        result: Callable[[], dict[str, Any]] | None = None,
        amend: Callable[[Path], None] = lambda _: None,
    ) -> None:
        """Put the trained model into the run's folder, in the dtype and the form of its source.

        What `result` returns goes into moefy.json; `amend` changes the folder of weights and
        tokenizer before it is moved into place.
        """
        network, files = self.student, self._source_files
        finished = self._folder.work / FINISHED
        if self.recipe.lora:
            merge_adapters(network)
        self.processes.of_first(lambda: shutil.rmtree(finished, ignore_errors=True))
        with storage_errors(finished):
            _round_weights(network, files.dtype)
            head = network.get_output_embeddings()
            if head.weight is network.get_input_embeddings().weight:
                head.weight = None  # a tied one, gathered from several processes, is written twice
            network.save_pretrained(finished)  # all processes gather
        self.processes.wait()

        def complete() -> None:
            with storage_errors(finished):
                for name, content in files.beside.items():
                    (finished / name).write_bytes(content)
                amend(finished)
                record = _record(self._stage, self._identity, files.came_from, result and result())
                (finished / "moefy.json").write_text(json.dumps(record, indent=2) + "\n")
            self._folder.publish(finished)
            self._folder.finish()

        self.processes.of_first(complete)


@dataclass(frozen=True)
class _Source:
    """What of a source goes into the trained model's folder besides the weights."""

    beside: dict[str, bytes]  # files by name: tokenizer, config.json, the new README.md
    left_out: list[str]  # of its generation_config.json, see `mended_generation`
    came_from: dict[str, Any] | None  # its moefy.json
    dtype: torch.dtype
    weights_bytes: int

    @classmethod
    def read(cls, source: Path, stage: str, identity: dict[str, Any]) -> _Source:
        """Read it, and raise CheckpointError for what could not be written behind the last step."""
        config, came_from = read_config(source), read_record(source)
        beside = {file.name: file.read_bytes() for file in side_files(source)}
        settings, left_out = mended_generation(source)
        if left_out:
            beside[GENERATION] = (json.dumps(settings, indent=2) + "\n").encode()
        # other runtimes read spellings in it that transformers would not write again
        beside["config.json"] = (source / "config.json").read_bytes()
        dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise CheckpointError(f"{source} has the dtype {dtype}: write float32 or bfloat16")
        described = None if came_from else origin(source, source)
        card = model_card(_record(stage, identity, came_from), config, described)
        beside["README.md"] = card.encode()
        size = sum((source / name).stat().st_size for name in weight_files(source))
        return cls(beside, left_out, came_from, getattr(torch, dtype), size)


def _record(
    stage: str,
    identity: dict[str, Any],
    came_from: dict[str, Any] | None,
    result: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return moefy.json: what was done, with which versions, and the source's own moefy.json."""
    places = ("data", "teacher", "chat_template")
    named = {key: name_of(identity[key]) for key in places if identity.get(key)}
    return {
        "moefy": __version__,
        "stage": stage,
        "run": identity | named,
        **({"result": result} if result else {}),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "from": came_from,
    }


def resolve_first(model: str | Path, processes: Processes, report: ProgressFn) -> Path:
    """Resolve a model; the first process fetches what must be fetched."""
    processes.of_first(lambda: resolve(model, report=report))
    return resolve(model)


def _round_weights(network: Any, dtype: torch.dtype) -> None:
    """Round the weights; buffers, as selection biases, keep what small steps have added up to."""
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.to(dtype)
    for name, buffer in kept.items():
        module, _, own = name.rpartition(".")
        setattr(network.get_submodule(module), own, buffer)
