"""Commands that prepare text, train and tune."""

from __future__ import annotations

import os
from typing import Annotated

import typer

import moefy
from moefy.cli.app import app
from moefy.cli.options import Data, Json, Model, Overwrite, ResumedOut, recipe_options, text_words
from moefy.cli.output import call, show, warn
from moefy.report.tables import corpus_rows, counted
from moefy.training.recipe import TrainRecipe, TuneRecipe


@app.command()
def prepare(
    data: Annotated[
        str,
        typer.Argument(
            help="File, folder of DOMAIN.jsonl files or DOMAIN/ folders, hf:DATASET or 'demo'."
        ),
    ],
    out: ResumedOut,
    *,
    tokenizer: Annotated[str, typer.Option(help="The model that will read the tokens.")],
    domain_key: Annotated[
        str | None,
        typer.Option(
            help="Key of a record that names its domain, as in meta.source. "
            "[default: files and folders are domains]"
        ),
    ] = None,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Skip broken records and count them.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Number of threads. [default: one per core]")
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Tokenise raw text into memory-mapped shards by domain.

    Example: `moefy prepare demo out/tokens --tokenizer smollm2-135m`
    """
    options = {"domain_key": domain_key, "skip_broken": skip_broken, "workers": workers}
    done = call(moefy.prepare, data, out, tokenizer=tokenizer, overwrite=overwrite, **options)
    speed = done.tokens / done.elapsed_s
    warn(*(f"skipped: {line}" for line in done.record["broken_examples"]))
    show(
        {**done.record, "folder": str(done.folder), "tokens_per_s": speed},
        (corpus_rows(done.record), f"{done.folder}, tokens of {tokenizer}"),
        as_json=as_json,
        text=f"{done.tokens:,} tokens in {done.elapsed_s:.0f} s, {speed:,.0f} per second; "
        f"{counted(done.record['broken_lines'], 'broken line')} skipped",
        then=[["train", tokenizer, done.folder.with_name("trained"), "--data", done.folder]],
    )


@app.command()
@recipe_options
def train(
    model: Model,
    out: ResumedOut,
    *,
    data: Data = "demo",
    recipe: TrainRecipe,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Continue pre-training on a mixture of domains.

    Example: `moefy train out/moe out/trained --teacher smollm2-135m --tokens 65536`
    """
    options = {"recipe": recipe, "overwrite": overwrite}
    done = call(moefy.train, model, out, data=data, **options)
    if os.environ.get("RANK", "0") != "0":  # only the first of torchrun's processes reports
        return
    compared = (done.recipe.teacher, model, str(done.folder))
    figures = {
        "KL to the dense model": (done.kl_before, done.kl_after),
        "loss": (done.heldout_before, done.heldout_after),
    }
    measured = [
        f"{name} {before:.3f} → {after:.3f}"
        for name, (before, after) in figures.items()
        if before is not None and after is not None
    ]
    show(
        {**vars(done), "folder": str(out), "recipe": done.recipe.model_dump(mode="json")},
        as_json=as_json,
        text=f"{done.folder}: {', '.join(measured) or 'nothing measured'} on held-out text in "
        f"{counted(done.recipe.num_steps, 'step')} ({done.elapsed_s:.0f} s); every step is in "
        f"{done.folder / 'log.jsonl'}",
        then=[["eval", *filter(None, compared), *text_words(data)]],
    )


@app.command()
@recipe_options
def tune(
    model: Model,
    out: ResumedOut,
    *,
    data: Annotated[
        str, typer.Option(help="Conversations: a file, a folder of files, or hf:DATASET.")
    ],
    recipe: TuneRecipe,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fine-tune on conversations, with the loss on what the assistant says.

    Example: `moefy tune out/trained out/tuned --data conversations.jsonl.gz`
    """
    options = {"recipe": recipe, "overwrite": overwrite}
    done = call(moefy.tune, model, out, data=data, **options)
    if os.environ.get("RANK", "0") != "0":
        return
    warn(*(f"left out: {line}" for line in done.broken[:10]))
    if done.broken:
        listed = done.folder / "broken.txt"
        warn(f"{len(done.broken):,} broken conversations left out: {listed}")
    loss = "no conversation was held out"
    if done.heldout_before is not None:
        loss = (
            f"loss on the assistant's tokens {done.heldout_before:.3f} → {done.heldout_after:.3f} "
            f"({done.heldout_tokens:,} held-out tokens)"
        )
    show(
        {**vars(done), "folder": str(out), "recipe": done.recipe.model_dump(mode="json")},
        as_json=as_json,
        text=f"{done.folder}: {loss}; {counted(done.conversations, 'conversation')} "
        f"({done.cut:,} cut), {counted(done.steps, 'step')} ({done.elapsed_s:.0f} s), "
        f"chat template: {done.chat_template}",
        then=[["chat", done.folder]],
    )
