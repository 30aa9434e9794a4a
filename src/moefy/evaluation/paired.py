"""Two models on the same items: how much they differ, and how sure that is."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

_RESAMPLES = 10_000


@dataclass(frozen=True)
class Interval:
    """A value with its bootstrap interval of 95 %."""

    value: float  # on the items themselves
    low: float  # 2.5th percentile of the resamples
    high: float  # 97.5th


@dataclass(frozen=True)
class Paired:
    """A model beside a reference on the same items."""

    differences: dict[str, Interval]  # by benchmark, model minus reference
    average: Interval  # the same of the mean over benchmarks
    # The model's mean over the reference's, and the same of what lies above chance; None where the
    # reference may lie at 0 or at chance.
    retention: Interval | None
    retention_above_chance: Interval | None


def standard_error(values: Sequence[float]) -> float | None:
    """Return the standard error of a mean, s/√n with n − 1 in s; None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def compare_paired(
    reference: dict[str, list[float]],
    model: dict[str, list[float]],
    chance: dict[str, float],
) -> Paired:
    """Compare two models by their scores of the same items, by benchmark.

    The items of every benchmark are drawn again with replacement, both models' scores of an item
    together, 10,000 times. `chance` is what guessing scores.
    """
    generator = np.random.default_rng(0)  # the same items give the same interval
    means = {
        name: _resampled_means(np.array([scores, model[name]]), generator)
        for name, scores in reference.items()
    }
    # Every benchmark counts the same, whatever its number of items: [2 models, draws].
    first, second = np.mean(list(means.values()), axis=0)
    base = statistics.fmean(chance[name] for name in reference)
    return Paired(
        {name: _interval(drawn[1] - drawn[0]) for name, drawn in means.items()},
        _interval(second - first),
        _ratio(second, first),
        _ratio(second - base, first - base),
    )


def paired_difference(
    reference: Sequence[Sequence[float]], model: Sequence[Sequence[float]]
) -> Interval:
    """Return the mean difference of two models over all items, model minus reference.

    Both hold, for each group (a domain of text), one value per item.
    """
    generator = np.random.default_rng(0)
    total = sum(map(len, reference))
    differences = np.zeros(_RESAMPLES + 1)
    # Items are drawn again within their group: which domains there are is no accident.
    for group, other in zip(reference, model, strict=True):
        first, second = _resampled_means(np.array([group, other]), generator)
        differences += (second - first) * len(group) / total
    return _interval(differences)


def _resampled_means(
    scores: Float[np.ndarray, "2 items"], generator: np.random.Generator
) -> Float[np.ndarray, "2 draws"]:
    """Return both means on the items themselves, and then on each resample."""
    # There are few different pairs of scores, so drawing items is drawing the number of each pair.
    pairs, counts = np.unique(scores, axis=1, return_counts=True)
    total = counts.sum()
    drawn = generator.multinomial(total, counts / total, size=_RESAMPLES)
    return pairs @ np.vstack([counts, drawn]).T / total


def _interval(draws: Float[np.ndarray, " draws"]) -> Interval:
    # The first draw is of the items themselves.
    low, high = np.percentile(draws[1:], [2.5, 97.5])
    return Interval(float(draws[0]), float(low), float(high))


def _ratio(
    above: Float[np.ndarray, " draws"], below: Float[np.ndarray, " draws"]
) -> Interval | None:
    return _interval(above / below) if (below > 0).all() else None
