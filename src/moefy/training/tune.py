"""Instruction tuning: the loop of `train` over conversations, with the loss on the answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Unpack

from moefy.checkpoint.cost import ffn_shape
from moefy.checkpoint.load import load_tokenizer
from moefy.checkpoint.reader import fingerprint, read_config
from moefy.data.conversations import read_conversations
from moefy.data.examples import Example, make_examples
from moefy.data.template import ChatTemplate, chat_template, for_training
from moefy.errors import CorpusError, UsageError
from moefy.evaluation.heldout import heldout_losses
from moefy.hardware import freed_memory_kept, training_precision
from moefy.progress import ProgressFn, silent
from moefy.training.checks import check_context, check_model, check_run
from moefy.training.loop import TrainingLoop, resolve_first
from moefy.training.processes import ONE, Processes, join_processes
from moefy.training.recipe import (
    Lora,
    NoBalance,
    SwitchBalance,
    TrainRecipe,
    TuneRecipe,
    TuneSettings,
)
from moefy.training.samples import (
    CONVERSATIONS,
    ConversationSamples,
    best_fit,
    num_labels,
    padded_rows,
)
from moefy.training.state import SharedFolder, open_folder, read_log
from moefy.training.tuned_folder import finish_folder

BROKEN = "broken.txt"
_FREE = {"micro_batch_size", "parallel", "gradient_checkpointing", "checkpoint_every_steps"}
"""Keys that say how the work is cut and kept: a run may go on with others."""


@dataclass(frozen=True)
class Tuning:
    """What `tune` did.

    Attributes:
        folder: the tuned model, with `recipe.yaml`, `log.jsonl` and, where there is something to
            name, `broken.txt`.
        recipe: every choice that was made.
        chat_template: what the conversations were written in.
        conversations: trained on.
        cut: of those, longer than a sequence and cut there.
        broken: a line about each conversation that was left out: file, line, reason.
        steps: of the optimizer.
        resumed_from_step: 0 for a fresh run.
        heldout_before, heldout_after: mean loss of the assistant's tokens in held-out
            conversations, nats; None without any.
        heldout_tokens: how many those are.
        elapsed_s: seconds of this process's own steps.
    """

    folder: Path
    recipe: TuneRecipe
    chat_template: str
    conversations: int
    cut: int
    broken: list[str]
    steps: int
    resumed_from_step: int
    heldout_before: float | None
    heldout_after: float | None
    heldout_tokens: int
    elapsed_s: float


@dataclass(frozen=True)
class _Talks:
    """Conversations as tokens, in one template."""

    tokenizer: Any
    template: ChatTemplate
    trained: list[Example]
    heldout: list[Example]
    broken: list[str]


@freed_memory_kept()
def tune(
    model: str | Path,
    out: str | Path,
    *,
    data: str | Path,
    recipe: TuneRecipe | str | Path | None = None,
    overwrite: bool = False,
    report: ProgressFn = silent,
    **settings: Unpack[TuneSettings],
) -> Tuning:
    """Fine-tune a model on conversations and write it in the form it had.

    The loss is cross-entropy on what the assistant says, the end of its turn included; see
    `data.template.assistant_spans`. One conversation in twenty is held out; the loss on those is
    measured before and after. Broken conversations are left out and named in `broken.txt`.

    Processes and stopped runs are as in `train`.

    Args:
        model: a converted (or dense) model folder, or any source `convert` takes.
        out: the run's folder; the model appears in it when the run is complete.
        data: conversations; see `data.conversations.read_conversations`.
        recipe: a `TuneRecipe` or a YAML file with its keys.
        overwrite: replace a model in `out` when the new one is complete; begin an unfinished run
            again.
        report: told about progress.
        **settings: single `TuneRecipe` keys; they override the recipe.

    Raises:
        UsageError: recipe, model, conversations or output are not usable, or LoRA without peft.
        TrainingError: the loss is not finite; the last checkpoint is kept.
        StorageError: the disk is full; the last checkpoint is kept.
    """
    choice = TuneRecipe.build(recipe, **settings)
    choice = choice.model_copy(update={"precision": training_precision(choice.precision)})
    processes = join_processes(choice.parallel)
    report = report if processes.is_first else silent
    with open_folder(out, processes, overwrite=overwrite, sources=(model, data, recipe)) as folder:
        source = resolve_first(model, processes, report)
        config = read_config(source)
        check_context(config, choice.sequence_length, str(source))
        talks = _read(data, source, choice, report)
        samples = _samples(talks.trained, choice, processes)
        plan = as_training(choice, samples.num_steps, config)
        check_run(plan, processes.num_data)
        check_model(config, plan, str(source))
        loop = TrainingLoop("tune", source, None, samples, plan, processes)
        measure = partial(heldout_loss, loop.student, talks.heldout, choice, processes)
        identity = {
            "source": processes.of_first(lambda: fingerprint(source)),
            "data": str(data),
            "tokens": _digest(talks.trained),
            **choice.model_dump(mode="json", exclude=_FREE),
        }
        first_step = samples.num_steps
        if not folder.begin(identity):
            first_step = loop.resume(folder)
            first_line = None if first_step else {"step": 0, "heldout_loss": measure()}
            loop.run(first_step, choice, measure, report, first_line=first_line)
            record = {"stage": "tune", "run": identity, "result": _result(folder, talks, samples)}
            loop.write(record, amend=lambda finished: _finish(finished, config, talks))
        result = processes.of_first(lambda: _result(folder, talks, samples))
    return Tuning(
        folder=Path(out).expanduser(),
        recipe=choice,
        resumed_from_step=first_step,
        elapsed_s=loop.elapsed_s,
        **result | {"broken": talks.broken},
    )


def as_training(recipe: TuneRecipe, num_steps: int, config: Mapping[str, Any]) -> TrainRecipe:
    """Return the recipe of the loop that tunes.

    Args:
        recipe: of the tuning.
        num_steps: of the optimizer.
        config: config.json of the model.

    Raises:
        UsageError: the model has no routers to balance.
    """
    has_routers = bool(ffn_shape(config).experts)
    is_balanced = recipe.router == "balanced"
    if is_balanced and not has_routers:
        raise UsageError(
            f"a {config['model_type']} model has no routers to balance: leave router out"
        )
    lora = None
    if recipe.lora_rank:
        alpha = recipe.lora_alpha or 2.0 * recipe.lora_rank
        lora = Lora(rank=recipe.lora_rank, alpha=alpha, modules="all")
    same = {
        *("sequence_length", "global_batch_size", "micro_batch_size", "learning_rate", "seed"),
        *("warmup_fraction", "weight_decay", "max_grad_norm", "router_lr_scale", "precision"),
        *("parallel", "gradient_checkpointing", "checkpoint_every_steps"),
    }
    return TrainRecipe(
        **recipe.model_dump(include=same),
        tokens=num_steps * recipe.sequence_length * recipe.global_batch_size,
        min_lr_ratio=0.0,
        adam_betas=(0.9, 0.999),
        frozen=("routers",) if has_routers and not is_balanced else (),
        balance=SwitchBalance(coefficient=recipe.balance_coefficient, per_pass=True)
        if is_balanced
        else NoBalance(),
        lora=lora,
        checkpoints_kept=1,
        evaluate_every_steps=num_steps if recipe.heldout_conversations else 0,
    )


def heldout_loss(
    network: Any, examples: list[Example], recipe: TuneRecipe, processes: Processes = ONE
) -> float | None:
    """Return the mean loss of the assistant's tokens, every token counting the same, in nats."""
    if not examples:
        return None
    length = max(len(example.ids) for example in examples)
    rows = padded_rows([[example] for example in examples], height=len(examples), length=length)
    found = heldout_losses(
        network,
        {CONVERSATIONS: rows.tokens.numpy()},
        {CONVERSATIONS: rows.labels.numpy()},
        precision=recipe.precision,
        data_idx=processes.data_idx,
        num_data=processes.num_data,
        total=processes.total,
    )
    return found[CONVERSATIONS]


