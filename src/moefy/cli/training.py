"""Commands that train."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moefy.cli.app import app
from moefy.cli.options import Data, Json, Overwrite, RecipeFile, Set, given, parse_settings
from moefy.cli.output import bars, print_json, print_table, quiet_libraries


@app.command()
def prepare(
    data: Annotated[
        str,
        typer.Argument(
            help="Folder of DOMAIN.jsonl(.gz, .zst) files or DOMAIN/ folders, hf:DATASET or 'demo'."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; the same command resumes it.")],
    tokenizer: Annotated[str, typer.Option(help="The model that will read the tokens.")],
    workers: Annotated[int | None, typer.Option(min=1, help="Processes. [one per core]")] = None,
    quality: Annotated[
        str | None, typer.Option("--filter", help="none or gopher (quality rules). [none]")
    ] = None,
    domain_key: Annotated[
        str | None,
        typer.Option(help="Where a line names its domain: meta.redpajama_set_name of SlimPajama."),
    ] = None,
    skip_broken: Annotated[
        bool | None, typer.Option("--skip-broken", help="Count broken lines, don't stop at them.")
    ] = None,
    recipe: RecipeFile = None,
    settings: Set = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a corpus in OUT.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tokenise raw text into memory-mapped shards by domain.

    Example: `moefy prepare demo out/tokens --tokenizer smollm2-135m`
    """
    choices = parse_settings(settings) | given(
        filter=quality, domain_key=domain_key, skip_broken=skip_broken
    )
    from moefy.data.prepare import prepare as run
    from moefy.report.tables import corpus_rows

    with bars() as report:
        done = run(
            data,
            out,
            tokenizer=tokenizer,
            workers=workers,
            recipe=recipe,
            overwrite=overwrite,
            report=report,
            **choices,
        )
    speed = done.tokens_per_s_per_core
    if as_json:
        print_json({**done.record, "folder": str(done.folder), "tokens_per_s_per_core": speed})
        return
    print_table(corpus_rows(done.record), f"{done.folder}, tokens of {tokenizer}")
    for line in done.record["broken_examples"]:
        print(f"skipped: {line}", file=sys.stderr)
    print(
        f"{done.tokens:,} tokens in {done.elapsed_s:.0f} s, {speed:,.0f} per second and worker "
        f"({done.workers}); {done.record['broken_lines']:,} broken lines skipped"
    )


@app.command()
def train(
    model: Annotated[str, typer.Argument(help="Converted model folder.")],
    out: Annotated[Path, typer.Argument(help="The run's folder; the same command resumes it.")],
    data: Data = "demo",
    tokens: Annotated[int | None, typer.Option(help="Training tokens. [65536]")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Per window. [512]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak. [1e-4]")] = None,
    mixture: Annotated[
        str | None,
        typer.Option(help="StaticSheared, ..., or as in wikipedia=0.7,book=0.3. [Uniform]"),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="The dense model: distil from it. [next-token loss]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sample order. [0]")] = None,
    recipe: RecipeFile = None,
    settings: Set = None,
    processes: Annotated[
        int | None,
        typer.Option("--dry-run", min=1, help="Only check and count a run of so many processes."),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Continue pre-training on a mixture of domains.

    Example: `moefy train out/moe out/trained --teacher smollm2-135m --tokens 65536`
    """
    from moefy.recipe import parse_weights

    choices = parse_settings(settings) | given(
        tokens=tokens,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        mixture=parse_weights(mixture) if mixture and "=" in mixture else mixture,
        teacher=teacher,
        seed=seed,
    )
    if processes is not None:
        _print_dry_run(model, processes, recipe, choices, as_json)
        return
    from moefy.training.run import train as run

    with bars() as report:
        done = run(
            model, out, data=data, recipe=recipe, overwrite=overwrite, report=report, **choices
        )
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes one speaks
        return
    if as_json:
        print_json(
            {**vars(done), "folder": str(out), "recipe": done.recipe.model_dump(mode="json")}
        )
        return
    print(
        f"{done.folder}: training loss {done.first_loss:.3f} → {done.last_loss:.3f} in "
        f"{done.recipe.num_steps} steps ({done.elapsed_s:.0f} s); every step is in "
        f"{done.folder / 'log.jsonl'}"
    )


def _print_dry_run(
    model: str, processes: int, recipe: Path | None, choices: dict[str, Any], as_json: bool
) -> None:
    from moefy.report.tables import dry_run_rows
    from moefy.training.dry_run import dry_run

    quiet_libraries()
    found = dry_run(model, processes=processes, recipe=recipe, **choices)
    if as_json:
        print_json(vars(found))
        return
    print_table(dry_run_rows(found), f"{model}, {processes} processes")
