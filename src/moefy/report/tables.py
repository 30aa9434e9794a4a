"""Results as rows of text, which the terminal, Markdown, CSV files and HTML all show."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from moefy.storage import replace_file

if TYPE_CHECKING:
    from moefy.checkpoint.cost import Inspection
    from moefy.evaluation.compare import Comparison, Result
    from moefy.evaluation.paired import Interval
    from moefy.evaluation.routing import RoutingResult
    from moefy.evaluation.speed import Speed, SpeedComparison
    from moefy.evaluation.suite import SuiteResult

Rows = list[list[str]]
"""The header first."""
Item = TypeVar("Item")
Columns = list[tuple[str, Callable[[Item], str]]]
"""Each column's header, and how an item is shown in it."""


def table(items: Iterable[Item], columns: Columns[Item]) -> Rows:
    """Return header and rows, an item a row."""
    header = [name for name, _ in columns]
    return [header, *([cell(item) for _, cell in columns] for item in items)]


def comparison_rows(comparison: Comparison) -> Rows:
    """Return header and rows of a comparison, a model a row."""
    domains: Columns[Result] = [
        # the default argument binds this turn's domain
        (domain, lambda r, domain=domain: number(r.domain_perplexity[domain]))  # type: ignore[misc]
        for domain in comparison.results[0].domain_perplexity
    ]
    columns: Columns[Result] = [
        ("model", lambda r: r.name),
        ("KL to dense", lambda r: shown(r.kl_to_reference, ".3f")),
        ("loss above", lambda r: shown(r.excess_loss.value if r.excess_loss else None, ".3f")),
        ("perplexity", lambda r: number(r.perplexity)),
        *domains,
        ("top-1", lambda r: shown(r.top1_agreement, ".1%")),
        ("params", lambda r: millions(r.cost.total_params)),
        ("active", lambda r: millions(r.cost.active_params)),
        ("GFLOP/token", lambda r: f"{r.cost.flops_per_token / 1e9:.3f}"),
        ("prefill tok/s", lambda r: f"{r.prefill_tokens_per_s:.0f}"),
        ("decode tok/s", lambda r: shown(r.decode_tokens_per_s, ".1f")),
    ]
    return table(comparison.results, columns)


def speed_rows(comparison: SpeedComparison) -> Rows:
    """Return header and rows of measured speeds."""
    columns: Columns[Speed] = [
        ("runtime", lambda s: f"{s.runtime}, {s.dtype}"),
        ("phase", lambda s: s.phase + f" of {s.batch}" * (s.batch > 1)),
        ("model", lambda s: s.model),
        ("tok/s", lambda s: number(s.tokens_per_s)),
        ("/ dense", lambda s: f"{s.of_dense:.2f}"),
        ("range", lambda s: " to ".join(f"{end:.2f}" for end in s.spread)),
        ("/ same size", lambda s: shown(s.of_active_size, ".2f")),
        ("work", _work),
        ("experts by", lambda s: s.implementation or "–"),
    ]
    return table(comparison.speeds, columns)


def _work(speed: Speed) -> str:
    """Say what bounds a pass: weights that are read for one token, else arithmetic."""
    if speed.bytes_per_s is not None:
        return f"{speed.bytes_per_s / 1e9:.1f} GB/s"
    return f"{number(speed.flops_per_s / 1e9)} GFLOP/s"


def counted(count: int, noun: str) -> str:
    """Return a number of things, as in 1 round and 2 rounds."""
    return f"{count:,} {noun}{'s' * (count != 1)}"


def speed_title(comparison: SpeedComparison) -> str:
    """Say what was measured, and on what."""
    done, place = comparison, comparison.device
    if place == "cpu":
        place = counted(done.threads, "CPU thread")
    scaled = f"; measured with 1 and {done.layers} layers, and scaled to all" if done.layers else ""
    return (
        f"{done.prompt_tokens} tokens of prompt and {done.new_tokens} decoded, medians of "
        f"{counted(done.rounds, 'round')}{scaled}; {place}, memory at "
        f"{done.read_bytes_per_s / 1e9:.1f} GB/s"
    )


def inspection_rows(inspection: Inspection) -> Rows:
    """Return header and rows of an inspection: each split beside the dense model."""
    costs = inspection.costs
    # A model that is converted already has no dense model beside it.
    dense = costs["dense"].flops_per_token if "dense" in costs else None
    columns: Columns[str] = [
        ("split", str),
        ("total", lambda split: millions(costs[split].total_params)),
        ("active", lambda split: millions(costs[split].active_params)),
        ("GFLOP/token", lambda split: f"{costs[split].flops_per_token / 1e9:.3f}"),
        ("of dense", lambda split: f"{costs[split].flops_per_token / dense:.0%}" if dense else "–"),
    ]
    return table(costs, columns)


