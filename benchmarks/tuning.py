"""Instruction tuning on a few real conversations: docs/tuning.md.

    python benchmarks/tuning.py MODEL CONVERSATIONS [--conversations 128] [--tokens 256]

MODEL is a folder (`moefy convert smollm2-135m MODEL`), CONVERSATIONS a file as `moefy tune` takes
it. Trains once on the first of the training side and measures the first 40 of the held-out side.
Adds a row to docs/tuning/tuning.csv, or replaces the row of the same settings, and renews the table
on the page. Minutes on one core.
"""

from __future__ import annotations

import argparse
import csv
import json
import tempfile
from pathlib import Path

from publish import replace_table

import moefy
from moefy.checkpoint.reader import read_config
from moefy.data.conversations import read_conversations

PAGE = Path(__file__).parents[1] / "docs" / "tuning.md"
RESULT = PAGE.with_suffix("") / "tuning.csv"
HEAD = ["model", "trained", "conversations", "tokens each", "steps", "held-out tokens"]
HEAD += ["loss before", "loss after", "minutes"]
HELD_OUT = 40


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data")
    parser.add_argument("--conversations", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--lora-rank", type=int, default=0)
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    given = parser.parse_args()
    whole, _ = read_conversations(given.data)
    train = [c for c in whole if not c.is_held_out][: given.conversations]
    chosen = train + [c for c in whole if c.is_held_out][:HELD_OUT]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "some.jsonl"
        data.write_text("".join(json.dumps({"messages": c.messages}) + "\n" for c in chosen))
        done = moefy.tune(
            given.model,
            Path(folder) / "tuned",
            data=data,
            epochs=1,
            sequence_length=given.tokens,
            global_batch_size=16,
            learning_rate=given.learning_rate,
            lora_rank=given.lora_rank,
            checkpoint_every_steps=0,
        )
    trained = f"LoRA {given.lora_rank}" if given.lora_rank else "all but routers"
    trained += f", {given.learning_rate:g}"
    row = [read_config(given.model)["model_type"], trained, str(done.conversations)]
    row += [f"≤ {given.tokens}", str(done.steps), f"{done.heldout_tokens:,}"]
    row += [f"{done.heldout_before:.4f}", f"{done.heldout_after:.4f}", f"{done.elapsed_s / 60:.1f}"]
    rows = [HEAD]
    if RESULT.is_file():
        with RESULT.open() as file:
            rows = [old for old in csv.reader(file) if old[:4] != row[:4]]
    rows.append(row)
    RESULT.parent.mkdir(exist_ok=True)
    with RESULT.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    replace_table(PAGE, "tuning", rows)


if __name__ == "__main__":
    main()
