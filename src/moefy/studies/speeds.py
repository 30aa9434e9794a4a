"""How fast the splits of a dense model run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from moefy.checkpoint.inspect import split_config
from moefy.evaluation.timing import Contender, Setting, in_transformers
from moefy.hardware import device
from moefy.progress import ProgressFn, silent
from moefy.studies.grid import Speeds, Split
from moefy.studies.recipe import StudyRecipe


def measure_speeds(
    config: Mapping[str, Any],
    splits: Sequence[Split],
    recipe: StudyRecipe,
    report: ProgressFn = silent,
) -> Speeds:
    """Time the splits of a dense model in turn, one sequence at once, weights random.

    Speed does not depend on the weights, so no model is needed. The fastest expert implementation
    counts, for each phase; medians over the rounds.

    Args:
        config: config.json of the dense model.
        splits: of it.
        recipe: of the study.
        report: told about progress.
    """
    plain = {key: config[key] for key in config if key != "quantization_config"}
    contenders = [Contender("dense", plain)]
    for split in splits:
        made = split_config(plain, **asdict(split))
        contenders.append(Contender(split.name, made))
    setting = Setting((1,), recipe.prompt_tokens, recipe.new_tokens, recipe.rounds, torch.float32)
    seconds = in_transformers(contenders, setting, report)
    speeds: Speeds = {contender.name: {} for contender in contenders}
    for (i, phase, _), measured in seconds.items():
        best = min(statistics.median(values) for values in measured.values())
        tokens = recipe.prompt_tokens if phase == "prefill" else 1
        speeds[contenders[i].name][phase] = tokens / best
    return speeds


def machine_name() -> str:
    """Say what the speeds are measured on."""
    if device().type == "cuda":
        return torch.cuda.get_device_name()
    count = torch.get_num_threads()
    return f"{count} CPU thread{'s' if count > 1 else ''}"
