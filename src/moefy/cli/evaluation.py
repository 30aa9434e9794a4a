"""Commands that measure a model, report on it, or talk to it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import moefy
from moefy.cli import options
from moefy.cli.app import app
from moefy.cli.options import recipe_options, text_words
from moefy.cli.output import call, log_lines, quiet_libraries, show, warn
from moefy.errors import UsageError
from moefy.report import tables
from moefy.studies.recipe import StudyRecipe

Windows = Annotated[dict[str, Any], StudyRecipe(), "windows", "sequence_length"]


@app.command("eval")
@recipe_options
def evaluate(
    models: options.Models,
    *,
    data: options.Data = "demo",
    split: options.SplitName = "heldout",
    sizes: Windows,
    no_decode: Annotated[
        bool, typer.Option("--no-decode", help="Leave out the speed of generation.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Compare models: held-out perplexity, KL to the dense model, and cost.

    Example: `moefy eval smollm2-135m out/moe out/trained`
    """
    from moefy.report.write import SPLIT_NAMES  # here, because it imports torch

    done = call(moefy.evaluate, models, data=data, split=split, decode=not no_decode, **sizes)
    title = f"{done.tokens:,} {SPLIT_NAMES[split]} tokens per model"
    if done.reference:
        title += f"; loss above {done.reference}'s in nats per token"
    then = ["report", "out/report", *models, *text_words(data)]
    show(done, (tables.comparison_rows(done), title), as_json=as_json, then=[then])


@app.command()
def bench(
    models: Annotated[
        list[str],
        typer.Argument(help="Model folders, or shapes: a config.json, llama-1b or qwen3-4b."),
    ],
    batch: Annotated[str | None, typer.Option(help="Sequences at once, as in 1,8.")] = "1",
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of every prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens decoded after the prompt.")] = 64,
    rounds: Annotated[int, typer.Option(help="Number of repetitions.")] = 3,
    dtype: Annotated[
        str | None,
        typer.Option(help="Types, as in bfloat16,q4_0. [default: float32; q8_0 in llama.cpp]"),
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option(
            help="transformers, llama.cpp or vllm=PYTHON, the Python of its environment; several "
            "with commas. [default: what is installed; for converted folders transformers]"
        ),
    ] = None,
    splits: Annotated[
        list[str] | None,
        typer.Option(help="Splits of a shape, as in speed,8/16+4: 8 of 16 slices, 4 shared."),
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Measure so many layers, and scale the result to all.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short prompt, only the presets' splits, 4 layers.")
    ] = False,
    figure: Annotated[Path | None, typer.Option(help="Picture to write, as in speed.png.")] = None,
    as_json: options.Json = False,
) -> None:
    """Measure prefill and decode speed beside the dense model, and one of the same active size.

    A shape has random weights, and splits of it are measured: no model is needed.

    Example: `moefy bench llama-1b --quick`
    """
    if figure and (figure.suffix not in (".png", ".svg", ".pdf") or not figure.parent.is_dir()):
        raise UsageError(
            f"--figure {figure}: name a .png, .svg or .pdf file in a folder that exists"
        )
    sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "rounds": rounds}
    how: dict[str, Any] = {"dtype": dtype, "runtime": runtime, "layers": layers, "quick": quick}
    how["splits"] = options.listed(splits)
    done = call(moefy.bench, models, batches=options.counts("--batch", batch), **how, **sizes)
    if figure:
        from moefy.report.charts import speed_figure  # here, because it imports matplotlib

        speed_figure(done).savefig(figure, dpi=150)
    one = len(models) == 1
    then = ["plan", *models, "--speedup", "1.4"] if one else ["eval", *models]
    show(done, (tables.speed_rows(done), tables.speed_title(done)), as_json=as_json, then=[then])


@app.command()
@recipe_options
def routing(
    models: options.Models,
    *,
    data: options.Data = "demo",
    split: options.SplitName = "heldout",
    sizes: Windows,
    as_json: options.Json = False,
) -> None:
    """Measure what the routers do: load, dead experts, specialisation to domains.

    Example: `moefy routing out/moe`
    """
    done = call(moefy.routing, models, data=data, split=split, **sizes)
    title = f"Use of the experts, {sum(done.tokens.values()):,} tokens"
    then = ["report", "out/report", *models, *text_words(data)]
    show(done, (tables.routing_rows(done), title), as_json=as_json, then=[then])


