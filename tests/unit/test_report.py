"""Published scores, model cards, and what the figures of a report show."""

from __future__ import annotations

import csv
import math
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from moefy.checkpoint.card import model_card, with_results
from moefy.checkpoint.cost import Cost
from moefy.evaluation.compare import Comparison, Result
from moefy.evaluation.paired import Interval
from moefy.evaluation.suite import PAPER_BENCHMARKS
from moefy.report.charts import loss_chart, quality_charts, running_mean
from moefy.report.write import (
    Report,
    facts_of,
    short_names,
    verdict,
    verdict_rows,
    write_page,
)

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


PAPER = (Path(__file__).parents[2] / "docs/results/paper.csv").read_text().splitlines()


@pytest.mark.parametrize("row", list(csv.DictReader(PAPER)), ids=lambda row: row["model"])
def test_published_averages_are_those_of_the_row(row: dict[str, str]) -> None:
    scores = {name: float(cell) for name, cell in row.items() if name != "model"}
    average = scores.pop("average")
    assert set(scores) == {benchmark.name for benchmark in PAPER_BENCHMARKS}
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
            "tokens_per_s": 50.0,
            "loss": 5.0 - step,
            "domain_loss": {"ab"[step % 2]: 5.0 - step},
        }
        for step in (1, 2, 3)
    ]


def test_training_charts_show_what_their_tables_say(log: list[dict[str, Any]]) -> None:
    loss = loss_chart({"one": log, "two": log[:2]})
    assert loss.name == "loss"
    assert loss.rows[1:] == [
        ["one", "1", "100", "4.0", "4"],
        ["one", "2", "200", "3.0", "3"],
        ["one", "3", "300", "2.0", "2"],
        ["two", "1", "100", "4.0", "4"],
        ["two", "2", "200", "3.0", "3"],
    ]
    (axes,) = loss.figure.axes
    raw, smooth, *_ = axes.get_lines()
    assert [float(y) for y in raw.get_ydata()] == [4.0, 3.0, 2.0]
    assert [float(y) for y in smooth.get_ydata()] == [4.0, 3.0, 2.0]
    tuned = [{"step": 0, "heldout_loss": 5.0}, *log, {"step": 3, "heldout_loss": 2.0}]
    assert loss_chart({"one": tuned}).rows == loss_chart({"one": log}).rows


def test_the_loss_shows_the_course_of_training_and_not_what_a_step_drew() -> None:
    generator = np.random.default_rng(0)
    course = np.linspace(1, 0, 320)
    raw = [generator.choice([1.5, 3.5]) + loss + generator.normal(0, 0.3) for loss in course]
    error = (np.array(running_mean(raw)) - course - 2.5)[40:-40]  # at the ends less is averaged
    assert np.std(error) < 0.15 * np.std(np.array(raw) - course)
    assert running_mean([4.0, 2.0]) == [4.0, 2.0]  # too few to smooth


def test_names_are_text_on_the_page(log: list[dict[str, Any]], tmp_path: Path) -> None:
    name = "<script>alert(1)</script>$\\frac$"
    cost = Cost(0, 0, 10**6, 10**6, 2 * 10**6, 512)
    result = Result(name, 2.0, {"<b>": 2.0}, None, None, None, cost, 10.0, 5.0)
    comparison = Comparison(None, 100, 10, [result])
    facts = facts_of("moefy report '<i>'", data="<u>", split="heldout")
    report = Report(tmp_path, comparison, None, None, {name: None}, {name: log}, facts)
    write_page(tmp_path, report, title="<title>", lead=verdict(report))
    text = (tmp_path / "report.html").read_text()
    for part in ("<script", "<b>", "<i>", "<u>"):
        assert part not in text
    assert f"{escape(name)} uses 1.0M parameters per token" in text


@pytest.mark.parametrize(
    ("excess", "said"),
    [
        (
            0.581,
            "from dense, a loss 0.581 nats per token above dense's (95% interval +0.481 to +0.681",
        ),
        (
            -0.2,
            "from dense, a loss 0.200 nats per token below dense's (95% interval -0.300 to -0.100",
        ),
    ],
)
def test_the_verdict_says_quality_and_speed(excess: float, said: str, tmp_path: Path) -> None:
    full, half = Cost(0, 0, 100, 100, 200, 512), Cost(4, 2, 100, 60, 120, 512)
    interval = Interval(excess, excess - 0.1, excess + 0.1)
    dense = Result("dense", 16.0, {}, None, 0.0, 1.0, full, 100.0, 50.0)
    moe = Result("moe", 16 * math.exp(excess), {}, interval, 0.1, 0.9, half, 120.0, 40.0)
    # it learned the judge's text and moved away from the dense model
    worse = Result("worse", 9.0, {}, interval, 0.3, 0.9, half, 120.0, 40.0)
    facts = facts_of("moefy report", data="demo", split="heldout")
    comparison = Comparison("dense", 100, 10, [worse, dense, moe])
    report = Report(tmp_path, comparison, None, None, {}, {}, facts)
    assert verdict(report).startswith("With 60% of the parameters active per token, moe has a KL")
    assert said in verdict(report)
    assert verdict(report).endswith("and decodes 0.80 times as fast here.")
    header, *rows = verdict_rows(report)
    assert "kept of dense, %" not in header
    assert rows[1][2] == "–"
    assert rows[2][4] == "40.0 (× 0.80)"


def test_a_broken_model_does_not_press_the_others_together() -> None:
    cost = Cost(0, 0, 10**6, 10**6, 2 * 10**6, 512)
    results = [
        Result(name, perplexity, {}, None, None, None, cost, 10.0, 5.0)
        for name, perplexity in (("good", 16.0), ("usable", 26.0), ("broken", 12_000.0))
    ]
    chart = quality_charts(Comparison(None, 100, 10, results))[0]
    assert chart.figure.axes[0].get_ylim()[1] < 4
    assert "Too high to be shown: broken (9.4)." in chart.caption
    assert [row[0] for row in chart.rows[1:]] == ["good", "usable", "broken"]


def test_the_same_numbers_give_the_same_picture(log: list[dict[str, Any]]) -> None:
    first, again = (loss_chart({"a$b$c": log}).data_uri() for _ in range(2))
    assert first == again
    assert first.startswith("data:image/png;base64,iVBOR")
