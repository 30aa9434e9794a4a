"""The main job in one go: a real model converted, trained for a few minutes, and compared."""

from __future__ import annotations

import json
import math
import platform
import resource
import sys
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.checkpoint.source import BUILTIN, resolve
from moefy.construct.convert import convert
from moefy.errors import OutputError
from moefy.evaluation.compare import Comparison, evaluate
from moefy.progress import Progress, ProgressFn, silent
from moefy.recipe import LLAMA_MOE
from moefy.report.figures import expert_load_heatmap, loss_curve, svg
from moefy.report.page import html_figure, html_page, html_table
from moefy.report.tables import comparison_rows, markdown
from moefy.storage import check_output, replace_file
from moefy.training.recipe import TrainRecipe
from moefy.training.run import train
from moefy.training.state import read_log

_PROMPT = "The history of the city begins"
_EVAL_WINDOWS = 4


@dataclass(frozen=True)
class Demo:
    """What `demo` made.

    Attributes:
        folder: holds the two models and the report's files.
        comparison: dense, converted, recovered.
        elapsed_s: of the whole demo.
        peak_rss_bytes: of this process.
    """

    folder: Path
    comparison: Comparison
    elapsed_s: float
    peak_rss_bytes: int


def demo(
    out: str | Path = "moefy-demo",
    *,
    experts: int | None = None,
    active: int | None = None,
    tokens: int = 32_768,
    seed: int = 0,
    overwrite: bool = False,
    report: ProgressFn = silent,
) -> Demo:
    """Convert SmolLM2-135M, train it briefly, compare, write a report.

    A random split with a random router, the LLaMA-MoE paper's method, stands beside; not rescaled,
    because at this share of experts the paper's constant does harm (docs/construction.md).

    Args:
        out: gets `random-split/`, `converted/`, `recovered/`, `report.html`, `results.json`,
            `results.md` and the two figures.
        experts: slices per layer; None for `convert`'s default.
        active: slices that run per token; None for `convert`'s default.
        tokens: training tokens.
        seed: of split and training.
        overwrite: replace an earlier demo in `out`.
        report: told about progress.

    Raises:
        MoefyError: see `convert`, `train` and `evaluate`.
    """
    started = time.perf_counter()
    out = Path(out).expanduser()
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file: choose another output folder")
    random_split, converted, recovered = (
        out / name for name in ("random-split", "converted", "recovered")
    )
    for folder in (random_split, converted, recovered):
        check_output(folder, overwrite=overwrite)
    recipe = TrainRecipe.build(tokens=tokens, seed=seed)
    dense = resolve(BUILTIN, report=report)
    common: dict[str, Any] = {"seed": seed, "overwrite": overwrite, "report": report}
    made = convert(dense, converted, experts=experts, active=active, **common).recipe
    counts = {"experts": made.experts, "active": made.active}
    convert(dense, random_split, **LLAMA_MOE | {"repair": "none"} | counts | common)
    train(
        converted,
        recovered,
        overwrite=overwrite,
        report=report,
        **recipe.model_dump(exclude_defaults=True),
    )
    models = [dense, random_split, converted, recovered]
    names = ["dense", "random split", "converted", "recovered"]
    comparison = evaluate(models, names=names, windows=_EVAL_WINDOWS, report=report)
    samples = {}
    for done, (name, model) in enumerate(zip(names, models, strict=True)):
        samples[name] = _sample(model)
        report(Progress("write a sentence", done + 1, len(models), name))
    finished = Demo(out, comparison, time.perf_counter() - started, peak_rss_bytes())
    _write_report(finished, samples, recipe, seed)
    return finished


def peak_rss_bytes() -> int:
    """Return the most memory this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@torch.inference_mode()
def _sample(folder: Path) -> str:
    tokenizer = load_tokenizer(folder)
    network = load_model(folder, dtype=torch.float32)
    ids = tokenizer(_PROMPT, return_tensors="pt")
    written = network.generate(
        **ids, max_new_tokens=24, do_sample=False, pad_token_id=tokenizer.eos_token_id
    )
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def headline(comparison: Comparison) -> str:
    """Say in two sentences what the demo's table says."""
    dense, random_split, converted, recovered = comparison.results
    share = recovered.cost.flops_per_token / dense.cost.flops_per_token
    return (
        f"{share:.0%} of the dense model's FLOPs per token. Perplexity {dense.perplexity:,.1f} "
        f"becomes {converted.perplexity:,.1f} without training (a random split: "
        f"{random_split.perplexity:,.3g}) and {recovered.perplexity:,.1f} after this training."
    )


def _write_report(done: Demo, samples: dict[str, str], recipe: TrainRecipe, seed: int) -> None:
    log = read_log(done.folder / "recovered")
    comparison = done.comparison
    rows = comparison_rows(comparison)
    by_domain = comparison.results[0].domain_perplexity
    dense_losses = {domain: math.log(value) for domain, value in by_domain.items()}
    curve, heatmap = loss_curve(log, dense_losses=dense_losses), expert_load_heatmap(log)
    for name, figure in {"loss.png": curve, "expert-load.png": heatmap}.items():
        figure.savefig(done.folder / name, dpi=150)
    record: dict[str, Any] = {
        "comparison": comparison.to_dict(),
        "samples": samples,
        "train_recipe": recipe.model_dump(mode="json"),
        "elapsed_s": round(done.elapsed_s, 1),
        "peak_rss_bytes": done.peak_rss_bytes,
        "machine": {"threads": torch.get_num_threads(), "platform": platform.platform()},
    }
    replace_file(done.folder / "results.json", json.dumps(record, indent=2) + "\n")
    replace_file(done.folder / "results.md", markdown(rows))
    minutes = done.elapsed_s / 60
    facts = (
        f"SmolLM2-135M-Instruct, {recipe.num_steps} steps, {log[-1]['tokens']:,} training tokens, "
        f"{comparison.tokens:,} held-out tokens, seed {seed}, {torch.get_num_threads()} CPU "
        f"threads, {minutes:.1f} minutes, {done.peak_rss_bytes / 2**30:.1f} GiB."
    )
    texts = "".join(
        f"<h3>{escape(name)}</h3><pre>{escape(text.replace(chr(10), ' ⏎ '))}</pre>"
        for name, text in samples.items()
    )
    parts = [
        f"<p>{escape(headline(comparison))}</p>",
        html_table(rows),
        f"<p>{escape(facts)} Made with <code>moefy demo</code>.</p>",
        html_figure(svg(curve), "Training loss."),
        html_figure(
            svg(heatmap),
            "How often each routed expert is chosen, last quarter of the run. The shared expert, "
            "which always runs, is not shown.",
        ),
        f"<h2>What the models write</h2>{texts}",
    ]
    replace_file(
        done.folder / "report.html", html_page("moefy: a dense model becomes a MoE", parts)
    )