@app.command()
def suite(
    models: options.Models,
    tasks: options.Tasks = None,
    limit: options.Limit = None,
    dtype: options.Dtype = "float32",
    as_json: options.Json = False,
) -> None:
    """Measure the eleven benchmarks of the LLaMA-MoE paper, or those that are named.

    Example: `moefy suite smollm2-135m out/moe --limit 100`
    """
    names = options.listed(tasks) or ["llama-moe"]  # what a person means who names no tasks
    few = [] if limit is None else ["--limit", limit]
    done = call(moefy.suite, models, tasks=names, limit=limit, dtype=dtype)
    show(
        done,
        (tables.suite_rows(done), "Score in percent ± standard error [95 % interval]"),
        as_json=as_json,
        text="\n".join(tables.suite_notes(done)),
        then=[["report", "out/report", *models, "--tasks", ",".join(names), *few]],
    )


@app.command()
@recipe_options
def report(
    out: options.Out,
    models: options.Models,
    *,
    tasks: options.Tasks = None,
    limit: options.Limit = None,
    dtype: options.Dtype = "float32",
    data: options.Data = "demo",
    split: options.SplitName = "heldout",
    sizes: Windows,
    no_routing: Annotated[
        bool, typer.Option("--no-routing", help="Do not watch the routers of MoE models.")
    ] = False,
    no_cards: Annotated[
        bool, typer.Option("--no-cards", help="Do not write the results into the model cards.")
    ] = False,
    overwrite: options.Overwrite = False,
) -> None:
    """Measure models and write one page with tables and figures; it needs no network.

    Example: `moefy report out/report smollm2-135m out/moe --tasks llama-moe --limit 100`
    """
    benchmarks = {"tasks": options.listed(tasks), "limit": limit, "dtype": dtype}
    parts = {"routing": not no_routing, "cards": not no_cards, "overwrite": overwrite}
    text = {"data": data, "split": split, **sizes}
    done = call(moefy.write_report, out, models, **benchmarks, **parts, **text)
    table = (tables.comparison_rows(done.comparison), done.text)
    place = done.folder / "report.html"
    show(None, table, text=f"Report: {place}", then=f"open {place} in a browser")


@app.command()
def chat(
    model: options.Model,
    system: Annotated[str | None, typer.Option(help="The system message.")] = None,
    max_new_tokens: options.NewTokens = 512,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="0 takes the likeliest token. [default: the model's own temperature]",
        ),
    ] = None,
) -> None:
    """Talk to a model. Ctrl-C cuts an answer off, Ctrl-D ends; lines can be piped in.

    Example: `moefy chat out/tuned`
    """
    from moefy.evaluation.chat import Speaker

    quiet_libraries()
    speaker = Speaker(model, report=log_lines())
    if speaker.template.source is not None:
        warn(f"{model} has no chat template: {speaker.template.name}")

    moefy.chat(
        speaker,
        _typed_lines(),
        partial(print, end="", flush=True),
        system=system,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
    )


@app.command()
def judge(
    model: options.Model,
    out: Annotated[Path, typer.Argument(help="Folder for answers and judgements; resumes.")],
    questions: Annotated[
        Path | None,
        typer.Option(help="jsonl with question_id, category, turns. [default: MT-bench]"),
    ] = None,
    endpoint: Annotated[
        str | None,
        typer.Option(
            help="URL of the judge, an OpenAI API, up to its /v1. [default: no judge is asked]"
        ),
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The judge's name at the endpoint.")] = "gpt-4",
    max_new_tokens: options.NewTokens = 1024,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
) -> None:
    """Answer MT-bench's questions and let a judge mark the answers.

    Example: `moefy judge out/tuned out/mt-bench`
    """
    # without an endpoint the answers are written all the same: a judge may be asked later
    judged_by = {"endpoint": endpoint, "judge_model": judge_model}
    asked = {"questions": questions, "max_new_tokens": max_new_tokens, "overwrite": overwrite}
    done = call(moefy.judge, model, out, **asked, **judged_by)
    text = f"{done.unscored} of {2 * done.questions} judgements hold no mark. All are in {out}"
    if endpoint is None:
        text = f"{out}: {done.questions} questions answered; with --endpoint URL a judge marks them"
    marks = []
    if done.score is not None:
        rows = [["", "mark"], ["all", f"{done.score:.2f}"]]
        rows += [[name, f"{mark:.2f}"] for name, mark in sorted(done.scores.items())]
        marks = [(rows, f"{model}, marked from 1 to 10 by {judge_model}")]
    record, then = {**vars(done), "folder": str(out)}, [["chat", model]]
    show(record, *marks, as_json=as_json, text=text, then=then)


def _typed_lines() -> Iterator[str]:
    """Iterate over what is typed until Ctrl-D or Ctrl-C, or over what is piped in."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    with suppress(ImportError):  # Windows edits the line itself
        import readline  # noqa: F401  (lets `input` edit the line)

    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")
    print()  # the shell's prompt begins a line of its own
