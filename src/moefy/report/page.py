"""What a report holds, its verdict, and its page, figures and numbers as files."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moefy.checkpoint.card import command_of, recipe_of, steps_of
from moefy.data.records import Side
from moefy.evaluation.compare import Comparison, Result
from moefy.evaluation.paired import Interval
from moefy.evaluation.routing import RoutingResult
from moefy.evaluation.suite import SuiteResult
from moefy.hardware import device
from moefy.report import tables
from moefy.report.charts import k_chart, quality_charts, training_charts
from moefy.report.tables import Columns, Rows, millions, number, percent, shown, with_interval
from moefy.storage import replace_file, storage_errors

SPLIT_NAMES: dict[Side, str] = {"heldout": "held-out", "train": "training", "all": "all"}
"""What a split's documents are called."""


@dataclass(frozen=True)
class Report:
    """What was measured, and where it was written."""

    folder: Path  # holds the page, results.json, results.md, every figure as PNG and CSV
    comparison: Comparison
    suite: SuiteResult | None  # of the same models in the same order; None if not asked for
    routing: RoutingResult | None  # of the MoE models; None without any, or if not asked for
    records: Mapping[str, dict[str, Any] | None]  # moefy.json by model; None: not made by moefy
    logs: Mapping[str, list[dict[str, Any]]]  # the steps of training, by model that was trained
    facts: Mapping[str, Any]  # what else results.json says: see `facts_of`
    cards: Sequence[Path] = ()  # model folders whose cards show these results

    @property
    def dense(self) -> Result | None:
        """The model that the others are compared with."""
        results = self.comparison.results
        return next((r for r in results if r.name == self.comparison.reference), None)

    @property
    def failures(self) -> list[tuple[str, str, str]]:
        """Model, benchmark and reason of every score that is missing."""
        return [] if self.suite is None else self.suite.failures

    @property
    def text(self) -> str:
        """How much text was read, and which."""
        kind = SPLIT_NAMES[self.facts["settings"]["split"]]
        data = self.facts["settings"]["data"]
        return f"{self.comparison.tokens:,} tokens of the {kind} documents of {data}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the steps of the training are in the charts' files."""
        parts = ("comparison", "suite", "routing")
        found = {part: getattr(self, part) for part in parts}
        measured = {part: result and result.to_dict() for part, result in found.items()}
        return {**self.facts, **measured, "models": dict(self.records)}

    def kept(self, result: Result) -> Interval | None:
        """Return how many percent of the dense model's average on the benchmarks a model has."""
        models = self.suite.models if self.suite else []
        paired = next((m.against_reference for m in models if m.name == result.name), None)
        kept = paired.retention if paired else None
        return kept and Interval(100 * kept.value, 100 * kept.low, 100 * kept.high)


def facts_of(command: str, **settings: Any) -> dict[str, Any]:
    """Return what a report says of its measurement: what, when, where, with which versions."""
    packages = ["moefy", "torch", "transformers", *(["lm_eval"] if settings.get("tasks") else [])]
    on_cpu = device().type == "cpu"
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command,
        "settings": settings,
        "machine": {
            "platform": platform.platform(),
            "device": "cpu" if on_cpu else torch.cuda.get_device_name(),
            # Speeds on a CPU mean nothing without this number.
            "threads": torch.get_num_threads(),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in packages},
    }


