"""The report: models measured side by side, shown on one page, and noted in their model cards."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

from moefy.checkpoint.card import model_card, with_results
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.source import resolve
from moefy.data.domains import Side
from moefy.errors import UsageError
from moefy.evaluation.compare import evaluate
from moefy.evaluation.routing import measure_routing
from moefy.evaluation.suite import check_suite, evaluate_suite
from moefy.progress import ProgressFn, silent
from moefy.report.findings import Report, facts_of, read_logs, read_record
from moefy.report.page import write_page
from moefy.report.suite_tables import suite_rows
from moefy.report.tables import comparison_rows, markdown
from moefy.report.verdict import verdict
from moefy.run_folder import RunFolder
from moefy.storage import replace_file


def write_report(
    out: str | Path,
    models: str | Path | Sequence[str | Path],
    *,
    suite: str | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    hub: bool | None = None,
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
    `measure_routing`'s, benchmarks are `evaluate_suite`'s and continue where an earlier call was
    interrupted. The results also go into the README.md of every model folder that moefy wrote,
    between marks, in the place of an earlier report's.

    Args:
        out: Folder to write; it appears whole or not at all.
        models: Model folders, or anything `convert` takes as a source; the first dense one is what
            the others are compared with.
        suite: "llama-moe" measures the paper's eleven benchmarks too.
        tasks: Names of tasks of lm-evaluation-harness to measure too.
        limit: Items per benchmark; None for all.
        hub: Whether the benchmarks come from the hub; see `evaluate_suite`.
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
        StorageError: The disk is full, or a place cannot be written; if that is a model card's,
            the report is there.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    shown = list(names) if names else short_names(given)
    if repeated := [name for name, count in Counter(shown).items() if count > 1]:
        raise UsageError(f"two models are named {repeated[0]}: name each once")
    named = dict(zip(shown, map(str, given), strict=True))
    benchmarks: dict[str, Any] = {"suite": suite, "tasks": tasks, "limit": limit, "dtype": dtype}
    text = {"data": data, "split": split, "windows": windows, "sequence_length": sequence_length}
    options = benchmarks | {"tasks": ",".join(tasks) or (), "hub": hub, "routing": routing} | text
    with RunFolder(out, "report", overwrite=overwrite, sources=given) as run:
        with_suite = bool(suite or tasks)
        if with_suite:
            check_suite(given, **benchmarks)
        facts = facts_of(_command(out, given, options), str(data), split, suite=with_suite)
        run.begin({key: value for key, value in facts.items() if key != "date"})
        suite_options = benchmarks | {"hub": hub} if with_suite else None
        done = _measure(run.out, named, facts, text, suite_options, routing, report)
        if not run.was_finished:
            write_page(run.work, done, title="moefy report", lead=verdict(done))
            run.finish()
        # The report is whole now: a card that cannot be written costs the card alone. The folder
        # is still held, so that a call that is killed here can be made again.
        own = {name: Path(model).expanduser() for name, model in named.items()}
        noted = [file for name, file in own.items() if cards and _note_in_card(file, name, done)]
    return replace(done, cards=noted)


def _measure(
    out: Path,
    models: Mapping[str, str],
    facts: Mapping[str, Any],
    text: Mapping[str, Any],
    suite: Mapping[str, Any] | None,
    routing: bool,
    report: ProgressFn,
) -> Report:
    """Measure models by name; the options of `evaluate` are `text`, of `evaluate_suite` `suite`."""
    folders = {name: resolve(model, report=report) for name, model in models.items()}
    # A damaged record is refused here, before anything is measured.
    records = {name: read_record(folder) for name, folder in folders.items()}
    paths = list(folders.values())
    shown: dict[str, Any] = {"names": list(folders), "report": report}
    comparison = evaluate(paths, **text, **shown)
    routed, scores = None, None
    if routing and any(result.cost.experts for result in comparison.results):
        routed = measure_routing(paths, **text, **shown)
    if suite:
        scores = evaluate_suite(paths, **suite, **shown)
    return Report(out, comparison, scores, routed, records, read_logs(folders), facts)


def _note_in_card(folder: Path, name: str, done: Report) -> bool:
    """Put the results into the card of a model that moefy wrote; say whether it is one."""
    record = read_record(folder)
    if record is None:
        return False
    versions = ", ".join(" ".join(each) for each in done.facts["versions"].items())
    lines = [
        "## Results",
        "",
        f"This model is *{name}*. Measured with `moefy report`, {done.facts['date']} ({versions}), "
        f"on {done.text}:",
        "",
        markdown(comparison_rows(done.comparison)),
    ]
    if suite := done.suite:
        items = "all items" if suite.limit is None else f"at most {suite.limit:,} items of each"
        lines += [
            f"Benchmarks in percent ± standard error, {items}; differences from the dense model "
            "and retention with 95% intervals:",
            "",
            markdown(suite_rows(suite)),
        ]
    card = folder / "README.md"
    text = card.read_text() if card.is_file() else model_card(record, read_config(folder))
    # The weights stay as they are, so that no benchmark is measured again.
    replace_file(card, with_results(text, "\n".join(lines)))
    return True


def _command(out: str | Path, models: Sequence[str | Path], options: Mapping[str, Any]) -> str:
    """Return the command that makes a report; options at their default are left out."""
    parameters = signature(write_report).parameters
    words = ["moefy", "report", str(out), *map(str, models)]
    for name, value in options.items():
        # What is not written is the default of that version, which the page names.
        if value != parameters[name].default:
            flag = name.replace("_", "-")
            words.append(f"--no-{flag}" if value is False else f"--{flag}")
            words += [] if isinstance(value, bool) else [str(value)]
    return shlex.join(words)


def short_names(models: Sequence[str | Path]) -> list[str]:
    """Return the last part of every path; the whole path where that is not enough."""
    names = [Path(model).name or str(model) for model in models]
    counts = Counter(names)
    return [
        name if counts[name] == 1 else str(model) for name, model in zip(names, models, strict=True)
    ]
