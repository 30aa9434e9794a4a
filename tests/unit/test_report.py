"""Published scores, model cards, and what the figures of a report show."""

from __future__ import annotations

import re
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from moefy.checkpoint.card import model_card, with_results
from moefy.evaluation.benchmarks import LLAMA_MOE
from moefy.report.chart import Chart
from moefy.report.published import PUBLISHED
from moefy.report.training_charts import running_mean, training_charts
from moefy.report.write import short_names

CONVERTED: dict[str, Any] = {
    "moefy": "0.1.0",
    "stage": "convert",
    "recipe": {"experts": 16, "active": 8, "shared": 4, "seed": 3},
    "source": {"name": "dense", "sha256": {"config.json": "aa"}},
    "versions": {"torch": "2.0"},
}
TRAINED: dict[str, Any] = {
    "moefy": "0.2.0",
    "stage": "train",
    "run": {"source": {"config.json": "bb"}, "data": "demo", "text": "cc", "tokens": 2048},
    "versions": {"torch": "2.1"},
    "from": CONVERTED,
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_averages_are_those_of_the_row(model: str) -> None:
    scores = dict(PUBLISHED[model])
    average = scores.pop("average")
    assert set(scores) == {benchmark.name for benchmark in LLAMA_MOE}
    assert average == pytest.approx(fmean(scores.values()), abs=0.07)  # some were cut, not rounded


def test_the_card_of_a_trained_model_has_every_step() -> None:
    card = model_card(TRAINED, {"model_type": "granitemoeshared"})
    assert "# dense, converted and trained by moefy" in card
    assert "16 slices, of which 8 run per token: 4 always, 4 by the router's choice" in card
    counts = "--set experts=16 --set active=8 --set shared=4 --set seed=3"
    converted = card.index(f"\nmoefy convert dense OUT {counts}\n")
    trained = card.index("\nmoefy train MODEL OUT --data demo --recipe recipe.yaml\n")
    assert converted < card.index("`aa`") < trained
    assert trained < card.index("```yaml\ntokens: 2048\n```") < card.index("`bb`")
    assert "cc" not in card


def test_the_card_of_a_trained_dense_model() -> None:
    card = model_card(TRAINED | {"from": None}, {"model_type": "llama"})
    assert "# A llama model, trained by moefy" in card
    assert "- moe\n" not in card


def test_results_in_a_card_are_replaced() -> None:
    card = model_card(CONVERTED, {"model_type": "mixtral"})
    first = with_results(card, "first \\1")
    assert "not measured yet" in card
    assert "not measured yet" not in first
    assert first.count("<!-- results -->\nfirst \\1\n<!-- /results -->\n") == 1
    assert with_results(first, "second") == first.replace("first \\1", "second")
    moved = f"{first}\nWritten by hand.\n"
    assert with_results(moved, "second").endswith("Written by hand.\n")


def test_names_are_as_short_as_they_can_be() -> None:
    assert short_names(["smollm2-135m", "out/moe", "/a/moe", "."]) == [
        "smollm2-135m", "out/moe", "/a/moe", ".",
    ]  # fmt: skip
    assert short_names(["out/moe", "out/trained"]) == ["moe", "trained"]


@pytest.fixture
def log() -> list[dict[str, Any]]:
    return [
        {
            "step": step,
            "tokens": 100 * step,
            "loss": 5.0 - step,
            "domain_loss": {"ab"[step % 2]: 5.0 - step},
            "expert_load": [[0.75, 0.25], [0.5, 0.5]],
        }
        for step in (1, 2, 3)
    ]


def test_training_charts_show_what_their_tables_say(log: list[dict[str, Any]]) -> None:
    loss, load, other = training_charts({"one": log, "two": log[:2]}, {"a": 2.0})
    assert [chart.name for chart in (loss, load, other)] == [
        "loss",
        "expert-load-1",
        "expert-load-2",
    ]
    assert loss.rows[1:] == [
        ["one", "2", "200", "a", "3.0", "3"],
        ["one", "1", "100", "b", "4.0", "4"],
        ["one", "3", "300", "b", "2.0", "2"],
        ["two", "2", "200", "a", "3.0", "3"],
        ["two", "1", "100", "b", "4.0", "4"],
        ["dense, held out", "", "", "a", "2.0", ""],
    ]
    panels = {axes.get_title(): axes for axes in loss.figure.axes}
    assert set(panels) == {"a", "b"}
    raw, smooth, *two = (line for line in panels["b"].get_lines())
    assert [float(y) for y in raw.get_ydata()] == [4.0, 2.0]
    assert [float(y) for y in smooth.get_ydata()] == [4.0, 2.0]
    assert [[float(y) for y in line.get_ydata()] for line in two] == [[4.0], [4.0]]
    assert load.rows[1:] == [["0", "0", "1.5"], ["0", "1", "0.5"], ["1", "0", "1"], ["1", "1", "1"]]
    assert [chart.name for chart in training_charts({"one": log}, {})] == ["loss", "expert-load"]


def test_the_running_mean_keeps_the_course_and_loses_the_noise() -> None:
    course = np.linspace(5, 2, 320)
    noise = np.random.default_rng(0).normal(0, 0.5, 320)
    means = np.array(running_mean((course + noise).tolist()))
    assert np.abs(means - course).max() < 0.4
    assert np.diff(means).std() < 0.05 * np.diff(noise).std()
    assert running_mean([4.0, 2.0]) == [4.0, 2.0]  # too few to smooth


def test_the_ids_of_two_figures_are_different(log: list[dict[str, Any]]) -> None:
    (chart, *_) = training_charts({"one": log}, {})
    first, second = (
        Chart(name, chart.figure, chart.rows, "").svg() for name in ("first", "second")
    )
    ids = [set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for svg, own in zip((first, second), ids, strict=True):
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
        assert used
        assert {one or other for one, other in used} <= own
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]+"', "", first)
    again = [training_charts({"one": log}, {})[0].svg() for _ in range(2)]
    assert again[0] == again[1]
