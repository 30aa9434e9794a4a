"""The report: models measured side by side, shown on one page, and noted in their model cards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moefy.checkpoint.card import model_card, read_record, with_results
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.source import resolve
from moefy.data.records import Side
from moefy.errors import UsageError
from moefy.evaluation.compare import evaluate
from moefy.evaluation.routing import measure_routing
from moefy.evaluation.suite import check_suite, evaluate_suite
from moefy.progress import ProgressFn, silent
from moefy.report.page import Report, facts_of, verdict, write_page
from moefy.report.tables import comparison_rows, markdown, suite_rows
from moefy.run_folder import RunFolder
from moefy.storage import replace_file
from moefy.training.state import LOG, read_log


def write_report(
    out: str | Path,
    models: str | Path | Sequence[str | Path],
    *,
    suite: str | None = None,
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
    own = {name: Path(model).expanduser() for name, model in zip(shown, given, strict=True)}
    text: dict[str, Any] = {"windows": windows, "sequence_length": sequence_length}
    text |= {"data": str(data), "split": split}
    asked = bool(suite or tasks)
    benchmarks: dict[str, Any] = {"suite": suite, "tasks": list(tasks)}
    benchmarks |= {"limit": limit, "dtype": dtype}
    settings = {"models": list(map(str, given)), **text, "routing": routing}
    with RunFolder(out, "report", overwrite=overwrite, sources=given) as run:
        if asked:
            check_suite(given, **benchmarks)
        facts = facts_of("moefy report", **settings, **(benchmarks if asked else {}))
        run.begin({key: value for key, value in facts.items() if key != "date"})
        folders = [resolve(model, report=report) for model in given]
        by_name = dict(zip(shown, folders, strict=True))
        # A damaged record is refused here, before anything is measured.
        records = {name: read_record(folder) for name, folder in by_name.items()}
        how: dict[str, Any] = {"names": shown, "report": report}
        comparison = evaluate(folders, **text, **how)
        routed = routing and any(result.cost.experts for result in comparison.results)
        done = Report(
            run.out,
            comparison,
            evaluate_suite(folders, **benchmarks, **how) if asked else None,
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


def short_names(models: Sequence[str | Path]) -> list[str]:
    """Return the last part of every path; the whole path where that is not enough."""
    names = [Path(model).name or str(model) for model in models]
    return [
        name if names.count(name) == 1 else str(model)
        for name, model in zip(names, models, strict=True)
    ]
