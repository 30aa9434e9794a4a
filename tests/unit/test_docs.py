"""The documentation is what files and code say: tables, reference, commands and links."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import re
import runpy
import subprocess
from pathlib import Path

import publish_api
import pytest
import yaml
from tests.pages import PAGES, ROOT, blocks, check, commands, found_command, prose

import moefy
from moefy.report.tables import markdown
from moefy.studies.report import page

MARK = re.compile(r"<!-- ([\w-]+) -->\n(.*?)<!-- /\1 -->", re.DOTALL)
TABLES = {
    "calibrated": "experiments/calibrated",
    "streaming": "experiments/streaming",
    "prepare": "experiments/prepare",
    "transformers": "runtimes/transformers",
    "machine": "runtimes/machine",
    "experts": "runtimes/experts",
    "speed": "runtimes/speed",
    "prefill-profile": "performance/prefill-profile",
    "output-loss": "training/output-loss",
    "router-noise": "training/router-noise",
    "recovery": "training/recovery",
    "expert-layers": "performance/expert-layers",
    "expert-rows": "performance/expert-rows",
    "step-overhead": "performance/step-overhead",
    "memory": "performance/memory",
    "quantised": "performance/quantised",
    "training-speed": "performance/training-speed",
    "training-speed-gpu": "performance/training-speed-gpu",
    "suite-time": "results/suite-time",
    "tuning": "tuning/tuning",
    "fit": "construction/fit",
    "frontier": "construction/frontier",
    "frontier-speed": "construction/frontier-speed",
    "serving": "runtimes/serving",
    "max-loss": "construction/max-loss",
    "config_keys": "reliability/config_keys",
    "fuzz": "reliability/fuzz",
    "kills": "reliability/kills",
    "long-run": "reliability/long-run",
    "benchmarks-tuned": "tuning/benchmarks-tuned",
    "side-by-side": "tuning/side-by-side",
}
"""Marks of tables in docs/ that are a CSV file as it is."""
COMPUTED = {
    *("families", "not_carried", "in_runtimes", "not_run"),
    *("agreement", "refusals", "benchmarks", "heldout", "prototype", "frontier-says"),
    *("frontier-in-short", "speed-in-short"),  # the README's
    *(f"distillation-{name}" for name in ("stories260k", "smollm2-135m", "smollm2-135m-h200")),
}
"""Marks of those that are worked out; each has a test here or beside what computes it."""


def marked() -> dict[str, str]:
    """Return what stands between the marks of the README and of every page in docs/."""
    pages = [
        page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    ]
    found = [part for page in pages for part in MARK.findall(page)]
    assert len(dict(found)) == len(found)  # no mark twice
    return {name: text for name, text in found if name not in ("results", "demo")}


def csv_rows(file: Path) -> list[list[str]]:
    with file.open() as lines:
        return list(csv.reader(lines))


def test_the_first_screen_is_not_too_long() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


def test_no_table_is_without_its_file() -> None:
    assert set(marked()) == {*TABLES, *COMPUTED}


@pytest.mark.parametrize("mark", TABLES)
def test_the_measured_tables(mark: str) -> None:
    assert marked()[mark] == markdown(csv_rows(ROOT / f"docs/{TABLES[mark]}.csv"))


@pytest.mark.parametrize("name", ["suite", "published", "heldout"])
def test_the_results_of_the_suite(name: str) -> None:
    table = markdown(csv_rows(ROOT / f"docs/results/{name}.csv"))
    assert table in (ROOT / "docs/results.md").read_text()


@pytest.mark.parametrize(
    ("mark", "folder"), [("heldout", "construction"), ("prototype", "experiments/prototype")]
)
def test_the_construction_tables(mark: str, folder: str) -> None:
    nats_rows = runpy.run_path(str(ROOT / "benchmarks/publish_construction.py"))["nats_rows"]
    assert marked()[mark] == markdown(nats_rows(ROOT / "docs" / folder / "leaderboard.csv"))


@pytest.mark.parametrize(
    ("measured", "marks"),
    [("agreement", ("agreement", "refusals")), ("families", ("in_runtimes", "not_run"))],
)
def test_the_runtimes_tables(measured: str, marks: tuple[str, str]) -> None:
    with (ROOT / f"docs/runtimes/{measured}.csv").open() as file:
        rows = list(csv.DictReader(file))
    tables = runpy.run_path(str(ROOT / "benchmarks/runtimes.py"))["agreement_tables"](rows)
    for mark, table in zip(marks, tables, strict=True):
        assert marked()[mark] == markdown(table)


def test_the_frontier_is_that_of_the_losses_and_speeds() -> None:
    parts = runpy.run_path(str(ROOT / "benchmarks/frontier.py"))
    folder = ROOT / "docs/construction"
    speeds, losses = (parts["read_csv"](folder / f"{n}.csv") for n in ("frontier-speed", "fit"))
    efforts = parts["joined"](speeds, losses)
    assert parts["rows_for"](efforts) == parts["read_csv"](folder / "frontier.csv")
    says = parts["sentences"](efforts)
    assert marked()["frontier-in-short"] == says
    assert marked()["frontier-says"] == says + parts["pictures"](efforts)
    assert all((folder / file).is_file() for file, _ in parts["drawn"](efforts))


@pytest.mark.parametrize("name", ["stories260k", "smollm2-135m", "smollm2-135m-h200"])
def test_the_distillation_tables(name: str) -> None:
    parts = runpy.run_path(str(ROOT / "benchmarks/publish_distillation.py"))
    curves = parts["_read"](ROOT / f"docs/training/distillation-{name}.csv")
    assert marked()[f"distillation-{name}"] == markdown(parts["result_rows"](curves))


def test_the_benchmarks_table() -> None:
    rows = runpy.run_path(str(ROOT / "benchmarks/suite.py"))["benchmark_rows"]()
    assert marked()["benchmarks"] == markdown(rows)


def test_the_studies() -> None:
    parts = runpy.run_path(str(ROOT / "benchmarks/publish_study.py"))
    studies = parts["studies_in"](ROOT / "docs/study")
    for folder in studies:
        assert page(folder) == (folder / "study.md").read_text()
    assert parts["overview"](studies, ROOT / "docs") == (ROOT / "docs/study.md").read_text()


def test_the_page_about_speed() -> None:
    parts = runpy.run_path(str(ROOT / "benchmarks/speed.py"))
    page = (ROOT / "docs/speed.md").read_text()
    assert parts["page"]() == page
    assert marked()["speed-in-short"] in page


def test_the_table_of_plan() -> None:
    parts = runpy.run_path(str(ROOT / "benchmarks/frontier.py"))
    place = ROOT / "docs/construction"
    speeds, losses = (parts["read_csv"](place / f) for f in ("frontier-speed.csv", "fit.csv"))
    assert csv_rows(parts["PLAN"]) == parts["plan_table"](speeds, losses)


@pytest.mark.parametrize("name", publish_api.PAGES)
def test_the_reference_is_what_the_code_says(name: str) -> None:
    assert publish_api.PAGES[name]() == (ROOT / f"docs/{name}.md").read_text()


def test_the_families_are_those_of_the_rows() -> None:
    tables = runpy.run_path(str(ROOT / "benchmarks/families.py"))["tables"]()
    assert all(marked()[mark] == markdown(rows) for mark, rows in tables.items())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_block_can_be_read(page: Path) -> None:
    for block in blocks(page, "bash", ""):
        if block.language == "bash":
            done = subprocess.run(["bash", "-n"], input=block.text, text=True, check=False)
            assert done.returncode == 0, block
        for words in commands(block.text):
            check(words)
    for block in blocks(page, "python"):
        tree = ast.parse(block.text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module or "")
                assert all(hasattr(module, name.name) for name in node.names), block
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "moefy":
                assert hasattr(moefy, node.attr), block
    for block in blocks(page, "yaml"):
        values = yaml.safe_load(block.text)
        if kind := re.match(r"# (\w+): ", block.text):
            publish_api.RECIPES[kind[1]].build(**values)
    for block in blocks(page, "json"):
        assert all(json.loads(line) for line in block.text.splitlines())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    for line in re.findall(r"`moefy ([a-z][^`]*)`", prose(page)):
        names, command, rest = found_command(re.split(r"\s+", line))
        assert names, line
        known = {"--help", *(name for option in command.params for name in option.opts)}
        assert {word.split("=")[0] for word in rest if word.startswith("--")} <= known, line


def _anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        file, _, anchor = link.partition("#")
        if not file.startswith("https://"):
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in _anchors(target), link
