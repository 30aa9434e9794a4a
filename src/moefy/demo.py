"""The main job in one go: a real model converted, trained for a few minutes, and compared."""

from __future__ import annotations

import time
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch

from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.checkpoint.source import BUILTIN, resolve
from moefy.construct.convert import convert
from moefy.data.records import DEMO
from moefy.errors import OutputError
from moefy.evaluation.compare import Comparison, evaluate
from moefy.hardware import peak_rss_bytes
from moefy.progress import Progress, ProgressFn, silent
from moefy.recipe import LLAMA_MOE
from moefy.report.findings import (
    Findings,
    ReportedModel,
    machine,
    now,
    reported_models,
    versions,
)
from moefy.report.page import Section
from moefy.report.tables import number
from moefy.report.write import files_of_report, save
from moefy.storage import check_output, refuse_file
from moefy.training.recipe import TrainRecipe
from moefy.training.run import train

_PROMPT = "The history of the city begins"
_EVAL_WINDOWS = 4
_MODELS = ("random-split", "converted", "recovered")
"""Folders."""


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
        out: gets `random-split/`, `converted/`, `recovered/`, and what `report.write.save` writes.
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
    _check_place(out)
    random_split, converted, recovered = (out / name for name in _MODELS)
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


def _check_place(out: Path) -> None:
    """Refuse a folder that holds anything but an earlier demo, whole or not.

    Raises:
        OutputError: it does, or is a file.
    """
    refuse_file(out)
    names = [file.name for file in out.iterdir()] if out.is_dir() else []
    found = {name for name in names if not name.startswith(".")}
    if others := found - set(_MODELS) - files_of_report(out):
        raise OutputError(f"{out} holds {min(others)} and is no demo: choose another folder")


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
        f"{number(random_split.perplexity)}) and {recovered.perplexity:,.1f} after this training."
    )


def _write_report(done: Demo, samples: dict[str, str], recipe: TrainRecipe, seed: int) -> None:
    comparison = done.comparison
    folders = [done.folder / name for name in _MODELS]
    names = [result.name for result in comparison.results]
    findings = Findings(
        comparison=comparison,
        suite=None,
        routing=None,
        models=[ReportedModel(names[0], None, []), *reported_models(folders, names[1:])],
        data=DEMO,
        split="heldout",
        command="moefy demo",
        date=now(),
        machine=machine(),
        versions=versions(suite=False),
    )
    facts = (
        f"SmolLM2-135M-Instruct, {recipe.num_steps} steps, {recipe.tokens:,} training tokens, "
        f"seed {seed}, {done.elapsed_s / 60:.1f} minutes, {done.peak_rss_bytes / 2**30:.1f} GiB."
    )
    texts = "".join(
        f"<h3>{escape(name)}</h3><pre>{escape(text.replace(chr(10), ' ⏎ '))}</pre>"
        for name, text in samples.items()
    )
    save(
        done.folder,
        findings,
        title="moefy: a dense model becomes a MoE",
        lead=headline(comparison),
        more=[Section("samples", "What the models write", f"<p>{escape(facts)}</p>{texts}")],
        record={
            "samples": samples,
            "train_recipe": recipe.model_dump(mode="json"),
            "elapsed_s": round(done.elapsed_s, 1),
            "peak_rss_bytes": done.peak_rss_bytes,
        },
    )
