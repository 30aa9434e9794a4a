"""Models timed in llama.cpp, in turn, through the package xllamacpp in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from moefy.checkpoint.gguf import export_gguf
from moefy.checkpoint.load import load_tokenizer
from moefy.errors import CheckpointError
from moefy.evaluation.timing import PHASES, Contender, Seconds, Setting, random_prompt
from moefy.progress import Progress, ProgressFn

GGUF_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}

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


def in_llama_cpp(
    contenders: list[Contender], setting: Setting, tokenizer: Path, report: ProgressFn
) -> Seconds:
    """Export every model to a temporary GGUF file and time it there.

    Args:
        contenders: models; those with random weights get the tokenizer.
        setting: with one sequence at once.
        tokenizer: folder of the tokenizer.
        report: told about progress.

    Raises:
        CheckpointError: llama.cpp cannot run a file; its last words are in the message.
    """
    seconds: Seconds = {}
    with tempfile.TemporaryDirectory(prefix="moefy-speed-") as work_folder:
        files = []
        for i, contender in enumerate(contenders):
            folder = contender.folder
            if folder is None:
                folder = Path(work_folder) / f"model-{i}"
                contender.load(setting.dtype).cpu().save_pretrained(folder)
                load_tokenizer(tokenizer).save_pretrained(folder)
            file = Path(work_folder) / f"{i}.gguf"
            files.append(export_gguf(folder, file, dtype=GGUF_DTYPES[setting.dtype], report=report))
        done, total = 0, setting.rounds * len(contenders)
        for _ in range(setting.rounds):
            for i, contender in enumerate(contenders):
                report(Progress("measure speed", done, total, contender.name))
                found = _seconds(files[i], contender.config["vocab_size"], setting)
                for phase, elapsed_s in zip(PHASES, found, strict=True):
                    seconds.setdefault((i, phase, 1), {}).setdefault(None, []).append(elapsed_s)
                done += 1
        report(Progress("measure speed", done, total))
    return seconds


def _seconds(file: Path, vocab_size: int, setting: Setting) -> tuple[float, float]:
    """Return the seconds of the prompt's pass and of one decoded token."""
    ask = {
        "file": str(file),
        "ids": random_prompt(vocab_size, 1, setting.prompt_tokens)[0].tolist(),
        "count": setting.new_tokens,
        # llama.cpp pads the context to whole blocks of 256
        "context": (setting.prompt_tokens + setting.new_tokens + 256) // 256 * 256,
        "threads": torch.get_num_threads(),
        # the cache as in transformers; llama.cpp's own choice is float16
        "float32": setting.dtype == torch.float32,
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
