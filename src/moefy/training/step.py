"""One step: every worker's passes, the clipped gradient, the optimizer, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from moefy.data.corpus import Corpus
from moefy.data.mixture import Batch
from moefy.errors import TrainingError
from moefy.hardware import device, products_in
from moefy.training.objective import Objective, StepLosses
from moefy.training.optimizer import clip_gradients
from moefy.training.processes import Workers
from moefy.training.recipe import TrainRecipe
from moefy.training.schedule import learning_rate

_NAMED = 32  # sequences of a batch in an error


def train_step(
    step: int,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    corpus: Corpus,
    recipe: TrainRecipe,
    workers: Workers,
) -> dict[str, Any]:
    """Do one optimizer step and return its line of the log.

    Args:
        step: counted from 0.
        objective: of the run.
        optimizer: of what learns.
        batch: the sequences of all workers.
        corpus: where they are.
        recipe: of the run.
        workers: of the run.

    Raises:
        TrainingError: loss or gradient is not finite; nothing has moved.
    """
    rate = learning_rate(
        step,
        recipe.num_steps,
        peak=recipe.learning_rate,
        warmup_fraction=recipe.warmup_fraction,
        final_fraction=recipe.min_lr_ratio,
    )
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_fraction"]
    mine = batch.of_worker(workers.data_idx, workers.num_data)
    with _randomness_of(recipe.seed, step, workers), objective.step() as passes:
        for first in range(0, len(mine), recipe.micro_batch_size):
            samples = mine[first : first + recipe.micro_batch_size]
            ids = np.stack([corpus.sequence(name, idx) for name, idx, _ in samples])
            tokens = torch.from_numpy(ids).to(device())
            with products_in(recipe.precision, tokens.device):
                loss = passes.loss(tokens)
            loss.backward()
    objective.reduce_noise_gradients()
    if step < recipe.router_warmup_fraction * recipe.num_steps:
        for group in optimizer.param_groups:
            if not group["is_router"]:
                for parameter in group["params"]:
                    parameter.grad = None
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = float(clip_gradients(learned, recipe.max_grad_norm))
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


@contextmanager
def _randomness_of(seed: int, step: int, workers: Workers) -> Iterator[None]:
    """Give a step its own dropout and noise, so that a resumed run draws the same."""
    own = device()
    with torch.random.fork_rng(devices=[own] if own.type == "cuda" else []):
        torch.manual_seed(((seed * 1_000_003 + step) * 4099 + workers.data_idx) % 2**63)
        yield
