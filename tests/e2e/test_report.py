"""`moefy report`: one page that needs nothing else, its files, and the model cards."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import write_tiny_llama

import moefy
from moefy.cli import main
from moefy.errors import CheckpointError, OutputError, UsageError
from moefy.recipe import LLAMA_MOE

SMALL: dict[str, Any] = {"windows": 2, "sequence_length": 48}
TASKS = ["winogrande", "lambada_openai"]


class Page(HTMLParser):
    """What a page would fetch, its tables, its anchors, and what refers to them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.figures: list[str] = []
        self.ids: list[str] = []
        self.references = set(re.findall(r"url\(#([^)]+)\)", text))
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            target = values.get(name, "data:")
            if target.startswith("#"):
                self.references.add(target[1:])
            elif not target.startswith("data:"):
                self.outside.append(f"{tag} {target}")
        if tag in {"script", "link", "iframe", "object"}:
            self.outside.append(tag)
        if "id" in values:
            self.ids.append(values["id"])
        if tag == "figure":
            self.figures.append(values["id"])
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in {"td", "th"}:
            self.tables[-1][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in {"td", "th"}:
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self.tables[-1][-1][-1] += data


@pytest.fixture
def models(tmp_path: Path, corpus: Path) -> list[Path]:
    """A dense model, its split, and that trained for eight steps."""
    dense, split, trained = (tmp_path / name for name in ("dense", "split", "trained"))
    # larger weights than usual, so that the models differ
    write_tiny_llama(dense, tie_word_embeddings=False, initializer_range=0.2)
    moefy.convert(dense, split, experts=4, active=2, **LLAMA_MOE | {"repair": "none"})
    moefy.train(split, trained, data=corpus, tokens=8 * 48, sequence_length=48)
    return [dense, split, trained]


def number(cell: str) -> float:
    return float(cell.replace(",", "").rstrip("%"))


def test_the_page_and_its_files(
    models: list[Path], corpus: Path, tmp_path: Path, own_cache: Path
) -> None:
    out = tmp_path / "report"
    weights = {model: (model / "model.safetensors").read_bytes() for model in models}
    done = moefy.write_report(out, models, data=corpus, tasks=TASKS, limit=8, **SMALL)
    text = (out / "report.html").read_text()
    page = Page(text)
    assert not page.outside
    assert "@import" not in text
    assert len(set(page.ids)) == len(page.ids), "two elements have the same id"
    assert page.references <= set(page.ids)

    # every figure has its picture and its numbers
    shown, details = text.split("<details", maxsplit=1)
    assert Page(shown).figures == ["quality-active", "quality-decode", "loss"]
    assert not Page(details).figures
    for name in page.figures:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        with (out / f"{name}.csv").open() as file:
            header, *rows = csv.reader(file)
        assert rows
        assert all(len(row) == len(header) for row in rows)

    # the tables' numbers are those of results.json
    results = json.loads((out / "results.json").read_text())
    verdict, comparison, suite, *_ = page.tables
    header, *rows = verdict
    dense = results["comparison"]["results"][0]
    for row, result in zip(rows, results["comparison"]["results"], strict=True):
        cells = dict(zip(header, row, strict=True))
        speed = result["decode_tokens_per_s"] / dense["decode_tokens_per_s"]
        assert cells["decode, tokens/s"].endswith(f"(× {speed:.2f})")
        excess = result["excess_loss"]
        if result is not dense:
            values = (excess["value"], excess["low"], excess["high"])
            found = re.findall(r"-?\d+\.\d+", cells["loss above dense, nats"])
            assert [float(value) for value in found] == pytest.approx(values, abs=6e-4)
    header, *rows = comparison
    assert [row[0] for row in rows] == ["dense", "split", "trained"]
    for row, result in zip(rows, results["comparison"]["results"], strict=True):
        cells = dict(zip(header, row, strict=True))
        assert number(cells["perplexity"]) == pytest.approx(result["perplexity"], abs=0.5)
        assert number(cells["KL to dense"]) == pytest.approx(result["kl_to_reference"], abs=6e-4)
        assert number(cells["top-1"]) == pytest.approx(100 * result["top1_agreement"], abs=0.06)
    columns = {column[0]: column[1:] for column in zip(*suite, strict=True)}
    assert columns["benchmark"][:3] == ("WinoGrande", "LAMBADA", "average")
    for model in results["suite"]["models"]:
        scores = [*(score["value"] for score in model["scores"].values()), model["average"]]
        for cell, score in zip(columns[model["name"]], scores, strict=False):
            assert number(cell.partition(" ±")[0]) == pytest.approx(100 * score, abs=0.06)
    with (out / "quality-active.csv").open() as file:
        points = {row["model"]: row for row in csv.DictReader(file)}
    for result in results["comparison"]["results"]:
        loss = float(points[result["name"]]["loss (nats per token)"])
        assert loss == math.log(result["perplexity"])
        millions = float(points[result["name"]]["active parameters (millions)"])
        assert millions == result["cost"]["active_params"] / 1e6

    # the cards have the same table, the weights are the same, and nothing is measured twice
    assert done.cards == models[1:]
    kept = sorted((own_cache / "scores").rglob("*.json"))
    assert len(kept) == 3 * len(TASKS)
    table = (out / "results.md").read_text()
    for model in models[1:]:
        card = (model / "README.md").read_text()
        assert table in card
        assert "| WinoGrande | 0 |" in card
    again = moefy.write_report(
        out, models, data=corpus, tasks=TASKS, limit=8, overwrite=True, **SMALL
    )
    assert again.suite == done.suite
    assert sorted((own_cache / "scores").rglob("*.json")) == kept
    card = (models[1] / "README.md").read_text()
    assert card.count("## Results") == card.count("## How it was made") == 1
    assert (out / "results.md").read_text() in card
    assert {model: (model / "model.safetensors").read_bytes() for model in models} == weights


def test_one_model_and_no_cards(models: list[Path], corpus: Path, tmp_path: Path) -> None:
    before = (models[1] / "README.md").read_text()
    done = moefy.write_report(
        tmp_path / "out", models[1], data=corpus, routing=False, cards=False, **SMALL
    )
    assert done.cards == []
    assert (models[1] / "README.md").read_text() == before
    page = Page((tmp_path / "out/report.html").read_text())
    assert page.figures == ["quality-active", "quality-decode"]
    assert done.comparison.reference is None


def test_a_broken_model_leaves_nothing(models: list[Path], corpus: Path, tmp_path: Path) -> None:
    weights = models[2] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    cards = [(model / "README.md").read_text() for model in models[1:]]
    before = set(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        moefy.write_report(tmp_path / "out", models, data=corpus, **SMALL)
    assert set(tmp_path.iterdir()) == before
    assert [(model / "README.md").read_text() for model in models[1:]] == cards


def test_only_a_report_is_overwritten(models: list[Path], corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments: dict[str, Any] = {"data": corpus, "routing": False, "overwrite": True, **SMALL}
    for folder in (models[0], corpus):
        with pytest.raises(OutputError, match="no report of moefy's"):
            moefy.write_report(folder, models[1], **arguments)
    moefy.write_report(out, models[0], **arguments)
    with pytest.raises(OutputError, match="pass --overwrite"):
        moefy.write_report(out, models[0], **arguments | {"overwrite": False})
    (out / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"holds notes\.txt beside a report"):
        moefy.write_report(out, models[0], **arguments)
    with pytest.raises(UsageError, match="two models are named"):
        moefy.write_report(tmp_path / "other", [models[0], models[0]], data=corpus)
    with pytest.raises(UsageError, match="--limit 0"):
        moefy.write_report(tmp_path / "other", models[0], tasks=["sciq"], limit=0, data=corpus)


def test_what_the_page_says_of_the_measurement(
    models: list[Path],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    own_cache: Path,
) -> None:
    out = tmp_path / "out"
    words: list[object] = ["report", out, *models[:2], "--tasks", "winogrande", "--limit", 2]
    words += ["--data", corpus, "--windows", 1, "--no-routing", "--sequence-length", 48]
    monkeypatch.setattr(sys, "argv", ["moefy", *map(str, words), "--dtype", "bfloat16"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    text = (out / "report.html").read_text()
    assert "±" in dict(zip(*Page(text).tables[2][:2], strict=True))["split"]
    assert "of each, in bfloat16." in text
    assert "dtype bfloat16" in text
    assert "sequence_length 48" in text
