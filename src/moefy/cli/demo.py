"""The main job as one command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moefy.cli.app import app
from moefy.cli.options import Overwrite, given
from moefy.cli.output import bars, print_table


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("moefy-demo"),
    experts: Annotated[int | None, typer.Option(help="Slices of every FFN. [64]")] = None,
    active: Annotated[int | None, typer.Option(help="Slices that run per token. [half]")] = None,
    tokens: Annotated[int | None, typer.Option(help="Training tokens. [32768]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of split and training.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Do the whole job on SmolLM2-135M and write a report.

    Example: `moefy demo --out moefy-demo`
    """
    from moefy.demo import demo as run
    from moefy.demo import headline
    from moefy.report.tables import comparison_rows

    with bars() as report:
        done = run(
            out,
            experts=experts,
            active=active,
            seed=seed,
            overwrite=overwrite,
            report=report,
            **given(tokens=tokens),
        )
    print_table(comparison_rows(done.comparison), "SmolLM2-135M, held-out text")
    print(headline(done.comparison))
    print(
        f"{done.elapsed_s / 60:.1f} minutes, {done.peak_rss_bytes / 2**30:.1f} GiB. "
        f"Report: {done.folder / 'report.html'}"
    )
