"""Training of norms and routers through the whole converted model, everything else frozen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from moefy.calibrate.walk import CalibrationWalk
from moefy.checkpoint.expert_layers import register
from moefy.checkpoint.load import load_model
from moefy.checkpoint.targets import NativeTarget
from moefy.checkpoint.writer import replace_tensors
from moefy.construct.ffn import FitError
from moefy.construct.repair.fit import adam, shuffled
from moefy.experts.routers import routers_of
from moefy.hardware import device, freed_memory_kept, products_in, training_precision
from moefy.progress import Progress, ProgressFn, silent
from moefy.recipe import ConvertRecipe

_HELD_OUT = 16
"""One window in so many is not trained on: it judges the training."""


def train_end_to_end(
    folder: Path,
    walk: CalibrationWalk,
    recipe: ConvertRecipe,
    target: NativeTarget | None,
    generator: np.random.Generator,
    report: ProgressFn = silent,
) -> FitError:
    """Train a converted model's norms and routers with Adam, and put them into its files.

    Minimises KL(dense ‖ converted), the mean over tokens, a window a step, with the schedule of
    `fit_ffn`. Where the windows that are held out are not predicted better than before, the files
    stay as they are. Memory is the whole model's weights and the logits of a window.

    Args:
        folder: the converted model.
        walk: the calibration tokens behind the last layer, with the dense model's residual stream.
        recipe: has the number of passes and the rate.
        target: the model's architecture; None where nothing is routed.
        generator: draws the windows.
        report: told about progress.

    Returns:
        The KL divergence of the held-out windows, in nats per token, before and after.
    """
    assert walk.dense is not None
    windows, dense, head = walk.windows, walk.dense, walk.replay.head()
    precision, length = training_precision("auto"), windows.shape[1]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    model = load_model(folder, dtype=torch.float32).to(device())
    if target:
        model.set_experts_implementation(register())
    trained = _norms_and_routers(model, target)
    # the embeddings stay in float32, and with them the residual stream
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained.values())
        if name not in trained.values() and "layers." in name:
            parameter.data = parameter.data.to(dtype)
    parameters = dict(model.named_parameters())
    leaves = {stored: parameters[name] for stored, name in trained.items()}
    num_fitted = max(1, len(windows) - max(1, len(windows) // _HELD_OUT))
    assert recipe.end_to_end_epochs is not None
    num_steps = max(1, round(recipe.end_to_end_epochs * num_fitted))
    groups = [[leaf] for leaf in leaves.values()]
    optimizer, schedule = adam(groups, recipe.end_to_end_learning_rate, num_steps)

    def divergence(window: int) -> Float[Tensor, ""]:
        with products_in(precision, device()):
            with torch.no_grad():
                states = dense[slice(window * length, (window + 1) * length)]
                expected = head(states).float().log_softmax(-1)
            ids = torch.from_numpy(windows[window])[None].to(device())
            found = model(ids, use_cache=False).logits[0].float().log_softmax(-1)
        return (expected.exp() * (expected - found)).sum(-1).mean()

    @torch.no_grad()
    def held_out() -> float:
        found = [float(divergence(window)) for window in range(num_fitted, len(windows))]
        return math.fsum(found) / len(found)

    with freed_memory_kept():
        before = held_out()
        drawn = shuffled(num_fitted, 1, num_steps, generator)
        for done, (window,) in enumerate(drawn, start=1):
            with torch.enable_grad():
                optimizer.zero_grad()
                loss = divergence(int(window))
                loss.backward()
            optimizer.step()
            schedule.step()
            note = f"KL to the dense model {float(loss.detach()):.3f}"
            report(Progress("train norms and routers", done, num_steps, note))
        after = held_out()
    if not after < before:  # also where it is not a number
        return FitError(before, before)
    replace_tensors(folder, {name: leaf.detach().cpu() for name, leaf in leaves.items()})
    return FitError(before, after)


def _norms_and_routers(model: Any, target: NativeTarget | None) -> dict[str, str]:
    """Return what is trained: names in the model, by names in its files."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {name: name for name in names.values() if name.endswith("norm.weight")}
    if target:
        for layer_idx, router in enumerate(routers_of(model)):
            weight = max(router.parameters(), key=torch.numel)  # the other is a bias
            found[f"model.layers.{layer_idx}.{target.router}"] = names[weight]
    return found