def verdict(report: Report) -> str:
    """Say in a sentence what the best MoE model keeps of the dense one, and at what cost."""
    results, dense = report.comparison.results, report.dense
    # Several conversions may be shown: the sentence is about the one that lost least.
    moes = [result for result in results if result.cost.experts]
    best = min(moes or results, key=lambda result: result.perplexity)
    perplexity = number(best.perplexity)
    if dense is None or dense is best:
        return (
            f"{best.name} uses {millions(best.cost.active_params)} parameters per token and has a "
            f"perplexity of {perplexity} on {report.text}."
        )
    share = best.cost.active_params / dense.cost.active_params
    excess = best.excess_loss or Interval(0.0, 0.0, 0.0)
    # Training on the same text can bring a conversion below its dense model.
    side = "below" if excess.value < 0 else "above"
    parts = [
        f"has a loss {abs(excess.value):.3f} nats per token {side} "
        f"{dense.name}'s (95% interval {excess.low:+.3f} to {excess.high:+.3f}; perplexity "
        f"{perplexity} against {number(dense.perplexity)})"
    ]
    if kept := report.kept(best):
        parts.append(f"keeps {with_interval(kept, '.1f')} percent of its average on the benchmarks")
    if best.decode_tokens_per_s and dense.decode_tokens_per_s:
        speed = best.decode_tokens_per_s / dense.decode_tokens_per_s
        parts.append(f"decodes {speed:.2f} times as fast here")
    said = ", ".join(parts[:-1]) + (", and " if parts[1:] else "") + parts[-1]
    return f"With {share:.0%} of the parameters active per token, {best.name} {said}."


def verdict_rows(report: Report) -> Rows:
    """Return header and rows of the verdict: quality, speed and size of every model."""
    dense, suite = report.dense, report.suite

    def decode(result: Result) -> str:
        speed = shown(result.decode_tokens_per_s, ".1f")
        if not (dense and dense.decode_tokens_per_s and result.decode_tokens_per_s):
            return speed
        return f"{speed} (× {result.decode_tokens_per_s / dense.decode_tokens_per_s:.2f})"

    columns: Columns[Result] = [("model", lambda r: r.name)]
    if dense:
        columns.append(("loss above dense, nats", lambda r: with_interval(r.excess_loss, ".3f")))
    columns.append(("perplexity", lambda r: number(r.perplexity)))
    if suite:
        averages = {m.name: percent(m.average, m.average_stderr) for m in suite.models}
        columns.append(("benchmarks, %", lambda r: averages[r.name]))
        columns.append(("kept of dense, %", lambda r: with_interval(report.kept(r), ".1f")))
    columns += [
        ("decode, tokens/s", decode),
        ("parameters", lambda r: millions(r.cost.total_params)),
        ("active", lambda r: millions(r.cost.active_params)),
    ]
    return tables.table(report.comparison.results, columns)


def write_page(
    folder: Path, report: Report, *, title: str, lead: str, samples: Mapping[str, str] | None = None
) -> None:
    """Write a report's files: report.html, results.json, results.md, every figure as PNG and CSV.

    Args:
        folder: Folder that gets the files.
        report: What is shown.
        title: Title of the page.
        lead: First sentence of the page.
        samples: Text that each model wrote.

    Raises:
        StorageError: The disk is full.
    """
    charts = quality_charts(report.comparison)
    charts += [k_chart(report.routing)] if report.routing else []
    charts += training_charts(report.logs)
    # Figures are drawn before the page, whose SVG takes their final layout.
    with storage_errors(folder):
        for chart in charts:
            chart.write(folder)
    steps = {
        name: [(command_of(step), step["moefy"], recipe_of(step)) for step in steps_of(record)]
        if record
        else []
        for name, record in report.records.items()
    }
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        # Whatever comes from a file is text: nothing but the figures may be HTML.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.j2").render(
        {"title": title, "lead": lead, "report": report, "samples": samples}
        | {"charts": charts, "steps": steps, "verdict_rows": verdict_rows, "tables": tables}
    )
    replace_file(folder / "report.html", page)
    replace_file(folder / "results.md", tables.markdown(tables.comparison_rows(report.comparison)))
    # Lists of numbers stand on one line: the load of the experts is long.
    text = json.dumps(report.to_dict(), indent=2)
    text = re.sub(r"\[[-+.,\s\deE]+\]", lambda found: " ".join(found[0].split()), text)
    replace_file(folder / "results.json", text + "\n")
