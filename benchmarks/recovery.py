"""Recovery after conversion, recipe by recipe: docs/training.md, "What each ingredient buys".

    python benchmarks/recovery.py WORK DATA --tokens 65536 --rows KL "half KL"
    python benchmarks/recovery.py WORK    # the table of what WORK has

DATA is ../shared/data/pretrain. Every run is one `moefy.train` on text of seven domains, measured
before and after on 28,672 held-out tokens (`--heldout 8`): KL to the dense model, and the loss
above a dense model that was trained on the same tokens with the same rate and schedule (the start
`dense`). `--starts split pruned` gives the rival the same recipe: the model pruned to the same
active size, converted with the same effort and text. What WORK has is not run again.
Writes docs/training/recovery.csv and the table.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from fit import MODEL
from publish import publish_table, rows_of

import moefy

DOCS = Path(__file__).parents[1] / "docs"
SPLITS: dict[str, dict[str, int]] = {
    "split": {"experts": 16, "active": 8, "shared": 0},
    "pruned": {"experts": 16, "active": 8, "shared": 8},
    "split 64": {"experts": 64, "active": 32, "shared": 16},
    "split quarter": {"experts": 16, "active": 4, "shared": 0},
}
KL: dict[str, Any] = {"teacher": MODEL, "distillation": {"alpha": 1.0}}
ROWS: dict[str, dict[str, Any]] = {
    "cross-entropy": {},
    "paper": {
        "mixture": "StaticSheared",
        "learning_rate": 2e-4,
        "balance": {"kind": "importance-load", "noise": 1.0},
    },
    "half KL": {"teacher": MODEL, "distillation": {"alpha": 0.5}},
    "KL": KL,
    "KL, temperature 2": KL | {"distillation": {"alpha": 1.0, "temperature": 2.0}},
    **{
        f"KL + {weight:g} {place}": KL
        | {"distillation": {"alpha": 1.0, "layers": place, "layer_weight": weight}}
        for place in ("residual", "ffn")
        for weight in (0.3, 1, 3)
    },
    **{f"KL, rate {rate:g}": KL | {"learning_rate": rate} for rate in (5e-5, 2e-4, 4e-4, 8e-4)},
    "KL, rate to 0": KL | {"min_lr_ratio": 0.0},
    "KL, no balance": KL | {"balance": "none"},
    "KL, router rate 0.1": KL | {"router_lr_scale": 0.1},
    "KL, router rate 1": KL | {"router_lr_scale": 1.0},
    "KL, steps of 256": KL | {"sequence_length": 256},
    "KL, steps of 2048": KL | {"global_batch_size": 4},
    "KL, steps of 2048, rate 2e-4": KL | {"global_batch_size": 4, "learning_rate": 2e-4},
    "KL, attention frozen": KL | {"frozen": ("embeddings", "attention")},
    "KL, FFN alone": KL | {"frozen": ("embeddings", "attention", "norms")},
    "KL, embeddings frozen": KL | {"frozen": ("embeddings",)},
    "KL, no decay": KL | {"weight_decay": 0.0},
    "KL, betas 0.9, 0.99": KL | {"adam_betas": (0.9, 0.99)},
    "KL, adapters": KL | {"lora": {"modules": "all", "rank": 32}, "learning_rate": 5e-4},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=ROWS)
    parser.add_argument("--starts", nargs="+", default=["split"], choices=[*SPLITS, "dense"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--heldout", type=int, default=8, help="sequences of each domain")
    parser.add_argument("--keep", action="store_true", help="the trained models, too")
    asked = parser.parse_args()
    runs = asked.work / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    if asked.data:
        for seed in asked.seeds:
            for row in asked.rows:
                for start in asked.starts:
                    train(asked, start, row, seed)
    publish(runs)


def start_of(work: Path, name: str, data: str) -> Path | str:
    """Return a model that is trained, converted with the default effort if it is not there."""
    if name == "dense":
        return MODEL
    folder = work / name.replace(" ", "-")
    if not folder.exists():
        moefy.convert(MODEL, folder, data=data, **SPLITS[name])  # type: ignore[arg-type]
    return folder


def train(asked: argparse.Namespace, start: str, row: str, seed: int) -> None:
    name = f"{start}-{row}-{asked.tokens}-{seed}".replace(",", "").replace(" ", "-")
    file = asked.work / "runs" / f"{name}.json"
    if file.exists():
        return
    settings = {"sequence_length": 512, "heldout_sequences": asked.heldout} | ROWS[row]
    per_step = settings["sequence_length"] * settings.get("global_batch_size", 1)
    out = asked.work / "models" / name
    done = moefy.train(
        start_of(asked.work, start, asked.data),
        out,
        data=asked.data,
        tokens=asked.tokens,
        seed=seed,
        checkpoint_every_steps=(1 << 17) // per_step,
        overwrite=True,
        **settings,
    )
    record = {
        "start": start,
        "recipe": row,
        "tokens": asked.tokens,
        "seed": seed,
        "kl_before": done.kl_before,
        "kl": done.kl_after,
        "loss": done.heldout_after,
        "train_minutes": done.elapsed_s / 60,
        "heldout_tokens": settings["sequence_length"] * 7 * asked.heldout,  # of seven domains
    }
    file.write_text(json.dumps(record) + "\n")
    print(name, done.kl_before, "->", done.kl_after, flush=True)
    if not asked.keep:
        shutil.rmtree(out)


def publish(runs: Path) -> None:
    """Write the table: every run, its KL, and its loss above the equally trained dense model."""
    found = [json.loads(file.read_text()) for file in sorted(runs.glob("*.json"))]
    dense = {(r["tokens"], r["seed"]): r["loss"] for r in found if r["start"] == "dense"}
    records = []
    trained = [run for run in found if run["start"] != "dense"]
    for run in sorted(trained, key=lambda r: (r["start"], -r["tokens"], r["kl"], r["seed"])):
        twin = dense.get((run["tokens"], run["seed"]))
        records.append(
            {
                "start": run["start"],
                "recipe": run["recipe"],
                "tokens": f"{run['tokens']:,}",
                "seed": str(run["seed"]),
                "held-out tokens": f"{run['heldout_tokens']:,}",
                "KL before": f"{run['kl_before']:.3f}",
                "KL after": f"{run['kl']:.3f}",
                "loss above trained dense": "" if twin is None else f"{run['loss'] - twin:.3f}",
                "minutes": f"{run['train_minutes']:.1f}",
            }
        )
        print(*records[-1].values(), sep=" | ")
    publish_table(rows_of(records), DOCS / "training/recovery.csv", DOCS / "training.md")


if __name__ == "__main__":
    main()
