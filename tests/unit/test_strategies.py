"""Named mixtures and the rule that changes them, on numbers worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from moefy.data.strategies import PUBLISHED, for_domains, initial_weights, updated_weights
from moefy.errors import CorpusError, UsageError
from moefy.training.recipe import TrainRecipe

SLIMPAJAMA = ["arxiv", "book", "c4", "cc", "github", "stackexchange", "wikipedia"]


def test_the_published_rows_in_the_order_of_the_corpus() -> None:
    sheared = [0.007, 0.091, 0.492, 0.361, 0.008, 0.01, 0.031]
    llama = [0.025, 0.045, 0.15, 0.67, 0.045, 0.02, 0.045]
    for name, row in {"Sheared": sheared, "LLaMA": llama}.items():
        for kind in ("Static", "Dynamic"):
            found = initial_weights(f"{kind}{name}", SLIMPAJAMA)
            assert list(found.items()) == list(zip(SLIMPAJAMA, row, strict=True))
            assert math.fsum(found.values()) == pytest.approx(1, abs=1e-15)
    for name in ("Uniform", "DynamicUniform"):
        assert initial_weights(name, SLIMPAJAMA) == dict.fromkeys(SLIMPAJAMA, 1 / 7)


def test_names_of_mixtures() -> None:
    assert TrainRecipe.build(mixture="DynamicSheared").is_dynamic
    assert not TrainRecipe.build(mixture="StaticSheared").is_dynamic
    assert TrainRecipe.build(mixture="a=0.5, b=2").mixture == {"a": 0.5, "b": 2.0}
    for text in ("Static", "a", "a=", "a=x", "", "uniform"):
        with pytest.raises(UsageError, match=r"unknown mixture .*StaticLLaMA, .*a weight for each"):
            TrainRecipe.build(mixture=text)
    for broken in (-0.5, math.nan, math.inf):
        with pytest.raises(UsageError, match=r"mixture.*\.a = "):
            TrainRecipe.build(mixture={"a": broken})


def test_another_corpus_has_the_uniform_mixtures_only() -> None:
    demo = ["book", "code", "news", "wikipedia"]
    assert initial_weights("Uniform", demo) == dict.fromkeys(demo, 0.25)
    with pytest.raises(
        CorpusError, match=r"weights of StaticSheared are for cc, .*corpus has book, .*use Uniform"
    ):
        initial_weights("StaticSheared", demo)


def test_weights_of_a_recipe() -> None:
    assert initial_weights({"b": 0.25, "a": 0.75}, ["a", "b"]) == {"a": 0.75, "b": 0.25}
    with pytest.raises(CorpusError, match=r"sum to 0.9: make them sum to 1"):
        initial_weights({"a": 0.5, "b": 0.4}, ["a", "b"])
    with pytest.raises(CorpusError, match="weights are for a, c, and the corpus has a, b"):
        initial_weights({"a": 0.5, "c": 0.5}, ["a", "b"])
    with pytest.raises(CorpusError, match="losses are for a, and the corpus has a, b"):
        for_domains({"a": 0.5}, ["a", "b"], "the losses")


def test_the_update_rule_by_hand() -> None:
    """1/2 · e^0, 1/4 · e^ln 2, 1/4 · e^ln 4 are 1/2, 1/2, 1: of their sum 1/4, 1/4, 1/2."""
    weights = np.array([1 / 2, 1 / 4, 1 / 4])
    excess = np.log([1.0, 2.0, 4.0])
    smoothed = 0.9999 * np.array([0.25, 0.25, 0.5]) + 1e-4 / 3
    assert np.allclose(updated_weights(weights, excess), smoothed, rtol=0, atol=1e-15)
    excess[0] = -3.0  # below its reference: the weight goes to the others
    assert updated_weights(weights, excess)[0] < 0.02


def test_the_tables_in_the_docs() -> None:
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    for row in PUBLISHED.values():
        assert f"| {' | '.join(map(str, row.values()))} |\n" in page
