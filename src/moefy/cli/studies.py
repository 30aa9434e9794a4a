"""Commands that compare ways, and choose between them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moefy.cli.app import app
from moefy.cli.options import Data, Json, RecipeFile, Set, given, listed, parse_settings
from moefy.cli.output import bars, print_json, print_table
from moefy.errors import UsageError


@app.command()
def study(
    out: Annotated[Path, typer.Argument(help="The study's folder; the same command resumes it.")],
    model: Annotated[str, typer.Option(help="Dense model, as for convert.")] = "smollm2-135m",
    data: Data = "demo",
    sft: Annotated[
        str | None, typer.Option(help="Conversations, as for tune. [nothing is tuned]")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="rescaling, construction, sampling, scratch, size, tuning. [all]"),
    ] = None,
    tokens: Annotated[int | None, typer.Option(help="That every arm trains on. [32768]")] = None,
    seeds: Annotated[int | None, typer.Option(help="Of every arm. [3]")] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="All of it on a toy model, in minutes.")
    ] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the models.")] = False,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Run nothing; report what is there.")
    ] = False,
    recipe: RecipeFile = None,
    settings: Set = None,
    as_json: Json = False,
) -> None:
    """Run the paper's ablations: tables, figures and conclusions.

    Example: `moefy study out/study --only rescaling,construction --tokens 65536`
    """
    choices = parse_settings(settings) | given(tokens=tokens, seeds=seeds)
    from moefy.studies.run import study as run

    with bars() as report:
        done = run(
            out,
            model=model,
            data=data,
            sft=sft,
            only=listed(only),
            smoke=smoke,
            keep=keep,
            report_only=report_only,
            recipe=recipe,
            report=report,
            **choices,
        )
    if as_json:
        print_json(
            {
                "folder": str(done.folder),
                "runs": [vars(run) for run in done.runs],
                "measured": done.measured,
                "skipped": done.skipped,
                "conclusions": done.conclusions,
            }
        )
        return
    for what, why in done.skipped.items():
        print(f"not run: {what}: {why}", file=sys.stderr)
    for name, text in done.conclusions.items():
        print(f"{name}: {text}\n")
    print(f"{done.folder / 'study.md'}: {len(done.runs)} runs, {done.measured} of them new")


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="Dense model folder, config.json, or llama-2-7b.")],
    active_params: Annotated[
        str | None, typer.Option(help="That may run for a token, as in 80M or 3.5B.")
    ] = None,
    speedup: Annotated[
        float | None, typer.Option(min=0, help="Over the dense model, as in 1.5.")
    ] = None,
    phase: Annotated[str, typer.Option(help="Whose speed: decode or prefill.")] = "decode",
    study: Annotated[
        Path | None, typer.Option(help="Folder of your own `moefy study`. [measured on SmolLM2]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Recommend a split for a size or a speed, from what was measured.

    Example: `moefy plan smollm2-135m --active-params 100M`
    """
    from moefy.studies.plan import plan as run
    from moefy.studies.tables import plan_rows

    done = run(
        model,
        active_params=_count(active_params) if active_params else None,
        speedup=speedup,
        phase=phase,
        study=study,
    )
    if as_json:
        print_json(done.to_dict())
        return
    print_table(plan_rows(done), f"{model}: splits that were measured, best first")
    for name, why in done.left_out.items():
        print(f"left out: {name}: {why}", file=sys.stderr)
    print(f"{done.basis}\nWhat next: {done.command}")


def _count(text: str) -> int:
    """Read a count such as 80M."""
    factors = {"K": 1e3, "M": 1e6, "B": 1e9}
    number, factor = text.strip().upper(), 1.0
    if number and number[-1] in factors:
        number, factor = number[:-1], factors[number[-1]]
    try:
        return int(float(number) * factor)
    except (ValueError, OverflowError):
        raise UsageError(f"--active-params {text!r}: write a number, as in 80M or 3.5B") from None
