"""One step: the passes of every process, the clipped gradient, the optimizer, a line of the log."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from moefy.errors import TrainingError
from moefy.hardware import device, products_in
from moefy.training.objective import Objective, StepLosses
from moefy.training.optimizer import clip_gradients
from moefy.training.processes import Processes
from moefy.training.samples import StepSamples

_NAMED = 32  # samples in an error


def train_step(
    step: int,
    rate: float,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    samples: StepSamples,
) -> dict[str, Any]:
    """Do one optimizer step, counted from 0, and return its line of the log.

    TrainingError says that loss or gradient is not finite; nothing has moved then.
    """
    recipe, processes = objective.recipe, objective.processes
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_fraction"]
    own = device()
    # a step has its own dropout and noise, so that a resumed run draws the same
    with (
        torch.random.fork_rng(devices=[own] if own.type == "cuda" else []),
        objective.step(samples) as done,
    ):
        torch.manual_seed(((recipe.seed * 1_000_003 + step) * 4099 + processes.data_idx) % 2**63)
        for rows in samples.passes:
            rows = rows.to(own)
            with products_in(recipe.precision, rows.tokens.device):
                loss = objective.loss(rows)
            loss.backward()
    objective.reduce_noise_gradients()
    learned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = float(clip_gradients(learned, recipe.max_grad_norm))
    losses = _losses(done, samples, processes)
    if not (losses["loss"] < float("inf") and grad_norm < float("inf")):
        more = " and more" * (len(samples.names) > _NAMED)
        drawn = ", ".join(samples.names[:_NAMED]) + more
        raise TrainingError(
            f"step {step + 1}: loss {losses['loss']}, gradient norm {grad_norm}, on {drawn} of at "
            f"most {recipe.sequence_length} tokens: lower --learning-rate, or look at these texts; "
            "the last checkpoint is kept"
        )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    objective.after_step()
    return losses | {"learning_rate": rate, "grad_norm": grad_norm}


def _losses(done: StepLosses, samples: StepSamples, processes: Processes) -> dict[str, Any]:
    """Combine the losses of all processes into a line of the log."""
    names = samples.domains
    by_domain = torch.zeros(2, len(names), dtype=torch.float64)  # sums of losses, labels
    domains, means, counts = zip(*done.rows, strict=True)
    weights = torch.stack(counts).double().cpu()
    sums = torch.stack(means).double().cpu() * weights
    for domain, loss, weight in zip(domains, sums, weights, strict=True):
        by_domain[:, names.index(domain)] += torch.stack([loss, weight])
    totals, labels = processes.total(by_domain.to(device())).cpu()
    line: dict[str, Any] = {
        "loss": float(totals.sum()) / samples.num_labels,
        "domain_loss": {name: float(totals[i] / labels[i]) for i, name in enumerate(names)},
    }
    for name, value in done.terms.items():
        # balance and z-loss are those of all processes already
        is_own = name in ("kl", "layer_loss")
        line[name] = float(processes.total(value)) / processes.num_data if is_own else float(value)
    if done.router is not None:
        load = done.router.shares().double().cpu()  # [layers, experts]
        entropy = torch.special.entr(load).sum(-1) / np.log(load.shape[-1])
        line["router_entropy"] = [round(x, 5) for x in entropy.tolist()]
        line["expert_load"] = [[round(x, 5) for x in row] for row in load.tolist()]
    return line
