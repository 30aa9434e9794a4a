"""The report: models measured side by side, shown on one page, and noted in their model cards."""

from __future__ import annotations

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefy.checkpoint.cost import cost
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.source import resolve
from moefy.data.domains import Side
from moefy.errors import UsageError
from moefy.evaluation.compare import evaluate
from moefy.evaluation.routing import measure_routing
from moefy.evaluation.suite import check_suite, evaluate_suite
from moefy.progress import ProgressFn, silent
from moefy.report.card_results import note_in_card
from moefy.report.findings import (
    Findings,
    machine,
    now,
    reported_models,
    versions,
)
from moefy.report.page import Section, html_page
from moefy.report.sections import headline, sections
from moefy.report.tables import comparison_rows, markdown
from moefy.storage import (
    check_output,
    refuse_others,
    replace_file,
    storage_errors,
    whole_folder,
)

RESULTS = "results.json"
_STAGE = "report"
_NUMBERS = re.compile(r"\[[-+.,\s\deE]+\]")
"""A list of numbers in JSON, which is written on one line: load and co-activation are long."""
_WINDOWS, _LENGTH = 8, 512


@dataclass(frozen=True)
class Report:
    """What `write_report` did.

    Attributes:
        folder: holds `report.html`, `results.json`, `results.md` and every figure as PNG and CSV.
        findings: what was measured.
        cards: model folders whose cards have the results now.
    """

    folder: Path
    findings: Findings
    cards: list[Path]


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
    windows: int = _WINDOWS,
    sequence_length: int = _LENGTH,
    routing: bool = True,
    cards: bool = True,
    names: Sequence[str] | None = None,
    overwrite: bool = False,
    report: ProgressFn = silent,
) -> Report:
    """Measure models and write what was found as one page that needs nothing else.

    Perplexity, distance from the dense model, cost and speed are `evaluate`'s, routing is
    `measure_routing`'s, benchmarks are `evaluate_suite`'s and continue where an earlier call was
    interrupted. The results also go into the README.md of every model folder that moefy wrote,
    between marks, in the place of an earlier report's.

    Args:
        out: folder to write; it appears whole or not at all.
        models: model folders, or anything `convert` takes as a source; the first dense one is what
            the others are compared with.
        suite: "llama-moe" measures the paper's eleven benchmarks too.
        tasks: of the harness, by name.
        limit: items per benchmark; None for all.
        hub: take the benchmarks from the hub; see `evaluate_suite`.
        dtype: "float32" or "bfloat16", in which the benchmarks are computed.
        data: a folder of `<domain>.jsonl(.gz)` files, or `demo`.
        split: `heldout`, `train` or `all`.
        windows: per domain.
        sequence_length: tokens per window.
        routing: watch the routers of MoE models.
        cards: write the results into the model cards.
        names: to show instead of the folders' names.
        overwrite: replace an earlier report in `out`.
        report: told about progress.

    Raises:
        UsageError: a model, the text, a benchmark or the output is not usable; nothing was written.
        StorageError: the disk is full, or a place cannot be written; if that is a model card's,
            the report is there.
    """
    out = Path(out).expanduser()
    given = [models] if isinstance(models, str | Path) else list(models)
    shown = list(names) if names else short_names(given)
    if repeated := [name for name, count in Counter(shown).items() if count > 1]:
        raise UsageError(f"two models are named {repeated[0]}: name each once")
    own = tuple(Path(model).expanduser() for model in given)
    check_output(out, overwrite=overwrite, sources=own, what="report", is_one=is_report)
    benchmarks: dict[str, Any] | None = None
    if suite or tasks:
        benchmarks = {"suite": suite, "tasks": tasks, "limit": limit, "dtype": dtype}
        check_suite(given, **benchmarks)
    folders = [resolve(model, report=report) for model in given]
    described = reported_models(folders, shown)
    text: dict[str, Any] = {
        "data": data, "split": split, "windows": windows, "sequence_length": sequence_length,
        "report": report,
    }  # fmt: skip
    comparison = evaluate(folders, names=shown, **text)
    watched = [i for i, folder in enumerate(folders) if cost(read_config(folder)).experts]
    routed = None
    if routing and watched:
        routed = measure_routing(folders, names=shown, **text)
    scores = None
    if benchmarks is not None:
        scores = evaluate_suite(folders, names=shown, hub=hub, report=report, **benchmarks)
    findings = Findings(
        comparison=comparison,
        suite=scores,
        routing=routed,
        models=described,
        data=str(data),
        split=split,
        command=_command(
            out,
            given,
            suite=suite,
            tasks=",".join(tasks) or None,
            limit=limit,
            hub=hub or None,
            no_hub=hub is False or None,
            dtype=None if dtype == "float32" else dtype,
            data=None if str(data) == "demo" else data,
            split=None if split == "heldout" else split,
            windows=None if windows == _WINDOWS else windows,
            sequence_length=None if sequence_length == _LENGTH else sequence_length,
            no_routing=not routing or None,
        ),
        date=now(),
        machine=machine(),
        versions=versions(suite=scores is not None),
    )
    with whole_folder(out) as partial:
        save(partial, findings, title="moefy report", lead=headline(findings))
    written = []
    if cards:
        pairs = zip(own, shown, strict=True)
        written = [folder for folder, name in pairs if note_in_card(folder, name, findings)]
    return Report(out, findings, written)


