"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(
    step: int,
    num_steps: int,
    *,
    peak: float,
    warmup_fraction: float,
    final_fraction: float,
    as_trainer: bool = False,
) -> float:
    """Return the learning rate of one step: linear warm-up, then cosine to a floor.

    The schedule of LLaMA-MoE (arXiv 2406.16554): warm-up, cosine down to 10% of the peak.

    Args:
        step: counted from 0.
        num_steps: of the whole run.
        peak: highest learning rate.
        warmup_fraction: share of the steps that warm up.
        final_fraction: floor, as a share of the peak.
        as_trainer: count as transformers' Trainer does.
    """
    # Trainer begins at the rate 0, rounds warm-up up, and ends one step before the floor
    num_warmup = (math.ceil if as_trainer else round)(num_steps * warmup_fraction)
    last = num_steps if as_trainer else num_steps - 1
    if step < num_warmup:
        return peak * (step if as_trainer else step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, last - num_warmup)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    return peak * (final_fraction + (1 - final_fraction) * cosine)
