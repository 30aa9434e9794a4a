"""Instruction tuning: a model, conversations, TRL's trainer, and a plain native model out of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor

from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.checkpoint.reader import fingerprint, read_config
from moefy.checkpoint.source import resolve
from moefy.data.conversations import read_conversations
from moefy.data.examples import Example, make_examples
from moefy.data.template import ChatTemplate, chat_template, for_training
from moefy.errors import CorpusError, UsageError
from moefy.evaluation.output_loss import LogitsInput, output_loss
from moefy.experts.router_trace import routers_of
from moefy.hardware import device, freed_memory_kept, products_in, training_precision
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import (
    changed_settings,
    check_output,
    check_same_settings,
    put_in_place,
    replace_file,
    run_folder,
    storage_errors,
)
from moefy.training.checks import check_context
from moefy.training.models import freeze_sinks
from moefy.training.recipe import TuneRecipe, TuneSettings
from moefy.training.state import FOLDER, LOG, read_log
from moefy.training.tuned_folder import finish_folder
from moefy.training.write import versions, was_written, write_model

BROKEN = "broken.txt"


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
    `tuning.template.assistant_spans`. One conversation in twenty is held out; the loss on those is
    measured before and after. Broken conversations are left out and named in `broken.txt`.

    A run that was stopped goes on when the same call is made again. The model appears in `out` when
    the run is complete.

    Args:
        model: a converted (or dense) model folder, or any source `convert` takes.
        out: the run's folder.
        data: conversations; see `tuning.conversations.read_conversations`.
        recipe: a `TuneRecipe` or a YAML file with its keys.
        overwrite: replace what is in `out`: a model when the new one is complete; until then the
            run lies beside it, in `.NAME.next`, where the same call goes on. An unfinished run is
            begun again.
        report: told about progress.
        **settings: single `TuneRecipe` keys; they override the recipe.

    Raises:
        UsageError: recipe, model, conversations or output are not usable, or trl is missing.
        TrainingError: the loss is not finite; the last checkpoint is kept.
        StorageError: the disk is full; the last checkpoint is kept.
    """
    out = Path(out).expanduser()
    choice = TuneRecipe.build(recipe, **settings)
    choice = choice.model_copy(update={"precision": training_precision(choice.precision)})
    folder = run_folder(out, overwrite=overwrite)
    is_beside = folder != out
    is_fresh = (overwrite and not is_beside) or not _is_unfinished(folder)
    if is_fresh or is_beside:
        read = (Path(model).expanduser(), Path(data).expanduser())
        check_output(out, overwrite=overwrite, sources=read)
    try:
        from moefy.training.adapters import add_adapters, merged
        from moefy.training.trainer import last_checkpoint, make_trainer
    except ImportError as error:
        raise UsageError(
            f"tune needs the packages trl and peft ({error}): pip install 'moefy[tune]'"
        ) from error
    source = resolve(model, report=report)
    tokenizer = load_tokenizer(source)
    if not tokenizer.is_fast:
        raise UsageError(
            f"{source} has a slow tokenizer, which does not know where its tokens stand in the "
            "text: save it with a tokenizer.json"
        )
    config = read_config(source)
    check_context(config, choice.sequence_length, str(source))
    template = for_training(tokenizer, chat_template(tokenizer, choice.chat_template))
    trained, heldout, broken = _examples(data, tokenizer, template, choice, report)
    network = load_model(source, dtype=torch.float32).to(device())
    _freeze(network, choice)
    identity = {
        "source": fingerprint(source),
        "data": str(data),
        "tokens": _digest(trained),
        **choice.model_dump(mode="json"),
    }
    if is_beside and was_written(folder, identity):  # killed just before its end
        result = json.loads((folder / "moefy.json").read_text())["result"] | {"broken": broken}
        shutil.rmtree(folder / FOLDER, ignore_errors=True)
        put_in_place(folder, out)
        return Tuning(out, choice, **result, resumed_from_step=result["steps"], elapsed_s=0.0)
    checkpoints = folder / FOLDER
    begun = checkpoints / "identity.json"
    if not is_fresh and begun.is_file():
        found = json.loads(begun.read_text())
        if is_beside:
            is_fresh = bool(changed_settings(found, identity))
        else:
            check_same_settings(folder, found, identity)
    if is_fresh:  # only now is it sure that this run can begin
        shutil.rmtree(folder, ignore_errors=True)
    resumed = last_checkpoint(checkpoints)
    resumed_from_step = int(resumed.name.partition("-")[2]) if resumed else 0
    with storage_errors(folder):
        checkpoints.mkdir(parents=True, exist_ok=True)
    replace_file(folder / "recipe.yaml", choice.to_yaml())
    replace_file(begun, json.dumps(identity, indent=2) + "\n")
    if broken:
        replace_file(folder / BROKEN, "".join(f"{line}\n" for line in broken))
    lines = _kept_lines(folder, resumed_from_step) or [
        {"step": 0, "heldout_loss": heldout_loss(network, heldout, choice, report)}
    ]
    replace_file(folder / LOG, "".join(json.dumps(line) + "\n" for line in lines))

    def write(line: dict[str, Any]) -> None:
        with storage_errors(folder), (folder / LOG).open("a") as log:
            log.write(json.dumps(line) + "\n")

    if choice.lora_rank:
        alpha = choice.lora_alpha or 2.0 * choice.lora_rank
        network = add_adapters(network, rank=choice.lora_rank, alpha=alpha, seed=choice.seed)
    trainer = make_trainer(
        network, tokenizer, trained, choice, folder=checkpoints, write=write, report=report
    )
    started = time.perf_counter()
    with storage_errors(folder):
        trainer.train(resume_from_checkpoint=str(resumed) if resumed else None)
    elapsed_s = time.perf_counter() - started
    network = merged(network)
    after = heldout_loss(network, heldout, choice, report)
    write({"step": trainer.state.global_step, "heldout_loss": after})
    done = Tuning(
        folder=out,
        recipe=choice,
        chat_template=template.name,
        conversations=len(trained),
        cut=sum(example.is_cut for example in trained),
        broken=broken,
        steps=trainer.state.global_step,
        resumed_from_step=resumed_from_step,
        heldout_before=lines[0]["heldout_loss"],
        heldout_after=after,
        heldout_tokens=sum(map(num_assistant_tokens, heldout)),
        elapsed_s=elapsed_s,
    )
    results = vars(done) | {"broken": len(broken)}
    for key in ("folder", "recipe", "elapsed_s", "resumed_from_step"):
        del results[key]
    record = {
        "stage": "tune",
        "run": identity,
        "result": results,
        "versions": versions("torch", "transformers", "trl", "peft"),
    }
    write_model(
        network,
        source,
        folder,
        record,
        amend=lambda finished: finish_folder(finished, config, tokenizer, template),
    )
    shutil.rmtree(checkpoints, ignore_errors=True)
    put_in_place(folder, out)
    return done


