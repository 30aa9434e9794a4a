"""Models timed in turn, in llama.cpp or in transformers with every expert implementation."""

from __future__ import annotations

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from moefy.checkpoint.cost import cost, ffn_shape
from moefy.checkpoint.gguf import export_gguf
from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.errors import CheckpointError
from moefy.experts.layers import LEAN, VIEWS, register
from moefy.hardware import available_bytes, device, synchronise
from moefy.progress import Progress, ProgressFn

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
GGUF_DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
_SLOWER = 1.25  # an implementation this many times slower than the best is not measured again
_COPIED_BYTES = 2**30  # batched_mm, which copies every token's experts, may copy this much

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


@dataclass(frozen=True)
class Contender:
    """A model whose speed is measured."""

    name: str
    config: Mapping[str, Any]  # of config.json
    folder: Path | None = None  # None for random weights

    def load(self, dtype: torch.dtype) -> Any:
        """Return the model on the device."""
        if self.folder is None:
            return random_model(self.config, dtype)
        return load_model(self.folder, dtype=dtype).to(device())


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    batches: tuple[int, ...]  # sequences at once
    prompt_tokens: int  # of each sequence
    new_tokens: int  # of each sequence
    rounds: int  # times that everything is measured
    dtype: torch.dtype  # of weights and computation


_Key = tuple[int, Phase, int]  # contender, phase, batch
Seconds = dict[_Key, dict[str | None, list[float]]]
"""Seconds of one forward pass, one value per round, by implementation of the experts."""


def _in_turn(
    contenders: list[Contender], rounds: int, measure: Callable[[int], None], report: ProgressFn
) -> None:
    """Measure every contender in every round, so that a busy machine slows all of them down."""
    total = rounds * len(contenders)
    for done in range(total):
        idx = done % len(contenders)
        report(Progress("measure speed", done, total, contenders[idx].name))
        measure(idx)
    report(Progress("measure speed", total, total))


def in_transformers(contenders: list[Contender], setting: Setting, report: ProgressFn) -> Seconds:
    """Time everything in transformers, on the accelerator if there is one."""
    seconds: Seconds = {}
    params = sum(cost(contender.config).total_params for contender in contenders)
    keep_all = 2 * params * setting.dtype.itemsize <= available_bytes()
    loaded: dict[int, Any] = {}

    def measure(idx: int) -> None:
        if idx not in loaded:
            if not keep_all:
                loaded.clear()
            loaded[idx] = contenders[idx].load(setting.dtype)
        for batch in setting.batches:
            _one_round(loaded[idx], idx, contenders[idx].config, batch, setting, seconds)

    _in_turn(contenders, setting.rounds, measure, report)
    return seconds


def _one_round(
    network: Any,
    idx: int,
    config: Mapping[str, Any],
    batch: int,
    setting: Setting,
    seconds: Seconds,
) -> None:
    """Time both phases once, with every implementation that is still measured."""
    ids = random_prompt(config["vocab_size"], batch, setting.prompt_tokens)
    short = random_prompt(2, 1, 8)
    cache, token = None, ids
    for phase in PHASES:
        measured = seconds.setdefault((idx, phase, batch), {})
        if phase == "decode":  # what prefills fastest fills the cache
            _use(network, _kept(seconds[idx, "prefill", batch])[0])
            cache, token, _ = prefill(network, ids)
        failure = None
        for name in _kept(measured) or _implementations(config, token.numel(), setting.dtype):
            try:
                _use(network, name)
                # the first run of an implementation is slow
                decode(network, *prefill(network, short)[:2], 1)
                if phase == "prefill":
                    elapsed_s = prefill(network, ids)[2]
                else:  # decoding appends to the cache: each implementation gets a copy
                    elapsed_s = decode(network, copy.deepcopy(cache), token, setting.new_tokens)
                    elapsed_s /= setting.new_tokens
            except Exception as error:  # what the implementations raise has no common type
                failure = error
            else:
                measured.setdefault(name, []).append(elapsed_s)
        if failure is not None and not measured:  # one that does not work here is left out
            raise failure


def _kept(measured: dict[str | None, list[float]]) -> list[str | None]:
    """Return the implementations worth another round, the fastest first."""
    medians = {name: statistics.median(values) for name, values in measured.items()}
    best = min(medians.values(), default=0.0)
    kept = [name for name, value in medians.items() if value <= _SLOWER * best]
    return sorted(kept, key=lambda name: medians[name])


def _implementations(
    config: Mapping[str, Any], tokens: int, dtype: torch.dtype
) -> list[str | None]:
    """Return what transformers can be asked for; some work on an accelerator only."""
    shape = ffn_shape(config)
    if not shape.experts:
        return [None]
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ours = register(VIEWS)
    names: list[str | None] = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    names.remove(LEAN)  # made for the backward pass
    if tokens > 1:  # then ours is grouped_mm
        names.remove(ours)
    copied = tokens * shape.active * 3 * shape.size * config["hidden_size"] * dtype.itemsize
    return [name for name in names if name != "batched_mm" or copied <= _COPIED_BYTES]


def _use(network: Any, implementation: str | None) -> None:
    if implementation is not None:  # a dense model has none
        network.set_experts_implementation(implementation)


def random_prompt(vocab_size: int, batch: int, tokens: int) -> Int[Tensor, "batch tokens"]:
    """Return token ids, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (batch, tokens), generator=generator).to(device())


def random_model(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Return a model with transformers' initial weights, in evaluation mode, on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made = AutoConfig.for_model(**config)
    return AutoModelForCausalLM.from_config(made, dtype=dtype).eval().to(device())


@torch.inference_mode()
def prefill(network: Any, ids: Int[Tensor, "batch tokens"]) -> tuple[Any, Tensor, float]:
    """Return the cache, the next tokens [batch, 1] and the seconds."""
    synchronise()
    started = time.perf_counter()
    out = network(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    synchronise()
    return out.past_key_values, token, time.perf_counter() - started


@torch.inference_mode()
def decode(network: Any, cache: Any, token: Int[Tensor, "batch 1"], count: int) -> float:
    """Decode greedily and return the seconds."""
    synchronise()
    started = time.perf_counter()
    for _ in range(count):
        token = network(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    synchronise()
    return time.perf_counter() - started


def in_llama_cpp(
    contenders: list[Contender], setting: Setting, tokenizer: Path, report: ProgressFn
) -> Seconds:
    """Export every model to a temporary GGUF file and time it in llama.cpp, on the CPU.

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
        for idx, contender in enumerate(contenders):
            folder = contender.folder
            if folder is None:
                folder = Path(work_folder) / f"model-{idx}"
                contender.load(setting.dtype).cpu().save_pretrained(folder)
                load_tokenizer(tokenizer).save_pretrained(folder)
            file = Path(work_folder) / f"{idx}.gguf"
            files.append(export_gguf(folder, file, dtype=GGUF_DTYPES[setting.dtype], report=report))

        def measure(idx: int) -> None:
            found = _llama_cpp_seconds(files[idx], contenders[idx].config["vocab_size"], setting)
            for phase, elapsed_s in zip(PHASES, found, strict=True):
                seconds.setdefault((idx, phase, 1), {}).setdefault(None, []).append(elapsed_s)

        _in_turn(contenders, setting.rounds, measure, report)
    return seconds


def _llama_cpp_seconds(file: Path, vocab_size: int, setting: Setting) -> tuple[float, float]:
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
