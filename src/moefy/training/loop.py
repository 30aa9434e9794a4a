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
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from moefy.checkpoint.card import model_card
from moefy.checkpoint.cost import cost
from moefy.checkpoint.reader import read_config, side_files
from moefy.checkpoint.source import origin, resolve
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
from moefy.training.state import FINISHED, RunLog, RunState
from moefy.training.step import TRAINED_PASSES, peak_flops, train_step


class TrainingLoop:
    """A run's models and samples, its steps, its checkpoints, and the model that it writes.

    `stage` decides how the steps of the schedule are counted, `parent` is the teacher's folder
    (None without distillation), and the recipe's precision is decided.
    """

    def __init__(
        self,
        stage: Literal["train", "tune"],
        source: Path,
        parent: Path | None,
        samples: Samples,
        recipe: TrainRecipe,
        processes: Processes,
    ) -> None:
        self._stage, self._samples = stage, samples
        self.source, self.recipe, self.processes = source, recipe, processes
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
        heldout: Callable[[], Any],
        report: ProgressFn,
        *,
        first_line: dict[str, Any] | None = None,
    ) -> None:
        """Do the steps from `first_step` on, with a line of the log for each.

        `shown` becomes `recipe.yaml`, `heldout` returns the held-out loss at the recipe's interval,
        and `first_line` precedes the steps in the log of a fresh run.
        """
        recipe, num_steps = self.recipe, self.recipe.num_steps
        one_pass = cost(read_config(self.source), context=recipe.sequence_length)
        flops = TRAINED_PASSES * one_pass.flops_per_token
        peak = self.processes.size * peak_flops(recipe.precision)
        log = None
        if self.processes.is_first:
            replace_file(self._folder.work / "recipe.yaml", shown.to_yaml())
            log = RunLog(self._folder.work, first_step, recipe)
            if first_line and not first_step:
                log.write(first_line)
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
            line["mfu"] = flops * line["tokens_per_s"] / peak
            is_last, every = step + 1 == num_steps, recipe.evaluate_every_steps
            if every and ((step + 1) % every == 0 or is_last):
                line["heldout_loss"] = heldout()
            if log:
                log.write(line)
            note = f"loss {line['loss']:.3f}, {line['tokens_per_s']:,.0f} tokens/s"
            note += f", MFU {line['mfu']:.0%}"
            for name, epoch in line.get("repeats", {}).items():
                note += f"; {name} starts epoch {epoch + 1}"
            report(Progress(self._stage, step + 1, num_steps, note))
            every = recipe.checkpoint_every_steps
            # also behind the last step: writing the model may fail
            if every and (step + 1) % every == 0:
                self._state.save(step + 1, self._samples.state())
        if log:
            log.close()

    def write(
        self, record: dict[str, Any], *, amend: Callable[[Path], None] = lambda _: None
    ) -> None:
        """Put the trained model into the run's folder, in the dtype and the form of its source.

        `record` goes into moefy.json, between moefy's version and the source's own record; `amend`
        changes the folder of weights and tokenizer before it is moved into place.
        """
        network, source, config = self.student, self.source, read_config(self.source)
        finished = self._folder.work / FINISHED
        if self.recipe.lora:
            merge_adapters(network)
        self.processes.of_first(lambda: shutil.rmtree(finished, ignore_errors=True))
        with storage_errors(finished):
            _round_weights(network, config.get("dtype") or config.get("torch_dtype") or "float32")
            head = network.get_output_embeddings()
            if head.weight is network.get_input_embeddings().weight:
                head.weight = None  # a tied one, gathered from several processes, is written twice
            network.save_pretrained(finished)  # all processes gather
        self.processes.wait()

        def complete() -> None:
            with storage_errors(finished):
                earlier = source / "moefy.json"
                came_from = json.loads(earlier.read_text()) if earlier.is_file() else None
                packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
                whole = {"moefy": version("moefy"), **record, "versions": packages}
                whole["from"] = came_from
                for file in side_files(source):
                    shutil.copyfile(file, finished / file.name)
                amend(finished)
                card = model_card(whole, config, None if came_from else origin(source, source))
                (finished / "README.md").write_text(card)
                (finished / "moefy.json").write_text(json.dumps(whole, indent=2) + "\n")
                # other runtimes read spellings in it that transformers would not write again
                shutil.copyfile(source / "config.json", finished / "config.json")
            self._folder.publish(finished)
            self._folder.finish()

        self.processes.of_first(complete)


def resolve_first(model: str | Path, processes: Processes, report: ProgressFn) -> Path:
    """Resolve a model; the first process fetches what must be fetched."""
    processes.of_first(lambda: resolve(model, report=report))
    return resolve(model)


def _round_weights(network: Any, dtype: str) -> None:
    """Round the weights; buffers, as selection biases, keep what small steps have added up to."""
    kept = {name: buffer.clone() for name, buffer in network.named_buffers()}
    network.to(getattr(torch, dtype))
    for name, buffer in kept.items():
        module, _, own = name.rpartition(".")
        setattr(network.get_submodule(module), own, buffer)
