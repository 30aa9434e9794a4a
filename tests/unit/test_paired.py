"""Paired statistics against numbers by hand and a bootstrap of item indices."""

from __future__ import annotations

import math

import numpy as np
import pytest

from moefy.evaluation.paired import (
    Interval,
    Paired,
    compare_paired,
    paired_difference,
    standard_error,
)

ITEMS = np.random.default_rng(1)
DENSE = (ITEMS.random(200) < 0.6).astype(float)
SPLIT = np.where(ITEMS.random(200) < 0.8, DENSE, 1 - DENSE)


def compare(dense: dict[str, list[float]], split: dict[str, list[float]], chance: float) -> Paired:
    return compare_paired(dense, split, dict.fromkeys(dense, chance))


def test_standard_error() -> None:
    assert standard_error([0.0, 0.0, 1.0, 1.0]) == pytest.approx(math.sqrt((4 * 0.25 / 3) / 4))
    assert standard_error([1.0]) is None


def test_values_are_those_of_the_items() -> None:
    dense = {"a": [1.0, 1.0, 1.0, 0.0], "b": [1.0, 0.0] * 25}
    split = {"a": [1.0, 0.0, 1.0, 0.0], "b": [1.0, 0.0] * 25}
    found = compare(dense, split, 0.25)
    assert found.differences["a"].value == pytest.approx(-0.25)
    assert found.differences["b"] == Interval(0.0, 0.0, 0.0)
    assert found.average.value == pytest.approx(-0.125)
    assert found.retention is not None
    assert found.retention.value == pytest.approx(0.5 / 0.625)


def test_intervals_are_those_of_drawing_items() -> None:
    found = compare({"a": DENSE.tolist()}, {"a": SPLIT.tolist()}, 0.25)
    drawn = np.random.default_rng(2).integers(0, 200, (20_000, 200))
    first, second = DENSE[drawn].mean(1), SPLIT[drawn].mean(1)
    for interval, draws in (
        (found.differences["a"], second - first),
        (found.average, second - first),
        (found.retention, second / first),
        (found.retention_above_chance, (second - 0.25) / (first - 0.25)),
    ):
        assert interval is not None
        expected = np.percentile(draws, [2.5, 97.5])
        assert [interval.low, interval.high] == pytest.approx(expected, abs=0.012)


def test_pairing_narrows_the_interval() -> None:
    paired = compare({"a": DENSE.tolist()}, {"a": SPLIT.tolist()}, 0.25).average
    shuffled = ITEMS.permutation(SPLIT).tolist()
    unpaired = compare({"a": DENSE.tolist()}, {"a": shuffled}, 0.25).average
    assert paired.value == pytest.approx(unpaired.value)
    assert paired.high - paired.low < 0.8 * (unpaired.high - unpaired.low)


def test_retention_needs_a_reference_above_chance() -> None:
    scores = {"a": [1.0, 0.0, 0.0, 0.0] * 10}
    assert compare(scores, scores, 0.25).retention_above_chance is None
    assert compare({"a": [0.0] * 4}, {"a": [1.0] * 4}, 0.25).retention is None


def test_the_difference_of_two_models_over_groups_of_items() -> None:
    groups = [ITEMS.normal(3, 1, size=30), ITEMS.normal(5, 1, size=10)]
    others = [group + ITEMS.normal(0.5, 0.3, size=len(group)) for group in groups]
    found = paired_difference([g.tolist() for g in groups], [o.tolist() for o in others])
    differences = [other - group for group, other in zip(groups, others, strict=True)]
    assert found.value == pytest.approx(np.concatenate(differences).mean())
    # the standard error of a stratified mean, from its formula
    error = math.sqrt(sum(len(each) * each.var() for each in differences)) / 40
    half_width = 1.96 * error
    assert [found.low, found.high] == pytest.approx(
        [found.value - half_width, found.value + half_width], abs=0.1 * half_width
    )
