"""The report: models measured side by side, shown on one page, and noted in their model cards."""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moefy.checkpoint.card import (
    command_of,
    model_card,
    read_record,
    recipe_of,
    rendered,
    steps_of,
    with_results,
)
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.source import name_of, resolve
from moefy.data.records import Side
from moefy.errors import UsageError
from moefy.evaluation.compare import Comparison, Result, evaluate
from moefy.evaluation.paired import Interval
from moefy.evaluation.routing import RoutingResult, measure_routing
from moefy.evaluation.suite import SuiteResult, check_suite, evaluate_suite
from moefy.hardware import device
from moefy.progress import ProgressFn, silent
from moefy.report import tables
from moefy.report.charts import loss_chart, quality_charts
from moefy.report.tables import (
    Columns,
    Rows,
    comparison_rows,
    markdown,
    millions,
    number,
    percent,
    shown,
    with_interval,
)
from moefy.run_folder import RunFolder
from moefy.storage import replace_file, storage_errors
from moefy.training.state import LOG, read_log
from moefy.version import __version__

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
    def text(self) -> str:
        """How much text was read, and which."""
        kind = SPLIT_NAMES[self.facts["settings"]["split"]]
        data = name_of(self.facts["settings"]["data"])  # it goes into cards, too
        return f"{self.comparison.tokens:,} tokens of the {kind} documents of {data}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the steps of the training are in the charts' files."""
        parts = ("comparison", "suite", "routing")
        found = {part: getattr(self, part) for part in parts}
        measured = {part: result and asdict(result) for part, result in found.items()}
        return {**self.facts, **measured, "models": dict(self.records)}

    def kept(self, result: Result) -> Interval | None:
        """Return how many percent of the dense model's average on the benchmarks a model has."""
        models = self.suite.models if self.suite else []
        paired = next((m.against_reference for m in models if m.name == result.name), None)
        kept = paired.retention if paired else None
        return kept and Interval(100 * kept.value, 100 * kept.low, 100 * kept.high)


def facts_of(command: str, **settings: Any) -> dict[str, Any]:
    """Return what a report says of its measurement: what, when, where, with which versions."""
    packages = ["torch", "transformers", *(["lm_eval"] if settings.get("tasks") else [])]
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
        "versions": {"python": platform.python_version(), "moefy": __version__}
        | {name: version(name) for name in packages},
    }


