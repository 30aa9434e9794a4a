"""The page of a report, its figures and its numbers, as files."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from moefy.checkpoint.card import command_of, recipe_of, steps_of
from moefy.report import routing_tables, suite_tables, tables
from moefy.report.findings import Report
from moefy.report.quality_charts import benchmark_chart, quality_charts
from moefy.report.routing_charts import routing_charts
from moefy.report.training_charts import training_charts
from moefy.report.verdict import verdict_rows
from moefy.storage import replace_file, storage_errors


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
    charts += [benchmark_chart(report.suite)] if report.suite else []
    charts += routing_charts(report.routing) if report.routing else []
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
        | {"charts": charts, "steps": steps, "verdict_rows": verdict_rows}
        | {"tables": tables, "suite_tables": suite_tables, "routing_tables": routing_tables}
    )
    replace_file(folder / "report.html", page)
    replace_file(folder / "results.md", tables.markdown(tables.comparison_rows(report.comparison)))
    # Lists of numbers stand on one line: load and co-activation are long.
    text = json.dumps(report.to_dict(), indent=2)
    text = re.sub(r"\[[-+.,\s\deE]+\]", lambda found: " ".join(found[0].split()), text)
    replace_file(folder / "results.json", text + "\n")
