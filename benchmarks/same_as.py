"""Compare what two source trees make: weights' hashes, --json, losses.

    python benchmarks/same_as.py OLD_SRC NEW_SRC WORK [--quick]

OLD_SRC and NEW_SRC are `src` folders (`git worktree add /tmp/old COMMIT`). Both run the same
commands on the same machine with one thread: every partition, router and repair on a tiny model,
`prepare`, `train`, `tune`, `eval`, and without --quick the default conversion of SmolLM2-135M.
Prints a line for each, and exits with 1 where one differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

PARTITIONS = (
    *("random", "clustering-up", "clustering-gate", "coactivation", "sharing-inner"),
    *("sharing-inter", "gradient", "carve", "alternating"),
)
ROUTERS = ("random", "mean-gate", "representative", "ridge", "ridge-log", "ascent")
REPAIRS = ("none", "unscaled", "paper", "scale", "refit")
TINY = "--data text --set calibration_tokens=2048 --set calibration_length=64"
TRAIN = "--data text --tokens 1024 --set sequence_length=64 --set evaluate_every_steps=8"
TUNE = "--data talks.jsonl --set sequence_length=128 --set epochs=2"


def main() -> None:
    """Run all commands with both trees and compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    found = []
    for name, source in (("old", arguments.old), ("new", arguments.new)):
        work = arguments.work / name
        kept = work / f"{'quick' if arguments.quick else 'whole'}.json"
        if name == "new" or not kept.is_file():  # the old tree does not change
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            make_inputs(work)
            kept.write_text(json.dumps(measure(work, source.resolve(), arguments.quick)))
        found.append(json.loads(kept.read_text()))
    differing = 0
    for key in found[0]:
        old, new = found[0][key], found[1].get(key)
        distance = relative(old, new)
        state = "same" if distance == 0 else f"differs by {distance:.1e}"
        differing += distance > 1e-5
        print(f"{key:45s} {state:20s} {brief(old)}")
        if distance > 1e-5:
            print(f"{'':45s} {'now':20s} {brief(new)}")
    print(f"{len(found[0])} compared, {differing} differ by more than 1e-5")
    sys.exit(bool(differing))


def make_inputs(work: Path) -> None:
    """Write a tiny random Llama with a byte tokenizer, three domains, and conversations."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(work / "src")
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>").save_pretrained(work / "src")
    drawn = random.Random(0)
    words = ["".join(drawn.choices("abcdefghijklmnopqrstuvwxyz", k=5)) for _ in range(300)]
    (work / "text").mkdir()
    for domain in ("book", "code", "wiki"):
        with (work / "text" / f"{domain}.jsonl").open("w") as file:
            for number in range(120):
                text = f"{domain} {number} " + " ".join(drawn.choices(words, k=70))
                file.write(json.dumps({"text": text}) + "\n")
    with (work / "talks.jsonl").open("w") as file:
        for a in range(10):
            for b in range(10):
                talk = [("user", f"What is {a} + {b}?"), ("assistant", f"It is {a + b}.")]
                messages = [{"role": role, "content": content} for role, content in talk]
                file.write(json.dumps({"messages": messages}) + "\n")


def measure(work: Path, source: Path, quick: bool) -> dict[str, Any]:
    """Run the commands in a folder with the package of one tree."""
    found: dict[str, Any] = {}

    def moefy(command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "moefy", *command.split()],
            cwd=work,
            env=os.environ
            | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            print(f"{source}: moefy {command}: {done.stderr[-500:]}", file=sys.stderr)
        return done.stdout

    def converts(name: str, options: str, model: str = "src") -> None:
        out = name.replace(" ", "-")
        printed = moefy(f"convert {model} {out} {options} --json")
        found[f"convert {name}: weights"] = weights(work / out)
        found[f"convert {name}: --json"] = (
            {**json.loads(printed), "folder": out} if printed else None
        )

    split = f"--experts 8 --active 4 {TINY}"
    for partition in PARTITIONS:
        converts(f"partition {partition}", f"{split} --partition {partition}")
    for router in ROUTERS:
        converts(f"router {router}", f"{split} --router {router}")
    for repair in REPAIRS:
        converts(
            f"repair {repair}", f"{split} --partition random --router random --repair {repair}"
        )
    for target, shared in (("mixtral", 0), ("glm4_moe", 2), ("granitemoe", 0)):
        converts(f"target {target}", f"{split} --shared {shared} --target {target}")
    converts("pruned", f"--experts 8 --active 4 --shared 4 {TINY}")
    moe = "partition-alternating"
    moefy("prepare text corpus --tokenizer src --workers 1")
    for shard in sorted((work / "corpus").rglob("*.bin")):
        # train.bin; an earlier version named it train-00000.bin
        found[f"prepare {shard.parent.name}/{shard.stem.partition('-')[0]}"] = digest(shard)
    runs = {
        "plain": f"train {moe} trained {TRAIN}",
        "corpus": f"train {moe} trained-corpus {TRAIN.replace('text', 'corpus')}",
        "teacher": f"train {moe} trained-teacher {TRAIN} --teacher src",
        "dynamic": f"train {moe} trained-dynamic {TRAIN} --teacher src --mixture DynamicUniform"
        " --set mixture_interval_steps=4",
        "lora": f"train {moe} trained-lora {TRAIN} --set lora.rank=2",
        "tune": f"tune {moe} tuned {TUNE}",
        "tune balanced": f"tune {moe} tuned-balanced {TUNE} --set router=balanced",
        "tune lora": f"tune {moe} tuned-lora {TUNE} --set lora_rank=2",
    }
    for name, command in runs.items():
        moefy(command)
        out = work / command.split()[2]
        found[f"{name}: losses"] = losses(out / "log.jsonl")
        found[f"{name}: weights"] = weights(out)
    for name, command in {
        "eval": f"eval src {moe} trained --data text --windows 4 --sequence-length 64 --json",
    }.items():
        found[name] = without_times(json.loads(moefy(command) or "null"))
    if not quick:
        converts("default", "", "smollm2-135m")
        printed = moefy("eval smollm2-135m default --windows 2 --json")
        found["eval default"] = without_times(json.loads(printed or "null"))
    return found


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def weights(folder: Path) -> str | None:
    """Return the SHA-256 of a model's weights, None where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    return digest(files[0]) if len(files) == 1 else None


def losses(log: Path) -> list[Any] | None:
    """Return a log's losses, without times."""
    if not log.is_file():
        return None
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [
        [line.get(key) for key in ("step", "loss", "heldout_loss", "grad_norm")] for line in lines
    ]


def without_times(value: Any) -> Any:
    """Return an evaluation without what a clock said."""
    if isinstance(value, dict):
        return {
            key: without_times(inner)
            for key, inner in value.items()
            if not key.endswith(("_s", "tokens_per_s", "per_s"))
        }
    return [without_times(inner) for inner in value] if isinstance(value, list) else value


def relative(old: Any, new: Any) -> float:
    """Return the largest relative difference of two values, infinite where they are unlike."""
    if isinstance(old, float) and isinstance(new, int | float):
        return abs(old - new) / max(abs(old), 1e-2)  # a KL of 1e-5 is rounding itself
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() <= new.keys():
        return max((relative(old[key], new[key]) for key in old), default=0.0)
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return max((relative(a, b) for a, b in zip(old, new, strict=True)), default=0.0)
    return 0.0 if old == new else float("inf")


def brief(value: Any) -> str:
    """Return a value in a few characters."""
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."


if __name__ == "__main__":
    main()
