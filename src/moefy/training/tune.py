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
from moefy.data.template import (
    ChatTemplate,
    Example,
    chat_template,
    end_of_turn,
    for_training,
    make_examples,
)
from moefy.errors import CorpusError, UsageError
from moefy.hardware import freed_memory_kept, training_precision
from moefy.progress import ProgressFn, silent
from moefy.run_folder import RunFolder
from moefy.training.loop import TrainingLoop, resolve_first
from moefy.training.models import check_model
from moefy.training.processes import ONE, Processes, join_processes
from moefy.training.recipe import (
    LoopSettings,
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
    losses_of,
    num_labels,
    padded_rows,
)
from moefy.training.state import begin, open_folder, read_log


@dataclass(frozen=True)
class Tuning:
    """What `tune` did."""

    folder: Path  # the tuned model, with `recipe.yaml`, `log.jsonl` and perhaps `broken.txt`
    recipe: TuneRecipe  # every choice that was made
    chat_template: str  # in which the conversations were written
    conversations: int  # trained on
    cut: int  # of those, longer than a sequence and cut there
    broken: list[str]  # of each conversation that was left out: file, line, reason
    steps: int  # of the optimizer
    resumed_from_step: int  # 0 for a fresh run
    heldout_before: float | None  # loss of held-out answers, nats per token; None without any
    heldout_after: float | None
    heldout_tokens: int  # how many those are
    elapsed_s: float  # of this process's own steps


@dataclass(frozen=True)
class _Talks:
    """Conversations as tokens, in one template."""

    template: ChatTemplate
    end: int | None  # token behind an assistant's turn
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
    measured before and after. Processes and stopped runs are as in `train`.

    `data` are conversations (see `data.conversations.read_conversations`), of which broken ones are
    left out; `settings` are single keys of the recipe. All other arguments are those of `train`.

    Raises:
        UsageError: recipe, model, conversations or output are not usable, or LoRA without peft.
        TrainingError: the loss is not finite; the last checkpoint is kept.
        StorageError: the disk is full; the last checkpoint is kept.
    """
    choice = TuneRecipe.build(recipe, **settings)
    choice = choice.model_copy(update={"precision": training_precision(choice.precision)})
    processes = join_processes(choice)
    report = report if processes.is_first else silent
    with open_folder(out, processes, overwrite=overwrite, sources=(model, data, recipe)) as folder:
        source = resolve_first(model, processes, report)
        config = read_config(source)
        check_model(config, choice, str(source))
        talks = _read(data, source, choice, report)
        samples = ConversationSamples(talks.trained, choice, processes)
        plan = as_training(choice, samples.num_steps, config)
        tokens = json.dumps([(example.ids, example.labels) for example in talks.trained])
        identity = {
            "source": processes.of_first(lambda: fingerprint(source)),
            "data": str(data),
            "tokens": hashlib.sha256(tokens.encode()).hexdigest(),
            **choice.identity(),
        }
        loop = TrainingLoop("tune", source, None, samples, plan, processes, identity)

        def measure() -> dict[str, Any]:
            loss = heldout_loss(loop.student, talks.heldout, plan, processes)
            return {} if loss is None else {"heldout_loss": loss}

        first_step = samples.num_steps
        if not begin(folder, identity, processes):
            first_step = loop.resume(folder, report)
            loop.run(first_step, choice, measure, report)
            loop.write(
                result=lambda: _result(folder, talks, samples),
                amend=lambda finished: _finish(finished, config, talks),
            )
        result = processes.of_first(lambda: _result(folder, talks, samples))
    result |= {"broken": talks.broken, "resumed_from_step": first_step}
    return Tuning(folder.out, choice, elapsed_s=loop.elapsed_s, **result)


def as_training(recipe: TuneRecipe, num_steps: int, config: Mapping[str, Any]) -> TrainRecipe:
    """Return the recipe of the loop that tunes a model of this config.json."""
    has_routers = bool(ffn_shape(config).experts)
    is_balanced = recipe.router == "balanced"
    if is_balanced and not has_routers:
        raise UsageError(
            f"a {config['model_type']} model has no routers to balance: leave router out"
        )
    rank, alpha = recipe.lora_rank, recipe.lora_alpha or 2.0 * recipe.lora_rank
    lora = Lora(rank=rank, alpha=alpha, modules="all") if rank else None
    return TrainRecipe(
        **recipe.model_dump(include=set(LoopSettings.__annotations__)),
        tokens=num_steps * recipe.sequence_length * recipe.global_batch_size,
        min_lr_ratio=0.0,
        adam_betas=(0.9, 0.999),  # torch's own, which are usual for this step
        frozen=("routers",) if has_routers and not is_balanced else (),
        # per pass, as transformers' Trainer has it
        balance=SwitchBalance(coefficient=recipe.balance_coefficient, per_pass=True)
        if is_balanced
        else NoBalance(),
        lora=lora,
        checkpoints_kept=1,
    )


def heldout_loss(
    network: Any, examples: list[Example], recipe: TrainRecipe, processes: Processes = ONE
) -> float | None:
    """Return the mean loss of the assistant's tokens, every token counting the same, in nats."""
    if not examples:
        return None
    length = max(len(example.ids) for example in examples)
    rows = padded_rows(examples, height=len(examples), length=length)
    windows, labels = {CONVERSATIONS: rows.tokens.numpy()}, {CONVERSATIONS: rows.labels.numpy()}
    return losses_of(network, windows, recipe, processes, labels).loss[CONVERSATIONS]


