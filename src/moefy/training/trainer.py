"""TRL's SFTTrainer, set up by a recipe. Only `tune` imports this module: it needs trl and peft."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from moefy.data.examples import Example
from moefy.errors import TrainingError
from moefy.experts.balance import switch_loss
from moefy.experts.router_trace import RouterTrace
from moefy.hardware import device
from moefy.progress import Progress, ProgressFn
from moefy.training.optimizer import parameter_groups
from moefy.training.recipe import TuneRecipe

_LEARNED = "learned.pt"


class Trainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer with the balance loss of `moefy.training`, and checkpoints that come back whole.

    TRL's own balance loss pools the tokens of all layers and knows no sigmoid routers; it is
    switched off. transformers 5.23 saves a checkpoint's experts in their on-disk form and does not
    find them again when it resumes, with a warning; here a checkpoint is what learned, as it is in
    memory.

    Args:
        coefficient: of the balance loss; 0 for none.
        *args, **settings: SFTTrainer's.
    """

    def __init__(self, *args: Any, coefficient: float, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self._coefficient = coefficient
        self._balance: list[float] = []

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the cross-entropy on the assistant's tokens plus the balance loss."""
        if not self._coefficient:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mask = inputs.get("attention_mask")
        with RouterTrace(self.model) as trace:
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        sums = trace.sums(None if mask is None else mask.bool())
        if sums is None:
            return loss
        balance = switch_loss(sums)
        self._balance.append(balance.item())
        # Trainer divides by the passes of a step itself when it does not know the step's tokens
        passes = 1 if num_items_in_batch is None else self.current_gradient_accumulation_steps
        return loss + self._coefficient * balance / passes

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write what learns into a checkpoint; the rest is the source's."""
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self._learning(), folder / _LEARNED)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        learned = torch.load(
            Path(resume_from_checkpoint) / _LEARNED, map_location="cpu", weights_only=True
        )
        parameters = self._learning()
        assert parameters.keys() == learned.keys(), "a checkpoint of another run"
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(learned[name])

    def _learning(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Tell the balance loss of a step apart from its cross-entropy."""
        if self._balance:
            balance = sum(self._balance) / len(self._balance)
            self._balance.clear()
            logs |= {"loss": logs["loss"] - self._coefficient * balance, "balance_loss": balance}
        super().log(logs, start_time)


class _Journal(TrainerCallback):  # type: ignore[misc]
    """Hands every step to `write`, and stops at a loss that is not finite."""

    def __init__(self, write: Callable[[dict[str, Any]], None], report: ProgressFn) -> None:
        self._write = write
        self._report = report
        self._last_s = time.perf_counter()

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        if not (math.isfinite(logs["loss"]) and math.isfinite(logs["grad_norm"])):
            raise TrainingError(
                f"step {state.global_step}: loss {logs['loss']}, gradient norm "
                f"{logs['grad_norm']}: start again with a lower --learning-rate and --overwrite"
            )
        now_s = time.perf_counter()
        names = ("loss", "balance_loss", "learning_rate", "grad_norm", "epoch")
        line = {"step": state.global_step} | {name: logs[name] for name in names if name in logs}
        self._write(line | {"elapsed_s": now_s - self._last_s})
        self._last_s = now_s
        note = f"loss {logs['loss']:.3f}"
        self._report(Progress("tune", state.global_step, state.max_steps, note))


def make_trainer(
    network: Any,
    tokenizer: Any,
    examples: list[Example],
    recipe: TuneRecipe,
    *,
    folder: Path,
    write: Callable[[dict[str, Any]], None],
    report: ProgressFn,
) -> Trainer:
    """Return the trainer of a run.

    Args:
        network: on its device, in float32, its frozen parameters marked.
        tokenizer: the model's.
        examples: to train on.
        recipe: with the precision decided.
        folder: for checkpoints.
        write: takes a line for every step.
        report: told about progress.
    """
    settings = SFTConfig(
        output_dir=str(folder),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.global_batch_size // recipe.micro_batch_size,
        lr_scheduler_type="cosine",
        learning_rate=recipe.learning_rate,
        warmup_steps=recipe.warmup_fraction,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.precision == "bfloat16",
        max_length=recipe.sequence_length,
        packing=recipe.packing,
        activation_checkpointing=recipe.gradient_checkpointing,
        router_aux_loss_coef=0.0,
        seed=recipe.seed,
        use_cpu=device().type == "cpu",
        dataloader_pin_memory=device().type == "cuda",
        save_strategy="steps" if recipe.checkpoint_every_steps else "no",
        save_steps=recipe.checkpoint_every_steps or 1,
        save_total_limit=1,
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
    )
    rows = Dataset.from_dict(
        {"input_ids": [e.ids for e in examples], "labels": [e.labels for e in examples]}
    )
    trainer = Trainer(
        network,
        settings,
        coefficient=recipe.balance_coefficient if recipe.router == "balanced" else 0.0,
        train_dataset=rows,
        processing_class=tokenizer,
        optimizers=(_optimizer(network, recipe), None),
        callbacks=[_Journal(write, report)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint: the trainer writes its state last."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step_of, reverse=True):
        try:
            json.loads((checkpoint / "trainer_state.json").read_text())
        except (OSError, ValueError):
            continue
        return checkpoint
    return None


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _optimizer(network: Any, recipe: TuneRecipe) -> torch.optim.AdamW:
    """Return AdamW on what learns; weight decay on matrices only, routers at their own rate."""
    plain = network.get_base_model() if isinstance(network, PeftModel) else network
    groups = parameter_groups(plain, weight_decay=recipe.weight_decay)
    for group in groups:
        if group["is_router"]:
            group["lr"] = recipe.learning_rate * recipe.router_lr_scale
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