def save(
    folder: Path,
    findings: Findings,
    *,
    title: str,
    lead: str,
    more: Sequence[Section] = (),
    record: Mapping[str, Any] | None = None,
) -> None:
    """Write a report's files into a folder.

    Args:
        folder: gets report.html, results.json, results.md, and every figure as PNG and CSV.
        findings: what is shown.
        title: of the page.
        lead: its first sentence.
        more: sections of the page after those of the findings.
        record: goes into results.json too.

    Raises:
        StorageError: the disk is full.
    """
    parts = [*sections(findings), *more]
    files = ["report.html", RESULTS, "results.md"]
    with storage_errors(folder):
        for chart in (chart for part in parts for chart in part.charts):
            chart.write(folder)
            files += [f"{chart.name}.png", f"{chart.name}.csv"]
    whole = {"stage": _STAGE, **findings.to_dict(), **(record or {}), "files": files}
    replace_file(folder / "report.html", html_page(title, lead, parts))
    replace_file(folder / "results.md", markdown(comparison_rows(findings.comparison)))
    text = _NUMBERS.sub(lambda found: " ".join(found[0].split()), json.dumps(whole, indent=2))
    replace_file(folder / RESULTS, text + "\n")


def is_report(folder: Path) -> bool:
    """Return whether a folder holds a report.

    Raises:
        OutputError: and something else, which would be lost with it.
    """
    files = files_of_report(folder)
    if not files:
        return False
    refuse_others(folder, {file.name for file in folder.iterdir()} - files, "report")
    return True


def files_of_report(folder: Path) -> set[str]:
    """Return the files of the report in a folder; none where there is no report."""
    try:
        found = json.loads((folder / RESULTS).read_text())
    except (OSError, ValueError):
        return set()
    if not isinstance(found, dict) or found.get("stage") != _STAGE:
        return set()
    return set(found["files"])


def short_names(models: Sequence[str | Path]) -> list[str]:
    """Return the last part of every path; the whole path where that is not enough."""
    names = [Path(model).name or str(model) for model in models]
    counts = Counter(names)
    return [
        name if counts[name] == 1 else str(model) for name, model in zip(names, models, strict=True)
    ]


def _command(out: Path, models: Sequence[str | Path], **options: Any) -> str:
    """Return the command that makes a report, options that are None left out."""
    words = ["moefy", "report", str(out), *map(str, models)]
    for key, value in options.items():
        if value is not None:
            words.append("--" + key.replace("_", "-"))
            words += [] if value is True else [str(value)]
    return shlex.join(words)