def write_report(
    out: str | Path,
    models: str | Path | Sequence[str | Path],
    *,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    dtype: str = "float32",
    data: str | Path = "demo",
    split: Side = "heldout",
    windows: int = 8,
    sequence_length: int = 512,
    routing: bool = True,
    cards: bool = True,
    names: Sequence[str] | None = None,
    overwrite: bool = False,
    report: ProgressFn = silent,
) -> Report:
    """Measure models and write what was found as one page that needs nothing else.

    Held-out loss, distance from the dense model, cost and speed are `evaluate`'s, routing is
    `measure_routing`'s, benchmarks are `evaluate_suite`'s. The results also go into the README.md
    of every model folder that moefy wrote, between marks, in the place of an earlier report's.

    Args:
        out: Folder to write; it appears whole or not at all.
        models: Model folders, or anything `convert` takes; the first dense one is the reference.
        tasks: Names of tasks of lm-evaluation-harness to measure too; see `evaluate_suite`.
        limit: Items per benchmark; None for all.
        dtype: "float32" or "bfloat16", in which the benchmarks are computed.
        data: A folder of `<domain>.jsonl(.gz)` files, or `demo`.
        split: `heldout`, `train` or `all`.
        windows: Windows of text per domain.
        sequence_length: Tokens per window.
        routing: Whether to watch the routers of MoE models.
        cards: Whether to write the results into the model cards.
        names: Names to show instead of the folders'.
        overwrite: Replace an earlier report in `out`.
        report: Function that is told about progress.

    Raises:
        UsageError: A model, the text, a benchmark or the output is not usable; nothing was written.
        StorageError: A place cannot be written; if that is a model card's, the report is there.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    labels = list(names) if names else short_names(given)
    if repeated := [name for name, count in Counter(labels).items() if count > 1]:
        raise UsageError(f"two models are named {repeated[0]}: name each once")
    own = {name: Path(model).expanduser() for name, model in zip(labels, given, strict=True)}
    text: dict[str, Any] = {"windows": windows, "sequence_length": sequence_length}
    text |= {"data": str(data), "split": split}
    benchmarks: dict[str, Any] = {"tasks": list(tasks), "limit": limit, "dtype": dtype}
    settings = {"models": list(map(str, given)), **text, "routing": routing}
    with RunFolder(out, "report", overwrite=overwrite, sources=given) as run:
        if tasks:
            check_suite(given, **benchmarks)
        facts = facts_of("moefy report", **settings, **(benchmarks if tasks else {}))
        run.begin({key: value for key, value in facts.items() if key != "date"})
        folders = [resolve(model, report=report) for model in given]
        by_name = dict(zip(labels, folders, strict=True))
        # A damaged record is refused here, before anything is measured.
        records = {name: read_record(folder) for name, folder in by_name.items()}
        how: dict[str, Any] = {"names": labels, "report": report}
        comparison = evaluate(folders, **text, **how)
        routed = routing and any(result.cost.experts for result in comparison.results)
        done = Report(
            run.out,
            comparison,
            evaluate_suite(folders, **benchmarks, **how) if tasks else None,
            measure_routing(folders, **text, **how) if routed else None,
            records,
            {name: read_log(f) for name, f in by_name.items() if (f / LOG).is_file()},
            facts,
        )
        if not run.was_finished:
            write_page(run.work, done, title="moefy report", lead=verdict(done))
            run.finish()
        # The report is whole now: a card that cannot be written costs the card alone. The folder
        # is still held, so that a call that is killed here can be made again.
        noted = [file for name, file in own.items() if cards and _note_in_card(file, name, done)]
    return replace(done, cards=noted)


def _note_in_card(folder: Path, name: str, done: Report) -> bool:
    """Put the results into the card of a model that moefy wrote; say whether it is one."""
    record = read_record(folder)
    if record is None:
        return False
    results = rendered("moefy.report", "results.md.j2", name=name, report=done, tables=tables)
    card = folder / "README.md"
    text = card.read_text() if card.is_file() else model_card(record, read_config(folder))
    # The weights stay as they are, so that no benchmark is measured again.
    replace_file(card, with_results(text, results))
    return True


def short_names(models: Sequence[str | Path]) -> list[str]:
    """Return the last part of every path; the whole path where that is not enough."""
    names = [Path(model).name or str(model) for model in models]
    return [
        name if names.count(name) == 1 else str(model)
        for name, model in zip(names, models, strict=True)
    ]


def verdict(report: Report) -> str:
    """Say in a sentence what the best MoE model keeps of the dense one, and at what cost."""
    results, dense = report.comparison.results, report.dense
    # Several conversions may be shown: the sentence is about the one that lost least.
    moes = [result for result in results if result.cost.experts]
    # Training on the judge's kind of text lowers the perplexity of a model that moves away from
    # the dense one, so the divergence from that decides where it is known.
    best = min(moes or results, key=lambda r: (r.kl_to_reference or 0.0, r.perplexity))
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
    parts = []
    if best.kl_to_reference is not None:
        parts.append(f"has a KL divergence of {best.kl_to_reference:.3f} from {dense.name}")
    parts.append(
        f"{'' if parts else 'has '}a loss {abs(excess.value):.3f} nats per token {side} "
        f"{dense.name}'s (95% interval {excess.low:+.3f} to {excess.high:+.3f}; perplexity "
        f"{perplexity} against {number(dense.perplexity)})"
    )
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
        columns.append(("KL to dense", lambda r: shown(r.kl_to_reference, ".3f")))
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


def write_page(folder: Path, report: Report, *, title: str, lead: str) -> None:
    """Write a report's files: report.html, results.json, results.md, every figure as PNG and CSV.

    Args:
        folder: Folder that gets the files.
        report: What is shown.
        title: Title of the page.
        lead: First sentence of the page.

    Raises:
        StorageError: The disk is full.
    """
    charts = quality_charts(report.comparison)
    charts += [loss_chart(report.logs)] if report.logs else []
    with storage_errors(folder):
        for chart in charts:
            chart.write(folder)
    steps = {
        name: [(command_of(step), step["moefy"], recipe_of(step)) for step in steps_of(record)]
        if record
        else []
        for name, record in report.records.items()
    }
    page = rendered(
        *("moefy.report", "report.html.j2"),
        **{"title": title, "lead": lead, "report": report, "charts": charts, "steps": steps},
        **{"verdict_rows": verdict_rows, "tables": tables},
    )
    replace_file(folder / "report.html", page)
    replace_file(folder / "results.md", markdown(comparison_rows(report.comparison)))
    # Lists of numbers stand on one line: the load of the experts is long.
    text = json.dumps(report.to_dict(), indent=2)
    text = re.sub(r"\[[-+.,\s\deE]+\]", lambda found: " ".join(found[0].split()), text)
    replace_file(folder / "results.json", text + "\n")