def _read(data: str | Path, source: Path, recipe: TuneRecipe, report: ProgressFn) -> _Talks:
    """Return training and held-out examples, and a line about each broken conversation."""
    tokenizer = load_tokenizer(source)
    if not tokenizer.is_fast:
        raise UsageError(
            f"{source} has a slow tokenizer, which does not know where its tokens stand in the "
            "text: save it with a tokenizer.json"
        )
    template = for_training(tokenizer, chat_template(tokenizer, recipe.chat_template))
    conversations, broken = read_conversations(data)
    make = partial(make_examples, max_length=recipe.sequence_length, report=report)
    trained, unusable = make([c for c in conversations if not c.is_held_out], tokenizer, template)
    kept = [c for c in conversations if c.is_held_out][: recipe.heldout_conversations]
    heldout, unusable_heldout = make(kept, tokenizer, template)
    broken += unusable + unusable_heldout
    if not trained:
        raise CorpusError(
            f"{data} holds no conversation to train on: "
            + (broken[0] if broken else "all of them are held out, add more")
        )
    return _Talks(template, end_of_turn(tokenizer, template), trained, heldout, broken)


def _result(folder: RunFolder, talks: _Talks, samples: ConversationSamples) -> dict[str, Any]:
    """Return the results of a run, for its record."""
    log = read_log(folder.work)
    return {
        "chat_template": talks.template.name,
        "conversations": len(talks.trained),
        "cut": sum(example.is_cut for example in talks.trained),
        "broken": len(talks.broken),
        "steps": samples.num_steps,
        "heldout_before": log[0].get("heldout_loss"),
        "heldout_after": log[-1].get("heldout_loss"),
        "heldout_tokens": num_labels(talks.heldout),
    }


def _finish(folder: Path, config: dict[str, Any], talks: _Talks) -> None:
    """Add template, end of turn and broken conversations to a written model."""
    template = talks.template
    if template.source is not None:
        # written where runtimes look first, and nowhere else
        (folder / "chat_template.jinja").write_text(template.source)
        (folder / "chat_template.json").unlink(missing_ok=True)
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text()) if file.is_file() else {}
        if settings.pop("chat_template", None) is not None:
            file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")
    # generation stops where the assistant's turn ends, besides where it stopped before
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    known = settings.get("eos_token_id", config.get("eos_token_id"))
    stops = known if isinstance(known, list) else [] if known is None else [known]
    if talks.end is not None and talks.end not in stops:
        settings["eos_token_id"] = [*stops, talks.end]
        file.write_text(json.dumps(settings, indent=2) + "\n")
    if talks.broken:
        (folder / "broken.txt").write_text("".join(f"{line}\n" for line in talks.broken))
