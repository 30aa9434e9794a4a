"""The paper's eleven benchmarks for the dense model, its conversion and ours: docs/results.md.

    python benchmarks/suite.py WORK [--limit 100] [--share 0.5] [--tokens 32768] [--data demo]

Converts SmolLM2-135M as the paper does and as moefy does by default, with the same share of every
FFN running per token, trains both on the same tokens, the paper's with its own objective and ours
from the dense teacher, and measures all five models. The paper's constant is left out beyond its
own shares, where it does harm (docs/construction.md). Models that are in WORK are not made again,
and finished tasks come from the cache, so that an interrupted run continues. Writes
docs/results.md and docs/results/: tables and figure, and all numbers as results.json.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow.parquet as pq
from matplotlib.figure import Figure
from publish import replace_table

from moefy.evaluation.compare import Comparison, evaluate
from moefy.evaluation.harness import stock_tasks
from moefy.evaluation.suite import PAPER_BENCHMARKS, Benchmark, SuiteResult, evaluate_suite
from moefy.evaluation.suite_data import archive_files
from moefy.progress import Progress
from moefy.report.charts import Chart
from moefy.report.tables import (
    Rows,
    comparison_rows,
    markdown,
    percent,
    suite_notes,
    suite_rows,
    write_csv,
)

ROOT = Path(__file__).parents[1]
DENSE = "smollm2-135m"
_WINDOWS = 4  # of held-out text, per domain
_PAPER_SHARE = 0.25  # the paper's largest: 4 of 16, 2 of 8
_RATE_FROM_RANDOM = 1e-3  # the best that was tried for the paper's split (docs/objective.md)


def benchmark_rows() -> Rows:
    """Return what docs/evaluation.md says of every benchmark."""
    rows = [["benchmark", "task", "shots", "metric", "chance", "items", "not the paper's data"]]
    for benchmark in PAPER_BENCHMARKS:
        rows.append(
            [
                benchmark.name,
                f"`{benchmark.task}`",
                str(benchmark.shots),
                benchmark.metric,
                f"{benchmark.chance:.0%}",
                f"{items_of(benchmark):,}",
                benchmark.differs or "–",
            ]
        )
    return rows


def items_of(benchmark: Benchmark) -> int:
    """Return how many items a benchmark has."""
    found = [archive_files(benchmark, task) for task in stock_tasks(benchmark)]
    return sum(
        pq.read_metadata(each.get("test", each.get("validation"))).num_rows for each in found
    )


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """Return, by name, the arguments of the moefy command that makes each model."""
    paper, ours = options.work / "paper", options.work / "ours"
    data = ["--data", options.data]
    repair = [] if options.share <= _PAPER_SHARE else ["--repair", "none"]
    training = [*data, "--tokens", options.tokens]
    made = {
        "the paper's conversion": [
            *("convert", DENSE, paper, "--recipe", "llama-moe"),
            *("--active", round(16 * options.share), *repair),
        ],
        "moefy's": ["convert", DENSE, ours, "--active", round(64 * options.share), *data],
        "the paper's, trained": [
            *("train", paper, f"{paper}-trained", *training),
            *("--learning-rate", _RATE_FROM_RANDOM),
        ],
        "moefy's, trained": ["train", ours, f"{ours}-trained", *training, "--teacher", DENSE],
    }
    return {name: [str(word) for word in words] for name, words in made.items()}


def main() -> None:
    options = _options()
    options.work.mkdir(parents=True, exist_ok=True)
    made = commands(options)
    for words in made.values():
        if not (Path(words[2]) / "config.json").exists():
            subprocess.run([Path(sys.executable).with_name("moefy"), *words], cwd=ROOT, check=True)
    models, names = [DENSE, *(words[2] for words in made.values())], ["dense", *made]
    text = {"data": options.data, "windows": _WINDOWS, "decode": False}
    comparison = evaluate(models, names=names, report=_print, **text)
    suite = {"limit": options.limit, "dtype": options.dtype}
    result = evaluate_suite(models, names=names, report=_print, **suite)
    publish(result, comparison, made, options.data)


def publish(
    result: SuiteResult, comparison: Comparison, made: dict[str, list[str]], data: str
) -> None:
    """Write the page, its tables and figure, and everything as JSON."""
    folder = ROOT / "docs" / "results"
    folder.mkdir(exist_ok=True)
    found = {"suite": asdict(result), "comparison": asdict(comparison)}
    (folder / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    chart = benchmark_chart(result)
    chart.write(folder)
    tables = {
        "suite": suite_rows(result),
        "published": published_rows(result),
        "heldout": [row[:-2] for row in comparison_rows(comparison)],  # no speed: not alone here
    }
    for name, rows in tables.items():
        write_csv(folder / f"{name}.csv", rows)
    limit = "" if result.limit is None else f" --limit {result.limit}"
    limit += "" if result.dtype == "float32" else f" --dtype {result.dtype}"
    folders = " ".join([DENSE, *(words[2] for words in made.values())])
    lines = [*(f"moefy {shlex.join(words)}" for words in made.values())]
    lines.append(f"moefy suite{limit} {folders}")
    lines.append(f"moefy eval --data {data} --windows {_WINDOWS} --no-decode {folders}")
    notes = "".join(f"- {note}\n" for note in suite_notes(result))
    (ROOT / "docs" / "results.md").write_text(
        "# Results: the paper's eleven benchmarks\n\n"
        "Written by `benchmarks/suite.py`; [evaluation.md](evaluation.md) says how it is measured. "
        "Scores in percent ± standard error; differences from the dense model in points, and "
        "retention in percent, each with its 95 % bootstrap interval over items.\n\n"
        f"{markdown(tables['suite'])}\n"
        f"![Scores](results/{chart.name}.png)\n\n"
        "Beside the published models, which are twenty times as large:\n\n"
        f"{markdown(tables['published'])}\n"
        f"Perplexity of {comparison.tokens:,} held-out tokens of {data}, by domain:\n\n"
        f"{markdown(tables['heldout'])}\n{notes}\n"
        f"The commands:\n\n```bash\n{chr(10).join(lines)}\n```\n"
    )
    replace_table(ROOT / "docs" / "evaluation.md", "benchmarks", benchmark_rows())


def published_rows(result: SuiteResult) -> Rows:
    """Return header and rows of the scores with published ones below, a model a row.

    docs/results/paper.csv has the base models in LLaMA-MoE (EMNLP 2024, main results): of 2.7 to
    3.5 billion active parameters, measured with an earlier harness, NQ-open with OpenCompass.
    """
    names = [benchmark.name for benchmark in result.benchmarks]
    rows = [["model", "average", *names], ["measured here, percent ± standard error"]]
    for model in result.models:
        scores = [model.scores[name] for name in names]
        cells = [percent(score.value, score.stderr) for score in scores]
        rows.append([model.name, percent(model.average, model.average_stderr), *cells])
    rows.append(["published, of other sizes, in percent: LLaMA-MoE (arXiv 2406.16554)"])
    with (ROOT / "docs/results/paper.csv").open() as lines:
        for scores in csv.DictReader(lines):
            # An average over other benchmarks cannot be compared with the published one.
            whole = {*names, "model", "average"} == set(scores)
            cells = [scores.get(benchmark, "–") for benchmark in names]
            rows.append([scores["model"], scores["average"] if whole else "–", *cells])
    return rows


def benchmark_chart(suite: SuiteResult) -> Chart:
    """Draw every score with its 95% interval, benchmarks down, and what guessing scores."""
    lines = [*(benchmark.name for benchmark in suite.benchmarks), "average"]
    chances = {each.name: each.chance for each in suite.benchmarks}
    models = suite.models
    height = 1.3 + len(lines) * max(0.3, 0.14 * len(models))
    figure = Figure(figsize=(4.6, height), layout="constrained")
    axes = figure.subplots()
    rows = [["benchmark", "model", "score %", "standard error %", "chance %"]]
    for place, model in enumerate(models):
        found = {name: (score.value, score.stderr) for name, score in model.scores.items()}
        if model.average is not None:
            found["average"] = model.average, model.average_stderr
        # The models of a benchmark share its line; together they take 0.7 of its height.
        shift = (place - (len(models) - 1) / 2) * 0.7 / len(models)
        axes.errorbar(
            [100 * value for value, _ in found.values()],
            [lines.index(name) + shift for name in found],
            xerr=[196 * (error or 0) for _, error in found.values()],
            fmt="osD^vPX*"[place % 8],
            color=f"C{place % 10}",
            ms=4,
            lw=1,
            label=model.name,
        )
        for name, (value, error) in found.items():
            cells = (value, error, chances.get(name))
            numbers = ("" if cell is None else str(100 * cell) for cell in cells)
            rows.append([name, model.name, *numbers])
    for line, name in enumerate(lines):
        # Without this mark a score of 25% looks like a quarter of the way to 100%.
        if (chance := chances.get(name)) is not None:
            axes.plot([100 * chance] * 2, [line - 0.4, line + 0.4], color="0.6", linewidth=1.5)
        axes.axhline(line + 0.5, color="0.92", linewidth=0.8, zorder=0)
    axes.plot([], [], color="0.6", linewidth=1.5, label="guessing")
    axes.set_yticks(range(len(lines)), labels=lines)
    axes.set(xlabel="score (%)", ylim=(len(lines) - 0.5, -0.5))
    axes.grid(axis="x", color="0.93", linewidth=0.8)
    figure.legend(loc="outside lower center", frameon=False, ncols=2)
    caption = (
        "Scores with 95% intervals; grey is what guessing scores. Each interval is that of one "
        "model alone: the paired differences in the table tell two models apart more surely."
    )
    return Chart("scores", figure, rows, caption)


def _print(progress: Progress) -> None:
    if progress.done % 10 == 0:
        print(f"{progress.stage} {progress.done}/{progress.total} {progress.note}", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--limit", type=int, help="items per benchmark [all]")
    parser.add_argument("--share", type=float, default=0.5, help="of the FFN that runs per token")
    parser.add_argument("--tokens", type=int, default=32_768, help="of training")
    parser.add_argument("--dtype", default="float32", help="of the measurement: or bfloat16")
    parser.add_argument("--data", default="demo", help="of training")
    return parser.parse_args()


if __name__ == "__main__":
    main()
