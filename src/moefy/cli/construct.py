"""Commands that make a model, or undo one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moefy.cli.app import app
from moefy.cli.options import Data, Json, Overwrite, RecipeFile, Set, given, listed, parse_settings
from moefy.cli.output import bars, print_json, print_table
from moefy.errors import UsageError


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(help="Model folder, config.json, or llama-2-7b.")],
    experts: Annotated[int | None, typer.Option(help="Experts per layer of a split.")] = None,
    active: Annotated[int | None, typer.Option(help="Experts per token of a split.")] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens, for attention.")] = None,
    as_json: Json = False,
) -> None:
    """Count parameters and FLOPs of a model and its splits, without weights.

    Example: `moefy inspect llama-2-7b`
    """
    from moefy.checkpoint.inspect import inspect as run
    from moefy.report.tables import inspection_rows

    found = run(source, experts=experts, active=active, context=context)
    if as_json:
        print_json({label: vars(cost) for label, cost in found.costs.items()})
        return
    context = next(iter(found.costs.values())).context
    print_table(inspection_rows(found), f"{found.name}, FLOPs at a context of {context:,} tokens")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Model folder, .gguf, hub name or smollm2-135m.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    experts: Annotated[int | None, typer.Option(help="Slices of every FFN, E. [64]")] = None,
    active: Annotated[int | None, typer.Option(help="Slices that run per token. [half]")] = None,
    shared: Annotated[int | None, typer.Option(help="Of those, always on. [half]")] = None,
    partition: Annotated[
        str | None,
        typer.Option(
            help="random, clustering-up, clustering-gate, coactivation, sharing-inner, "
            "sharing-inter, gradient, carve or alternating. [alternating]"
        ),
    ] = None,
    router: Annotated[
        str | None,
        typer.Option(help="random, mean-gate, representative, ridge(-log) or ascent. [ascent]"),
    ] = None,
    repair: Annotated[
        str | None,
        typer.Option(
            "--repair",
            "--rescale",
            help="none, unscaled (1/k), paper (E/k²), scale or refit. [refit]",
        ),
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(
            help="Architecture to write: mixtral, granitemoeshared, granitemoe, qwen3_moe, "
            "glm4_moe or granitemoe_swa. [the first of these that is exact]"
        ),
    ] = None,
    data: Annotated[
        str,
        typer.Option(
            help="Calibration text: folder of DOMAIN.jsonl(.gz), hf:DATASET, 'demo' or 'self'."
        ),
    ] = "demo",
    seed: Annotated[int | None, typer.Option(help="Of partition and router. [0]")] = None,
    recipe: RecipeFile = None,
    settings: Set = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Split a dense model into experts; the result loads with plain transformers.

    Example: `moefy convert smollm2-135m out/moe`
    """
    choices = parse_settings(settings) | given(
        experts=experts,
        active=active,
        shared=shared,
        partition=partition,
        router=router,
        repair=repair,
        target=target,
        seed=seed,
    )
    from moefy.construct.convert import convert as run

    with bars() as report:
        done = run(
            source, out, data=data, recipe=recipe, overwrite=overwrite, report=report, **choices
        )
    if as_json:
        print_json(
            {
                "folder": str(done.folder),
                "num_layers": done.num_layers,
                "expert_size": done.expert_size,
                "written_bytes": done.written_bytes,
                "recipe": done.recipe.model_dump(mode="json"),
            }
        )
        return
    made = done.recipe
    print(
        f"{done.folder}: {done.num_layers} layers of {made.experts} slices ({done.expert_size} "
        f"neurons each), of which {made.active} run per token, {made.shared} of them always; "
        f"{done.written_bytes / 1e6:.0f} MB. What next: moefy eval {source} {done.folder}, "
        f"or moefy train {done.folder} OUT"
    )


@app.command()
def leaderboard(
    source: Annotated[str, typer.Argument(help="Dense model, as for convert.")],
    out: Annotated[Path, typer.Argument(help="Folder for table, CSV and figure; resumes.")],
    data: Data = "demo",
    experts: Annotated[int, typer.Option(help="Slices of every FFN.")] = 64,
    active: Annotated[str, typer.Option(help="Shares of the FFN.")] = "0.75,0.5,0.25",
    methods: Annotated[
        list[str] | None, typer.Option(help="Comma-separated names, or parts of names. [all]")
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1)] = 28_672,
    windows: Annotated[int, typer.Option(min=1, help="Held-out windows per domain.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    as_json: Json = False,
) -> None:
    """Compare ways to build experts on the same tokens.

    Example: `moefy leaderboard smollm2-135m out/leaderboard --active 0.5 --methods refit,FLAP`
    """
    try:
        fractions = [float(part) for part in active.split(",")]
    except ValueError:
        raise UsageError(f"--active {active!r}: write shares, as in 0.75,0.5") from None
    from moefy.studies.leaderboard import leaderboard as run
    from moefy.studies.tables import leaderboard_rows

    with bars() as report:
        scores = run(
            source,
            out,
            data=data,
            experts=experts,
            fractions=fractions,
            methods=listed(methods),
            calibration_tokens=calibration_tokens,
            windows=windows,
            sequence_length=sequence_length,
            seed=seed,
            report=report,
        )
    if as_json:
        print_json([vars(score) for score in scores])
        return
    print_table(leaderboard_rows(scores, brief=True), f"{source}, {experts} experts")
    print(f"Table, CSV and figure: {out}")


export = typer.Typer(no_args_is_help=True, help="Write a model in another form.")
app.add_typer(export, name="export")


@export.command("gguf")
def export_to_gguf(
    model: Annotated[Path, typer.Argument(help="Converted (or dense) model folder.")],
    out: Annotated[Path, typer.Argument(help="File to write.")],
    dtype: Annotated[str, typer.Option(help="f32, f16, bf16 or q8_0.")] = "f16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT.")] = False,
) -> None:
    """Write a GGUF file with llama.cpp's own converter.

    Example: `moefy export gguf out/moe out/moe.gguf`
    """
    from moefy.checkpoint.gguf import export_gguf as run

    with bars() as report:
        file = run(model, out, dtype=dtype, overwrite=overwrite, report=report)
    print(f"{file}: {file.stat().st_size / 1e6:.0f} MB. What next: llama-cli -m {file}")


@export.command("dense")
def export_to_dense(
    model: Annotated[Path, typer.Argument(help="Folder that convert wrote.")],
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    overwrite: Overwrite = False,
) -> None:
    """Undo a split whose weights were not fitted: all experts back into dense FFNs.

    Example: `moefy export dense out/moe out/dense`
    """
    from moefy.construct.merge import export_dense as run

    with bars() as report:
        folder = run(model, out, overwrite=overwrite, report=report)
    print(f"{folder}: dense again")