@torch.inference_mode()
def heldout_loss(
    network: Any, examples: list[Example], recipe: TuneRecipe, report: ProgressFn = silent
) -> float | None:
    """Return the mean loss of the assistant's tokens, every token counting the same, in nats."""
    network.eval()
    total, count = 0.0, 0
    for done, example in enumerate(examples, start=1):
        ids = torch.tensor([example.ids], device=network.device)
        labels = torch.tensor([example.labels], device=network.device)[:, 1:]
        with products_in(recipe.precision, network.device):
            logits = LogitsInput.of(network, ids).predicting()
            losses: Float[Tensor, "1 positions"] = output_loss(logits, labels).cross_entropy
        total += losses.sum().item()
        count += num_assistant_tokens(example)
        report(Progress("held-out loss", done, len(examples)))
    return total / count if count else None


def num_assistant_tokens(example: Example) -> int:
    """Return how many tokens have a loss."""
    return sum(label >= 0 for label in example.labels[1:])


def _examples(
    data: str | Path,
    tokenizer: Any,
    template: ChatTemplate,
    recipe: TuneRecipe,
    report: ProgressFn,
) -> tuple[list[Example], list[Example], list[str]]:
    """Return what is trained on, what is held out, and a line about everything broken."""
    conversations, broken = read_conversations(data)
    sides = []
    for is_held_out in (False, True):
        side = [c for c in conversations if c.is_held_out == is_held_out]
        if is_held_out:
            side = side[: recipe.heldout_conversations]
        examples, unusable = make_examples(
            side, tokenizer, template, max_length=recipe.sequence_length, report=report
        )
        sides.append(examples)
        broken += unusable
    if not sides[0]:
        raise CorpusError(
            f"{data} holds no conversation to train on: "
            + (broken[0] if broken else "all of them are held out, add more")
        )
    return sides[0], sides[1], broken


def _freeze(network: Any, recipe: TuneRecipe) -> None:
    """Take routers out of training as chosen, and attention sinks always."""
    routers = routers_of(network)
    if recipe.router == "balanced" and not routers:
        raise UsageError(
            f"a {network.config.model_type} model has no routers to balance: leave router out"
        )
    if recipe.router == "frozen":
        for router in routers:
            router.requires_grad_(False)
    freeze_sinks(network)


def _kept_lines(out: Path, step: int) -> list[dict[str, Any]]:
    """Return the lines of an earlier call's log up to a step, without its last held-out loss."""
    if not (out / LOG).is_file():
        return []
    lines = [line for line in read_log(out) if line["step"] <= step]
    return [line for line in lines if not line["step"] or "loss" in line]


def _digest(examples: list[Example]) -> str:
    tokens = json.dumps([(example.ids, example.labels) for example in examples])
    return hashlib.sha256(tokens.encode()).hexdigest()


def _is_unfinished(out: Path) -> bool:
    # not by recipe.yaml: a corpus that `prepare` wrote has one too
    return (out / FOLDER).is_dir() and not (out / "config.json").exists()