def corpus_rows(record: dict[str, Any]) -> Rows:
    """Return header and rows of a prepared corpus's record, a domain a row."""
    rows = [["domain", "documents", "tokens", "held-out documents", "held-out tokens"]]
    rows[0] += ["characters/token", "broken"]
    for domain, found in record["domains"].items():
        tokens = found["tokens"] + found["heldout_tokens"]
        characters = found["characters"] + found["heldout_characters"]
        keys = ("documents", "tokens", "heldout_documents", "heldout_tokens")
        row = [domain, *(f"{found[key]:,}" for key in keys)]
        row.append(f"{characters / tokens:.2f}" if tokens else "–")
        rows.append([*row, f"{found['broken_lines']:,}"])
    return rows


def routing_rows(result: RoutingResult) -> Rows:
    """Return header and rows of the load, a layer of a model a row, below them the model's mean."""
    rows = [["model", "layer", "entropy", "dead", "max/mean", "domains (bits)"]]
    forms = (".3f", ".3g", ".2f", ".4f")
    for model in result.models:
        dead = [len(experts) for experts in model.dead]
        columns: list[Any] = [model.entropy, dead, model.max_over_mean, model.domain_distance]
        layers = list(zip(*columns, strict=True))
        lines = [*enumerate(layers), ("mean", [fmean(each) for each in columns])]
        for label, stats in lines:
            cells = [f"{value:{form}}" for value, form in zip(stats, forms, strict=True)]
            rows.append([model.name, str(label), *cells])
    return rows


def suite_rows(result: SuiteResult) -> Rows:
    """Return header and rows of the scores; average, retention and minutes below.

    After each model that is compared with the reference come its differences from it.
    """
    rows = [["benchmark", "shots", "metric", "items"]]
    for benchmark in result.benchmarks:
        items = result.models[0].scores[benchmark.name].items
        rows.append([benchmark.name, str(benchmark.shots), benchmark.metric, f"{items:,}"])
    compared = any(model.against_reference for model in result.models)
    retention = ["retention", "retention above chance"] if compared else []
    rows += [[label, "", "", ""] for label in ("average", *retention, "minutes")]
    names = [benchmark.name for benchmark in result.benchmarks]
    for model in result.models:
        minutes = sum(score.elapsed_s for score in model.scores.values()) / 60
        scores = [model.scores[name] for name in names]
        own = [model.name, *(percent(score.value, score.stderr) for score in scores)]
        own += [percent(model.average, model.average_stderr)]
        columns = [[*own, *("" for _ in retention), f"{minutes:.1f}"]]
        if paired := model.against_reference:
            beside = ["difference"]
            beside += [with_interval(paired.differences[name], "+.1f", scale=100) for name in names]
            beside += [with_interval(paired.average, "+.1f", scale=100)]
            kept = (paired.retention, paired.retention_above_chance)
            columns.append([*beside, *(with_interval(k, ".1f", scale=100) for k in kept), ""])
        # Rows are begun above; a model adds one column to them, or two with its differences.
        for column in columns:
            for row, cell in zip(rows, column, strict=True):
                row.append(cell)
    return rows


def suite_notes(result: SuiteResult) -> list[str]:
    """Say how the data is not the paper's, and what was cut."""
    notes = [
        f"{b.name} is not the paper's data: {b.differs}." for b in result.benchmarks if b.differs
    ]
    return notes + [
        f"{model.name}: {score.truncated:,} requests of {name} did not fit into its context and "
        "lost their beginning."
        for model in result.models
        for name, score in model.scores.items()
        if score.truncated
    ]


def percent(value: float, error: float | None) -> str:
    """Return a share and its standard error as tables show them, in percent."""
    return with_error(100 * value, error and 100 * error, ".1f")


def read_rows(text: str, kind: type[Item]) -> list[Item]:
    """Read a CSV file's rows as dataclasses; an empty cell is None.

    Raises:
        ValidationError: a row is none.
    """
    rows = [{k: v or None for k, v in row.items()} for row in csv.DictReader(text.splitlines())]
    return TypeAdapter(list[kind]).validate_python(rows)  # type: ignore[valid-type]


def write_csv(path: Path, rows: Rows) -> None:
    """Write rows as a CSV file, whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    replace_file(path, text.getvalue())


def markdown(rows: Rows) -> str:
    """Return rows as a Markdown table, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rule, *rows[1:]])


def shown(value: float | None, form: str) -> str:
    """Return a number in a format, – where there is none."""
    return "–" if value is None else format(value, form)


def with_error(value: float | None, error: float | None, form: str = ".3f") -> str:
    """Return a number with its standard error, – where there is none."""
    return shown(value, form) + ("" if error is None else f" ± {error:{form}}")


def with_interval(interval: Interval | None, form: str, *, scale: float = 1) -> str:
    """Return a value with its 95% interval, – where there is none."""
    if interval is None:
        return "–"
    ends = (interval.value, interval.low, interval.high)
    value, low, high = (format(scale * end, form) for end in ends)
    return f"{value} [{low}, {high}]"


def number(value: float) -> str:
    """Return a number with one decimal, or none where it is large."""
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def millions(count: int) -> str:
    """Return a count in millions; in billions or thousands where that is easier to read."""
    if count >= 1e9:
        return f"{count / 1e9:.2f}B"
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}K"
