"""The main job in one go: a real model converted, trained for a few minutes, and compared."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from moefy.checkpoint.card import read_record
from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.checkpoint.source import BUILTIN, resolve
from moefy.construct.convert import convert
from moefy.data.records import DEMO
from moefy.evaluation.compare import Comparison, evaluate
from moefy.hardware import peak_rss_bytes
from moefy.progress import Progress, ProgressFn, silent
from moefy.recipe import LLAMA_MOE
from moefy.report.page import Report, facts_of, write_page
from moefy.report.tables import number
from moefy.run_folder import RunFolder
from moefy.training.recipe import TrainRecipe
from moefy.training.run import train
from moefy.training.state import read_log

_PROMPT = "The history of the city begins"
_EVAL_WINDOWS = 4


def demo(
    out: str | Path = "moefy-demo",
    *,
    experts: int | None = None,
    active: int | None = None,
    tokens: int = 32_768,
    seed: int = 0,
    overwrite: bool = False,
    report: ProgressFn = silent,
) -> Report:
    """Convert SmolLM2-135M, train it briefly, compare, write a report.

    A random split with a random router, the LLaMA-MoE paper's method, is measured too, without the
    paper's rescaling, which does harm at this share of experts (docs/construction.md).

    Args:
        out: Folder that gets `random-split/`, `converted/`, `recovered/`, and the report's files.
        experts: Slices per layer; None for `convert`'s default.
        active: Slices that run per token; None for `convert`'s default.
        tokens: Training tokens.
        seed: Seed of split and training.
        overwrite: Replace an earlier demo in `out`.
        report: Function that is told about progress.

    Raises:
        MoefyError: See `convert`, `train` and `evaluate`.
    """
    started = time.perf_counter()
    recipe = TrainRecipe.build(tokens=tokens, seed=seed)
    common: dict[str, Any] = {"seed": seed, "report": report}
    with RunFolder(out, "demo", overwrite=overwrite) as run:
        facts = facts_of("moefy demo", data=DEMO, split="heldout")
        run.begin(facts)
        dense = resolve(BUILTIN, report=report)
        folders = {"dense": dense} | {
            name: run.work / name.replace(" ", "-")
            for name in ("random split", "converted", "recovered")
        }
        made = convert(dense, folders["converted"], experts=experts, active=active, **common)
        # The paper's split gets the same sizes, so that only the method differs.
        counts = {"experts": made.recipe.experts, "active": made.recipe.active}
        paper = LLAMA_MOE | {"repair": "none"} | counts
        convert(dense, folders["random split"], **paper, **common)
        train(folders["converted"], folders["recovered"], recipe=recipe, report=report)
        comparison = evaluate(
            list(folders.values()), names=list(folders), windows=_EVAL_WINDOWS, report=report
        )
        samples = {}
        for done, (name, folder) in enumerate(folders.items()):
            samples[name] = _sample(folder)
            report(Progress("write a sentence", done + 1, len(folders), name))
        records = {name: read_record(folder) for name, folder in folders.items()}
        facts |= {
            "samples": samples,
            "train_recipe": recipe.model_dump(mode="json"),
            "elapsed_s": round(time.perf_counter() - started, 1),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        logs = {"recovered": read_log(folders["recovered"])}
        finished = Report(run.out, comparison, None, None, records, logs, facts)
        title = f"moefy demo: SmolLM2-135M-Instruct, {recipe.tokens:,} training tokens"
        write_page(run.work, finished, title=title, lead=headline(comparison), samples=samples)
        run.finish()
    return finished


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
    """Say in a sentence what the demo's table says."""
    dense, random_split, converted, recovered = comparison.results
    share = recovered.cost.flops_per_token / dense.cost.flops_per_token
    return (
        f"With {share:.0%} of the dense model's FLOPs per token, perplexity "
        f"{dense.perplexity:,.1f} becomes {converted.perplexity:,.1f} without training "
        f"(a random split: {number(random_split.perplexity)}) and {recovered.perplexity:,.1f} "
        "after this training."
    )
