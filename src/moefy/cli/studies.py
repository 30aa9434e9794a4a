"""Commands that compare ways, and choose between them."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

import moefy
from moefy.cli.app import app
from moefy.cli.options import Data, Json, Overwrite, ResumedOut, listed, recipe_options
from moefy.cli.output import call, show, warn
from moefy.errors import UsageError
from moefy.report.tables import counted
from moefy.studies.recipe import StudyRecipe


@app.command()
@recipe_options
def study(
    out: ResumedOut,
    *,
    model: Annotated[str, typer.Option(help="Dense model, as for convert.")] = "smollm2-135m",
    data: Data = "demo",
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Ablations: rescaling, construction, methods, sampling, scratch, size. "
            "[default: all]"
        ),
    ] = None,
    recipe: StudyRecipe,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Run the paper's ablations and compare construction methods; write tables and figures.

    Example: `moefy study out/study --only rescaling,construction --tokens 65536`
    """
    how = {"only": listed(only), "recipe": recipe, "overwrite": overwrite}
    done = call(moefy.study, out, model=model, data=data, **how)
    warn(*(f"not run: {what}: {why}" for what, why in done.skipped.items()))
    record = {
        "folder": str(done.folder),
        "runs": [vars(run) for run in done.runs],
        "measured": done.measured,
        "skipped": done.skipped,
        "tables": done.tables,
    }
    text = (
        f"{done.folder / 'study.md'}: {counted(len(done.runs), 'run')}, {done.measured} of them new"
    )
    tables = [(rows, name) for name, rows in done.tables.items()]
    then = ["plan", model, "--speedup", "1.4"]
    show(record, *tables, as_json=as_json, text=text, then=[then])


@app.command()
def plan(
    model: Annotated[
        str, typer.Argument(help="Dense model folder, config.json, or a shape such as llama-1b.")
    ],
    speedup: Annotated[
        float | None, typer.Option(min=0, help="Speed relative to the dense model, as in 1.5.")
    ] = None,
    active_params: Annotated[
        str | None, typer.Option(help="Parameters that may run for a token, as in 80M or 3.5B.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option("--for", help="Purpose as in convert --for: speed or quality.")
    ] = None,
    phase: Annotated[
        Literal["decode", "prefill"], typer.Option(help="Phase that --speedup refers to.")
    ] = "decode",
    as_json: Json = False,
) -> None:
    """Recommend a split for a speed or a size, by what was measured at the model's shape.

    Example: `moefy plan llama-1b --speedup 1.4`
    """
    from moefy.studies.plan import plan_rows  # imports torch

    most = _count(active_params) if active_params else None
    done = moefy.plan(model, speedup=speedup, active_params=most, preset=preset, phase=phase)
    show(
        done,
        (plan_rows(done), f"{model}: splits, the largest active share first"),
        as_json=as_json,
        text=done.basis,
        then=done.command,
    )


def _count(text: str) -> int:
    """Read a count such as 80M."""
    number, unit = text.strip().upper(), 1.0
    if number.endswith(("K", "M", "B")):
        unit = {"K": 1e3, "M": 1e6, "B": 1e9}[number[-1]]
        number = number[:-1]
    try:
        return int(float(number) * unit)
    except (ValueError, OverflowError):
        raise UsageError(f"--active-params {text!r}: write a number, as in 80M or 3.5B") from None
