"""The results of a report in the model cards of the models that it measured."""

from __future__ import annotations

from pathlib import Path

from moefy.checkpoint.card import model_card, with_results
from moefy.checkpoint.reader import read_config
from moefy.report.findings import Findings, read_record
from moefy.report.suite_tables import suite_rows
from moefy.report.tables import comparison_rows, markdown
from moefy.storage import replace_file


def note_in_card(folder: Path, name: str, findings: Findings) -> bool:
    """Put the results into the model card of a folder that moefy wrote; say whether it is one.

    Nothing else in the folder changes, and nothing that decides what the model answers.

    Args:
        folder: of the model.
        name: of the model in the results.
        findings: the results.

    Raises:
        StorageError: the card cannot be written.
    """
    record = read_record(folder)
    if record is None:
        return False
    card = folder / "README.md"
    text = card.read_text() if card.is_file() else model_card(record, read_config(folder))
    replace_file(card, with_results(text, _card_results(name, findings)))
    return True


def _card_results(name: str, findings: Findings) -> str:
    comparison, suite = findings.comparison, findings.suite
    numbers = ", ".join(f"{package} {number}" for package, number in findings.versions.items())
    lines = [
        "## Results",
        "",
        f"This model is *{name}*. Measured with `moefy report`, {findings.date} ({numbers}), on "
        f"{findings.text}:",
        "",
        markdown(comparison_rows(comparison)),
    ]
    if suite is not None:
        items = "all items" if suite.limit is None else f"at most {suite.limit:,} items of each"
        lines += [
            f"Benchmarks in percent ± standard error, {items}; differences from the dense model "
            "and retention with 95 % intervals:",
            "",
            markdown(suite_rows(suite)),
        ]
    return "\n".join(lines)
