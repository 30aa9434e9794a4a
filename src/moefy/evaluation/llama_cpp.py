"""Speed in llama.cpp, through the package xllamacpp, in a process of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from moefy.checkpoint.gguf import export_gguf
from moefy.checkpoint.load import load_tokenizer
from moefy.errors import CheckpointError, UsageError
from moefy.evaluation.contenders import Contender, random_model
from moefy.evaluation.timing import PHASES, Seconds, Setting, random_prompt
from moefy.progress import Progress, ProgressFn

GGUF_DTYPES = {"float32": "f32", "bfloat16": "bf16"}

# llama.cpp writes to stderr from C, and the memory of a model comes back when the process ends
_RUN = """
import json, sys, xllamacpp
ask = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = ask["file"], ask["context"], 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = ask["threads"]
if ask["float32"]:
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
answer = xllamacpp.Server(params).handle_completions(
    {"prompt": ask["ids"], "n_predict": ask["count"], "temperature": 0, "ignore_eos": True,
     "cache_prompt": False}
)
print(json.dumps(answer["timings"]))
"""


def check_installed() -> None:
    """Refuse what cannot be measured.

    Raises:
        UsageError: xllamacpp is not installed.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise UsageError(
            "--runtime llama.cpp needs the package xllamacpp: pip install 'moefy[gguf]' xllamacpp"
        )


def in_llama_cpp(
    contenders: list[Contender], setting: Setting, tokenizer: Path, report: ProgressFn
) -> Seconds:
    """Export every model to a temporary GGUF file and measure there, in turn."""
    dtype = GGUF_DTYPES[str(setting.dtype).removeprefix("torch.")]
    seconds: Seconds = {}
    with tempfile.TemporaryDirectory(prefix="moefy-speed-") as work_folder:
        files = []
        for i, contender in enumerate(contenders):
            folder = contender.folder
            if folder is None:
                folder = Path(work_folder) / f"model-{i}"
                random_model(contender.config, setting.dtype).cpu().save_pretrained(folder)
                load_tokenizer(tokenizer).save_pretrained(folder)
            file = Path(work_folder) / f"{i}.gguf"
            files.append(export_gguf(folder, file, dtype=dtype, report=report))
        done, total = 0, setting.rounds * len(contenders)
        for _ in range(setting.rounds):
            for i, contender in enumerate(contenders):
                report(Progress("measure speed", done, total, contender.name))
                ids = random_prompt(contender.config["vocab_size"], 1, setting.prompt_tokens)
                found = _seconds(
                    files[i],
                    ids[0].tolist(),
                    new_tokens=setting.new_tokens,
                    threads=torch.get_num_threads(),
                    float32=setting.dtype == torch.float32,
                )
                for phase, elapsed_s in zip(PHASES, found, strict=True):
                    seconds.setdefault((i, phase, 1), {}).setdefault(None, []).append(elapsed_s)
                done += 1
        report(Progress("measure speed", done, total))
    return seconds


def _seconds(
    file: Path, ids: list[int], *, new_tokens: int, threads: int, float32: bool
) -> tuple[float, float]:
    """Return the seconds of the prompt's pass and of one decoded token.

    Args:
        file: a GGUF file.
        ids: the prompt.
        new_tokens: to decode.
        threads: of the CPU.
        float32: keep the cache in float32, as transformers does; otherwise in float16.

    Raises:
        CheckpointError: llama.cpp cannot run the file; its last words are in the message.
    """
    context = (len(ids) + new_tokens + 256) // 256 * 256
    ask = {
        "file": str(file),
        "ids": ids,
        "count": new_tokens,
        "context": context,
        "threads": threads,
        "float32": float32,
    }
    done = subprocess.run(
        [sys.executable, "-c", _RUN],
        input=json.dumps(ask),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        raise CheckpointError(
            f"llama.cpp cannot run {file.name}: {words[-1] if words else 'no reason'}"
        )
    timings = json.loads(done.stdout.splitlines()[-1])
    return timings["prompt_ms"] / 1e3, timings["predicted_per_token_ms"] / 1e3
