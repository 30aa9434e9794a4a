"""Commands that measure."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from moefy.cli.app import app
from moefy.cli.options import (
    Data,
    Hub,
    Json,
    Limit,
    Models,
    SequenceLength,
    SplitName,
    Windows,
    counts,
    listed,
)
from moefy.cli.output import bars, print_json, print_table
from moefy.errors import UsageError

if TYPE_CHECKING:
    from moefy.data.domains import Split


@app.command(name="eval")
def evaluate(
    models: Models,
    data: Data = "demo",
    split: SplitName = "heldout",
    windows: Windows = 8,
    sequence_length: SequenceLength = 512,
    decode: Annotated[bool, typer.Option(help="Measure generation too.")] = True,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure speed alone, and what bounds it.")
    ] = False,
    routing: Annotated[
        bool, typer.Option("--routing", help="Measure what the routers do, and other k.")
    ] = False,
    active: Annotated[
        str | None,
        typer.Option(help="With --routing: experts to choose, besides as saved. [1,2,4,…,E]"),
    ] = None,
    suite: Annotated[
        str | None, typer.Option(help="llama-moe: measure the paper's eleven benchmarks instead.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="Or these tasks of lm-evaluation-harness: sciq,piqa.")
    ] = None,
    limit: Limit = None,
    hub: Hub = None,
    batch: Annotated[
        str | None, typer.Option(help="With --speed: sequences at once. [1,8]")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="With --speed.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="With --speed.")] = 64,
    rounds: Annotated[int, typer.Option(help="With --speed: measurements of each.")] = 3,
    threads: Annotated[int | None, typer.Option(help="With --speed: of the CPU. [all]")] = None,
    dtype: Annotated[
        str, typer.Option(help="With --speed or benchmarks: or bfloat16.")
    ] = "float32",
    runtime: Annotated[str, typer.Option(help="With --speed: or llama.cpp.")] = "transformers",
    as_json: Json = False,
) -> None:
    """Compare models: held-out perplexity, KL to the dense model, cost, speed, routing.

    Example: `moefy eval smollm2-135m out/moe out/trained`

    Speed alone: `moefy eval --speed smollm2-135m out/moe`

    Routers: `moefy eval --routing smollm2-135m out/moe`

    Benchmarks: `moefy eval --suite llama-moe --limit 100 smollm2-135m out/moe`
    """
    asked = {"--speed": speed, "--routing": routing, "benchmarks": suite or tasks}
    chosen = [what for what, wanted in asked.items() if wanted]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} are measured one by one: keep one of them")
    if suite or tasks:
        _evaluate_suite(models, suite, tasks, limit, hub, dtype, as_json)
        return
    if speed:
        from moefy.evaluation.speed import measure_speed
        from moefy.report.tables import speed_rows, speed_title

        with bars() as report:
            measured = measure_speed(
                models,
                batches=counts("--batch", batch) if batch else None,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                rounds=rounds,
                dtype=dtype,
                threads=threads,
                runtime=runtime,
                report=report,
            )
        if as_json:
            print_json(measured.to_dict())
        else:
            print_table(speed_rows(measured), speed_title(measured))
        return
    part = _checked(split)
    if routing:
        _measure_routing(models, data, part, windows, sequence_length, active, as_json)
        return
    from moefy.evaluation.compare import evaluate as run
    from moefy.report.findings import SPLIT_NAMES
    from moefy.report.tables import comparison_rows

    with bars() as report:
        done = run(
            models,
            data=data,
            split=part,
            windows=windows,
            sequence_length=sequence_length,
            decode=decode,
            report=report,
        )
    if as_json:
        print_json(done.to_dict())
        return
    print_table(comparison_rows(done), f"{done.tokens:,} {SPLIT_NAMES[part]} tokens per model")


def _measure_routing(
    models: list[str],
    data: str,
    split: Split,
    windows: int,
    sequence_length: int,
    active: str | None,
    as_json: bool,
) -> None:
    from moefy.evaluation.routing import measure_routing
    from moefy.report.routing_tables import k_rows, routing_rows

    with bars() as report:
        done = measure_routing(
            models,
            data=data,
            split=split,
            windows=windows,
            sequence_length=sequence_length,
            active=counts("--active", active) if active else None,
            report=report,
        )
    if as_json:
        print_json(done.to_dict())
        return
    tokens = sum(done.tokens.values())
    print_table(routing_rows(done), f"Use of the experts, {tokens:,} tokens")
    print_table(k_rows(done), "Quality by the number of experts that are chosen")


def _evaluate_suite(
    models: list[str],
    suite: str | None,
    tasks: list[str] | None,
    limit: int | None,
    hub: bool | None,
    dtype: str,
    as_json: bool,
) -> None:
    from moefy.evaluation.suite import evaluate_suite
    from moefy.report.suite_tables import nll_rows, suite_notes, suite_rows

    with bars() as report:
        done = evaluate_suite(
            models,
            suite=suite,
            tasks=listed(tasks),
            limit=limit,
            dtype=dtype,
            hub=hub,
            report=report,
        )
    if as_json:
        print_json(done.to_dict())
    else:
        print_table(suite_rows(done), "Score in percent ± standard error [95 % interval]")
        print_table(nll_rows(done), "−log p of the right answer, nats ± standard error")
        for note in suite_notes(done):
            print(note)
    _exit_with(done.failures)


@app.command()
def report(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    models: Models,
    suite: Annotated[
        str | None, typer.Option(help="llama-moe: measure the paper's eleven benchmarks too.")
    ] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="And these tasks of lm-evaluation-harness: sciq,piqa.")
    ] = None,
    limit: Limit = None,
    hub: Hub = None,
    dtype: Annotated[str, typer.Option(help="Of the benchmarks: or bfloat16.")] = "float32",
    data: Data = "demo",
    split: SplitName = "heldout",
    windows: Windows = 8,
    sequence_length: SequenceLength = 512,
    routing: Annotated[bool, typer.Option(help="Watch the routers of MoE models.")] = True,
    cards: Annotated[bool, typer.Option(help="Write the results into the model cards.")] = True,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a report in OUT.")
    ] = False,
) -> None:
    """Measure models and write one page with tables and figures; it needs no network.

    Example: `moefy report out/report smollm2-135m out/moe out/trained`

    With benchmarks: `moefy report out/report smollm2-135m out/moe --suite llama-moe --limit 100`
    """
    from moefy.report.tables import comparison_rows
    from moefy.report.write import write_report

    with bars() as tell:
        done = write_report(
            out,
            models,
            suite=suite,
            tasks=listed(tasks),
            limit=limit,
            hub=hub,
            dtype=dtype,
            data=data,
            split=_checked(split),
            windows=windows,
            sequence_length=sequence_length,
            routing=routing,
            cards=cards,
            overwrite=overwrite,
            report=tell,
        )
    found = done.findings
    print_table(comparison_rows(found.comparison), found.text)
    print(f"Report: {done.folder / 'report.html'}")
    _exit_with(found.failures)


def _checked(split: str) -> Split:
    if split not in {"heldout", "train", "all"}:
        raise UsageError(f"--split {split}: allowed are heldout, train and all")
    return cast("Split", split)


def _exit_with(failures: list[tuple[str, str, str]]) -> None:
    for name, benchmark, reason in failures:
        print(f"moefy: {name}: {benchmark} has no score: {reason}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)
