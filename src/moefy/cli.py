"""The command line: one short function per command; the only place that prints or exits."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from moefy.errors import MoefyError, UsageError
from moefy.progress import Progress, ProgressFn

app = typer.Typer(
    name="moefy",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Turn a dense LLaMA-family model into a Mixture-of-Experts model.",
)
_debug = False

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model in OUT.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
RecipeFile = Annotated[Path | None, typer.Option(help="YAML file with any of the settings.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any recipe setting, as in a.b=1."),
]
Data = Annotated[str, typer.Option(help="Folder of DOMAIN.jsonl(.gz) files, hf:DATASET or 'demo'.")]


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    global _debug
    _debug = debug


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
    from moefy.evaluation.inspect import inspect as run
    from moefy.report.tables import inspection_rows

    found = run(source, experts=experts, active=active, context=context)
    if as_json:
        _print_json({label: vars(cost) for label, cost in found.costs.items()})
        return
    context = next(iter(found.costs.values())).context
    _print_table(inspection_rows(found), f"{found.name}, FLOPs at a context of {context:,} tokens")


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
        typer.Option("--repair", "--rescale", help="none, paper (E/k²), scale or refit. [refit]"),
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
    choices = _parse_settings(settings) | _given(
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

    with _bars() as report:
        done = run(
            source, out, data=data, recipe=recipe, overwrite=overwrite, report=report, **choices
        )
    if as_json:
        _print_json(
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
    choices = _parse_settings(settings) | _given(
        filter=quality, domain_key=domain_key, skip_broken=skip_broken
    )
    from moefy.data.prepare import prepare as run
    from moefy.report.tables import corpus_rows

    with _bars() as report:
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
        _print_json({**done.record, "folder": str(done.folder), "tokens_per_s_per_core": speed})
        return
    _print_table(corpus_rows(done.record), f"{done.folder}, tokens of {tokenizer}")
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

    choices = _parse_settings(settings) | _given(
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

    with _bars() as report:
        done = run(
            model, out, data=data, recipe=recipe, overwrite=overwrite, report=report, **choices
        )
    if os.environ.get("RANK", "0") != "0":  # of torchrun's processes one speaks
        return
    if as_json:
        _print_json(
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

    _quiet_libraries()
    found = dry_run(model, processes=processes, recipe=recipe, **choices)
    if as_json:
        _print_json(vars(found))
        return
    _print_table(dry_run_rows(found), f"{model}, {processes} processes")


@app.command()
def leaderboard(
    source: Annotated[str, typer.Argument(help="Dense model, as for convert.")],
    out: Annotated[Path, typer.Argument(help="Folder for table, CSV and figure; resumes.")],
    data: Data = "demo",
    experts: Annotated[int, typer.Option(help="Slices of every FFN.")] = 64,
    active: Annotated[str, typer.Option(help="Shares of the FFN.")] = "0.75,0.5,0.25",
    methods: Annotated[
        str | None, typer.Option(help="Comma-separated names, or parts of names. [all]")
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
    from moefy.construct.leaderboard import leaderboard as run
    from moefy.report.tables import leaderboard_rows

    with _bars() as report:
        scores = run(
            source,
            out,
            data=data,
            experts=experts,
            fractions=fractions,
            methods=[part.strip() for part in (methods or "").split(",") if part.strip()],
            calibration_tokens=calibration_tokens,
            windows=windows,
            sequence_length=sequence_length,
            seed=seed,
            report=report,
        )
    if as_json:
        _print_json([vars(score) for score in scores])
        return
    _print_table(leaderboard_rows(scores, brief=True), f"{source}, {experts} experts")
    print(f"Table, CSV and figure: {out}")


@app.command(name="eval")
def evaluate(
    models: Annotated[list[str], typer.Argument(help="Models; put the dense one among them.")],
    data: Data = "demo",
    split: Annotated[str, typer.Option(help="heldout, train or all.")] = "heldout",
    windows: Annotated[int, typer.Option(min=1, help="Per domain.")] = 8,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    decode: Annotated[bool, typer.Option(help="Measure generation too.")] = True,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure speed alone, and what bounds it.")
    ] = False,
    suite: Annotated[
        str | None, typer.Option(help="llama-moe: measure the paper's eleven benchmarks instead.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="Or these tasks of lm-evaluation-harness: sciq,piqa.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each benchmark. [all]")] = None,
    hub: Annotated[
        bool | None,
        typer.Option("--hub/--no-hub", help="Benchmarks from the hub. [if it answers]"),
    ] = None,
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
    """Compare models: held-out perplexity, KL to the dense model, cost, speed.

    Example: `moefy eval smollm2-135m out/moe out/trained`

    Speed alone: `moefy eval --speed smollm2-135m out/moe`

    Benchmarks: `moefy eval --suite llama-moe --limit 100 smollm2-135m out/moe`
    """
    if suite or tasks:
        if speed:
            raise UsageError("--speed and benchmarks are measured one by one: drop one of them")
        _evaluate_suite(models, suite, tasks, limit, hub, dtype, as_json)
        return
    if speed:
        from moefy.evaluation.speed import measure_speed
        from moefy.report.tables import speed_rows, speed_title

        with _bars() as report:
            measured = measure_speed(
                models,
                batches=_counts("--batch", batch) if batch else None,
                prompt_tokens=prompt_tokens,
                new_tokens=new_tokens,
                rounds=rounds,
                dtype=dtype,
                threads=threads,
                runtime=runtime,
                report=report,
            )
        if as_json:
            _print_json(measured.to_dict())
        else:
            _print_table(speed_rows(measured), speed_title(measured))
        return
    if split not in {"heldout", "train", "all"}:
        raise UsageError(f"--split {split}: allowed are heldout, train and all")
    from moefy.evaluation.compare import evaluate as run
    from moefy.report.tables import comparison_rows

    with _bars() as report:
        done = run(
            models,
            data=data,
            split=split,  # type: ignore[arg-type]
            windows=windows,
            sequence_length=sequence_length,
            decode=decode,
            report=report,
        )
    if as_json:
        _print_json(done.to_dict())
        return
    _print_table(comparison_rows(done), f"{done.tokens:,} held-out tokens per model")


def _evaluate_suite(
    models: list[str],
    suite: str | None,
    tasks: str | None,
    limit: int | None,
    hub: bool | None,
    dtype: str,
    as_json: bool,
) -> None:
    from moefy.evaluation.suite import evaluate_suite
    from moefy.report.suite_tables import nll_rows, suite_notes, suite_rows

    with _bars() as report:
        done = evaluate_suite(
            models,
            suite=suite,
            tasks=[task.strip() for task in (tasks or "").split(",") if task.strip()],
            limit=limit,
            dtype=dtype,
            hub=hub,
            report=report,
        )
    if as_json:
        _print_json(done.to_dict())
    else:
        _print_table(suite_rows(done), "Score in percent ± standard error [95 % interval]")
        _print_table(nll_rows(done), "−log p of the right answer, nats ± standard error")
        for note in suite_notes(done):
            print(note)
    failures = [(model.name, *each) for model in done.models for each in model.failed.items()]
    for name, benchmark, reason in failures:
        print(f"moefy: {name}: {benchmark} has no score: {reason}", file=sys.stderr)
    if failures:
        raise typer.Exit(1)


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

    with _bars() as report:
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

    with _bars() as report:
        folder = run(model, out, overwrite=overwrite, report=report)
    print(f"{folder}: dense again")


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
    choices = _parse_settings(settings) | _given(
        epochs=epochs,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        packing=packing,
        router=router,
        lora_rank=lora_rank,
        chat_template=chat_template,
        seed=seed,
    )
    from moefy.tuning.run import tune as run

    with _bars() as report:
        done = run(
            model, out, data=data, recipe=recipe, overwrite=overwrite, report=report, **choices
        )
    if as_json:
        _print_json(
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
    from moefy.tuning.chat import Speaker
    from moefy.tuning.chat import chat as run

    _quiet_libraries()
    speaker = Speaker(model, report=_log_lines())
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
    from moefy.tuning.judge import judge as run

    with _bars() as report:
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
        _print_json({**vars(done), "folder": str(out)})
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
        _print_table(rows, f"{model}, marked from 1 to 10 by {judge_model}")
    print(f"{done.unscored} of {2 * done.questions} judgements hold no mark. All are in {out}")


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

    with _bars() as report:
        done = run(
            out,
            experts=experts,
            active=active,
            seed=seed,
            overwrite=overwrite,
            report=report,
            **_given(tokens=tokens),
        )
    _print_table(comparison_rows(done.comparison), "SmolLM2-135M, held-out text")
    print(headline(done.comparison))
    print(
        f"{done.elapsed_s / 60:.1f} minutes, {done.peak_rss_bytes / 2**30:.1f} GiB. "
        f"Report: {done.folder / 'report.html'}"
    )


def main() -> None:
    """Run the command line: exit code 0, 1 for run time errors, 2 for usage errors."""
    try:
        app()
    except MoefyError as error:
        if _debug:
            raise
        print(f"moefy: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if _debug:
            raise
        print(
            f"moefy: unexpected {type(error).__name__}: {' '.join(str(error).split())} "
            "(this is a bug: run `moefy --debug …` for the traceback and report it)",
            file=sys.stderr,
        )
        sys.exit(1)


def _given(**choices: Any) -> dict[str, Any]:
    return {key: value for key, value in choices.items() if value is not None}


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


def _counts(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r}: write whole numbers, as in 1,8") from None


def _parse_settings(settings: list[str] | None) -> dict[str, Any]:
    import yaml

    choices = {}
    for setting in settings or []:
        key, separator, value = setting.partition("=")
        if not separator:
            raise UsageError(f"--set {setting}: write KEY=VALUE")
        try:
            choices[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {setting}: {value!r} is not valid YAML") from error
    return choices


@contextmanager
def _bars() -> Iterator[ProgressFn]:
    """Draw one bar per stage on a terminal, print a line now and then into a log.

    Both go to standard error, so that output stays clean.
    """
    _quiet_libraries()
    console = Console(stderr=True)
    if not console.is_terminal:
        yield _log_lines()
        return

    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    tasks: dict[str, Any] = {}
    with Bars(
        *columns, TimeElapsedColumn(), TextColumn("{task.fields[note]}"), console=console
    ) as bars:

        def report(progress: Progress) -> None:
            if progress.stage not in tasks:
                tasks[progress.stage] = bars.add_task(progress.stage, note="")
            bars.update(
                tasks[progress.stage],
                total=progress.total,
                completed=progress.done,
                note=progress.note,
            )

        yield report


def _log_lines(every_s: float = 10.0) -> ProgressFn:
    """Return a reporter that prints a line when a stage ends, and every ten seconds between."""
    last_s = time.monotonic()

    def report(progress: Progress) -> None:
        nonlocal last_s
        finished = progress.done >= progress.total
        now_s = time.monotonic()
        if finished or now_s - last_s >= every_s:
            note = f"  {progress.note}" if progress.note else ""
            count = f"{progress.done:,}/{progress.total:,}"
            print(f"{progress.stage} {count}{note}", file=sys.stderr, flush=True)
            last_s = now_s

    return report


def _quiet_libraries() -> None:
    """Keep the libraries' own bars and advice out of ours; their errors still come through."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=str))


def _print_table(rows: list[list[str]], title: str) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, name in enumerate(rows[0]):
        table.add_column(name, justify="right" if number else "left")
    for row in rows[1:]:
        table.add_row(*row)
    console = Console()
    if console.width < 100 and not console.is_terminal:
        console = Console(width=160)
    console.print(table)
