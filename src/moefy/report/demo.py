"""The main job in one go: a real model converted, trained for a few minutes, and compared."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from moefy.checkpoint.card import read_record
from moefy.checkpoint.source import BUILTIN, resolve
from moefy.construct.convert import convert
from moefy.data.records import DEMO
from moefy.evaluation.compare import evaluate
from moefy.hardware import peak_rss_bytes
from moefy.progress import ProgressFn, silent
from moefy.recipe import LLAMA_MOE
from moefy.report.write import Report, facts_of, verdict, write_page
from moefy.run_folder import RunFolder
from moefy.training.recipe import TrainRecipe
from moefy.training.run import train
from moefy.training.state import read_log

_EVAL_WINDOWS = 4
# Half of what convert reads, and few large slices, so that all of it takes minutes
_CALIBRATION_TOKENS, _EXPERTS = 20_480, 16


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
        experts: Slices per layer; None for 16.
        active: Slices that run per token; None for `convert`'s default.
        tokens: Training tokens.
        seed: Seed of split and training.
        overwrite: Replace an earlier demo in `out`.
        report: Function that is told about progress.

    Raises:
        MoefyError: See `convert`, `train` and `evaluate`.
    """
    started = time.perf_counter()
    # refused before anything is fetched; the models are measured at the end, and not in training
    chosen = {"tokens": tokens, "seed": seed, "teacher": BUILTIN}
    recipe = TrainRecipe.build("demo", **chosen, evaluate_every_steps=0)
    common: dict[str, Any] = {"seed": seed, "report": report}
    with RunFolder(out, "demo", overwrite=overwrite) as run:
        facts = facts_of("moefy demo", data=DEMO, split="heldout")
        run.begin(facts)
        dense = resolve(BUILTIN, report=report)
        folders = {"dense": dense} | {
            name: run.work / name.replace(" ", "-")
            for name in ("random split", "converted", "recovered")
        }
        made = convert(
            dense,
            folders["converted"],
            experts=experts or _EXPERTS,
            active=active,
            calibration_tokens=_CALIBRATION_TOKENS,
            **common,
        )
        # The paper's split gets the same sizes, so that only the method differs.
        counts = {"experts": made.recipe.experts, "active": made.recipe.active}
        paper = LLAMA_MOE | {"repair": "none"} | counts
        convert(dense, folders["random split"], **paper, **common)
        train(folders["converted"], folders["recovered"], recipe=recipe, report=report)
        comparison = evaluate(
            list(folders.values()), names=list(folders), windows=_EVAL_WINDOWS, report=report
        )
        records = {name: read_record(folder) for name, folder in folders.items()}
        facts |= {
            "train_recipe": recipe.model_dump(mode="json"),
            "elapsed_s": round(time.perf_counter() - started, 1),
            "peak_rss_bytes": peak_rss_bytes(),
        }
        logs = {"recovered": read_log(folders["recovered"])}
        finished = Report(run.out, comparison, None, None, records, logs, facts)
        title = f"moefy demo: SmolLM2-135M-Instruct, {recipe.tokens:,} training tokens"
        write_page(run.work, finished, title=title, lead=verdict(finished))
        run.finish()
    return finished