def _samples(
    trained: list[Example], recipe: TuneRecipe, processes: Processes
) -> ConversationSamples:
    rows = [[example] for example in trained]
    if recipe.packing:
        rows = best_fit(trained, recipe.sequence_length)
    return ConversationSamples(
        rows,
        epochs=recipe.epochs,
        seed=recipe.seed,
        global_batch_size=recipe.global_batch_size,
        micro_batch_size=recipe.micro_batch_size,
        processes=processes,
    )


def _read(data: str | Path, source: Path, recipe: TuneRecipe, report: ProgressFn) -> _Talks:
    """Return what is trained on, what is held out, and a line about everything broken.

    Raises:
        UsageError: tokenizer or template cannot tell what the assistant says.
        CorpusError: nothing is left to train on.
    """
    tokenizer = load_tokenizer(source)
    if not tokenizer.is_fast:
        raise UsageError(
            f"{source} has a slow tokenizer, which does not know where its tokens stand in the "
            "text: save it with a tokenizer.json"
        )
    template = for_training(tokenizer, chat_template(tokenizer, recipe.chat_template))
    conversations, broken = read_conversations(data)
    sides: list[list[Example]] = []
    for is_held_out in (False, True):
        side = [c for c in conversations if c.is_held_out == is_held_out]
        if is_held_out:
            side = side[: recipe.heldout_conversations]
        examples, unusable = make_examples(
            side, tokenizer, template, max_length=recipe.sequence_length, report=report
        )
        sides.append(examples)
        broken += unusable
    trained, heldout = sides
    if not trained:
        raise CorpusError(
            f"{data} holds no conversation to train on: "
            + (broken[0] if broken else "all of them are held out, add more")
        )
    return _Talks(tokenizer, template, trained, heldout, broken)


def _result(folder: SharedFolder, talks: _Talks, samples: ConversationSamples) -> dict[str, Any]:
    """Return what a finished run's record says of it."""
    log = read_log(folder.work)
    return {
        "chat_template": talks.template.name,
        "conversations": len(talks.trained),
        "cut": sum(example.is_cut for example in talks.trained),
        "broken": len(talks.broken),
        "steps": samples.num_steps,
        "heldout_before": log[0]["heldout_loss"],
        "heldout_after": log[-1].get("heldout_loss"),
        "heldout_tokens": num_labels(talks.heldout),
    }


def _finish(folder: Path, config: dict[str, Any], talks: _Talks) -> None:
    """Add to a written model what it was tuned to."""
    finish_folder(folder, config, talks.tokenizer, talks.template)
    if talks.broken:
        (folder / BROKEN).write_text("".join(f"{line}\n" for line in talks.broken))


def _digest(examples: list[Example]) -> str:
    tokens = json.dumps([(example.ids, example.labels) for example in examples])
    return hashlib.sha256(tokens.encode()).hexdigest()
