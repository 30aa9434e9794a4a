"""Commands of instruction tuning."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from moefy.cli.app import app
from moefy.cli.options import Json, Overwrite, RecipeFile, Set, given, parse_settings
from moefy.cli.output import bars, log_lines, print_json, print_table, quiet_libraries


@app.command()
def tune(
    model: Annotated[str, typer.Argument(help="Converted (or dense) model folder.")],
    out: Annotated[Path, typer.Argument(help="The run's folder; the same command resumes it.")],
    data: Annotated[str, typer.Option(help="Conversations: .jsonl(.gz, .zst), or hf:DATASET.")],
    epochs: Annotated[int | None, typer.Option(help="[2]")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Longest example. [2048]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak. [2e-5]")] = None,
    packing: Annotated[
        bool | None, typer.Option("--packing", help="Several conversations per sequence.")
    ] = None,
    router: Annotated[str | None, typer.Option(help="frozen or balanced. [frozen]")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Of adapters; 0: none. [0]")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="chatml or a Jinja file. [the model's own, else chatml]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the order. [0]")] = None,
    recipe: RecipeFile = None,
    settings: Set = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Fine-tune on conversations, with the loss on what the assistant says.

    Example: `moefy tune out/trained out/tuned --data conversations.jsonl.gz`
    """
    choices = parse_settings(settings) | given(
        epochs=epochs,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        packing=packing,
        router=router,
        lora_rank=lora_rank,
        chat_template=chat_template,
        seed=seed,
    )
    from moefy.training.tune import tune as run

    with bars() as report:
        done = run(
            model, out, data=data, recipe=recipe, overwrite=overwrite, report=report, **choices
        )
    if as_json:
        print_json(
            {**vars(done), "folder": str(out), "recipe": done.recipe.model_dump(mode="json")}
        )
        return
    for line in done.broken[:10]:
        print(f"left out: {line}", file=sys.stderr)
    if done.broken:
        listed = done.folder / "broken.txt"
        print(f"{len(done.broken):,} broken conversations left out: {listed}", file=sys.stderr)
    loss = "no conversation was held out"
    if done.heldout_before is not None:
        loss = (
            f"loss on the assistant's tokens {done.heldout_before:.3f} → {done.heldout_after:.3f} "
            f"({done.heldout_tokens:,} held-out tokens)"
        )
    print(
        f"{done.folder}: {loss}; {done.conversations:,} conversations ({done.cut:,} cut), "
        f"{done.steps} steps ({done.elapsed_s:.0f} s), chat template: {done.chat_template}. "
        f"What next: moefy chat {done.folder}"
    )


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Any model folder.")],
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0: the likeliest token. [the model's own]")
    ] = None,
) -> None:
    """Talk to a model. Ctrl-C cuts an answer off, Ctrl-D ends; lines can be piped in.

    Example: `moefy chat out/tuned`
    """
    from moefy.evaluation.chat import Speaker
    from moefy.evaluation.chat import chat as run

    quiet_libraries()
    speaker = Speaker(model, report=log_lines())
    if speaker.template.source is not None:
        print(f"{model} has no chat template: {speaker.template.name}", file=sys.stderr)

    def write(text: str) -> None:
        print(text, end="", flush=True)

    run(
        speaker,
        _typed_lines(),
        write,
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )


@app.command()
def judge(
    model: Annotated[str, typer.Argument(help="Any model folder.")],
    out: Annotated[Path, typer.Argument(help="Folder for answers and judgements; resumes.")],
    questions: Annotated[
        Path | None, typer.Option(help="jsonl of question_id, category, turns. [MT-bench]")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Of the judge: http://localhost:8000/v1. [none is asked]")
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The judge's name there.")] = "gpt-4",
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    as_json: Json = False,
) -> None:
    """Answer MT-bench's questions and let a judge mark the answers.

    Example: `moefy judge out/tuned out/mt-bench`
    """
    from moefy.evaluation.judge import judge as run

    with bars() as report:
        done = run(
            model,
            out,
            questions=questions,
            endpoint=endpoint,
            judge_model=judge_model,
            max_new_tokens=max_new_tokens,
            report=report,
        )
    if as_json:
        print_json({**vars(done), "folder": str(out)})
        return
    if endpoint is None:
        print(
            f"{out}: {done.questions} questions answered. requests.jsonl holds what a judge is to "
            "be asked, in OpenAI's batch form; --endpoint asks one"
        )
        return
    if done.score is not None:
        rows = [["", "mark"], ["all", f"{done.score:.2f}"]]
        rows += [[name, f"{mark:.2f}"] for name, mark in sorted(done.scores.items())]
        print_table(rows, f"{model}, marked from 1 to 10 by {judge_model}")
    print(f"{done.unscored} of {2 * done.questions} judgements hold no mark. All are in {out}")


def _typed_lines() -> Iterator[str]:
    """Iterate over what is typed until Ctrl-D or Ctrl-C, or over what is piped in."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401  (lets `input` edit the line)

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
