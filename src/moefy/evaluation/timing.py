"""One model timed: in transformers with every expert implementation, or in llama.cpp."""

from __future__ import annotations

import copy
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from moefy.checkpoint.cost import ffn_shape
from moefy.checkpoint.gguf import export_gguf
from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.errors import CheckpointError
from moefy.experts.layers import LEAN, VIEWS, register
from moefy.hardware import device, synchronise
from moefy.progress import ProgressFn

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
GGUF_DTYPES = {"float32": "f32", "bfloat16": "bf16"}
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

    def load(self, dtype: str) -> Any:
        """Return the model on the device."""
        kind = getattr(torch, dtype)
        if self.folder is None:
            return random_model(self.config, kind)
        return load_model(self.folder, dtype=kind).to(device())


Key = tuple[int, Phase, int]  # contender, phase, batch
Seconds = defaultdict[Key, dict[str, list[float]]]
"""Seconds of one forward pass, one value per round, by implementation of the experts ("": none)."""


def no_seconds() -> Seconds:
    """Return an empty table that grows where it is written."""
    return defaultdict(lambda: defaultdict(list))


def one_round(
    contender: Contender,
    batches: Sequence[int],
    sizes: tuple[int, int],  # tokens of the prompt, and new ones
    dtype: str,
    seconds: Seconds,
    idx: int,
) -> None:
    """Time both phases once, with every implementation that is still measured."""
    network, config, short = contender.load(dtype), contender.config, random_prompt(2, 1, 8)
    for batch, phase in itertools.product(batches, PHASES):
        token = ids = random_prompt(config["vocab_size"], batch, sizes[0])
        found, cache, failure = seconds[idx, phase, batch], None, None
        if phase == "decode":  # what prefills fastest fills the cache
            _use(network, _kept(seconds[idx, "prefill", batch])[0])
            cache, token, _ = prefill(network, ids)
        for name in _kept(found) or _implementations(config, token.numel(), network.dtype):
            try:
                _use(network, name)
                # the first run of an implementation is slow
                decode(network, *prefill(network, short)[:2], 1)
                if phase == "prefill":
                    elapsed_s = prefill(network, ids)[2]
                else:  # decoding appends to the cache: each implementation gets a copy
                    elapsed_s = decode(network, copy.deepcopy(cache), token, sizes[1]) / sizes[1]
            except Exception as error:  # what the implementations raise has no common type
                failure = error
            else:
                found[name].append(elapsed_s)
        if failure is not None and not found:  # one that does not work here is left out
            raise failure


def _kept(measured: dict[str, list[float]]) -> list[str]:
    """Return the implementations worth another round, the fastest first."""
    medians = {name: statistics.median(values) for name, values in measured.items()}
    best = min(medians.values(), default=0.0)
    kept = [name for name, value in medians.items() if value <= _SLOWER * best]
    return sorted(kept, key=lambda name: medians[name])


def _implementations(config: Mapping[str, Any], tokens: int, dtype: torch.dtype) -> list[str]:
    """Return what transformers can be asked for; some work on an accelerator only."""
    shape = ffn_shape(config)
    if not shape.experts:
        return [""]
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    left_out = {LEAN}  # made for the backward pass
    ours = register(VIEWS)
    copied = tokens * shape.active * 3 * shape.size * config["hidden_size"] * dtype.itemsize
    left_out |= {ours} if tokens > 1 else set()  # then ours is grouped_mm
    left_out |= {"batched_mm"} if copied > _COPIED_BYTES else set()
    names = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
    return [name for name in names if name not in left_out]


def _use(network: Any, implementation: str) -> None:
    if implementation:  # a dense model has none
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


def llama_cpp_round(
    contender: Contender,
    sizes: tuple[int, int],
    dtype: str,
    tokenizer: Path,
    work: Path,
    report: ProgressFn,
) -> tuple[float, float]:
    """Return the seconds of the prompt's pass and of one decoded token in llama.cpp, on the CPU.

    The first round exports the model to a GGUF file in `work`; with random weights it gets the
    tokenizer. `sizes` are the tokens of the prompt and the new ones.

    Raises:
        CheckpointError: llama.cpp cannot run the file; its last words are in the message.
    """
    file = work / f"{work.name}.gguf"
    if not file.is_file():
        folder = contender.folder or work
        if contender.folder is None:
            contender.load(dtype).cpu().save_pretrained(folder)
            load_tokenizer(tokenizer).save_pretrained(folder)
        work.mkdir(exist_ok=True)
        export_gguf(folder, file, dtype=GGUF_DTYPES[dtype], report=report)
    ask = {
        "file": str(file),
        "ids": random_prompt(contender.config["vocab_size"], 1, sizes[0])[0].tolist(),
        "count": sizes[1],
        # llama.cpp pads the context to whole blocks of 256
        "context": (sum(sizes) + 256) // 256 * 256,
        "threads": torch.get_num_threads(),
        # the cache as in transformers; llama.cpp's own choice is float16
        "float32": dtype == "float32",
    }
    command = [sys.executable, "-c", _RUN]
    text = json.dumps(ask)
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if line.strip()]
        raise CheckpointError(
            f"llama.cpp cannot run {file.name}: {words[-1] if words else 'no reason'}"
        )
    timings = json.loads(done.stdout.splitlines()[-1])
    return timings["prompt_ms"] / 1e3, timings["predicted_per_token_ms"] / 1e3
