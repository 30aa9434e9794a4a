"""Tokens per second of models side by side, in transformers or in llama.cpp."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from moefy.checkpoint.cost import ffn_shape
from moefy.checkpoint.families import has_qk_norm
from moefy.checkpoint.gguf import export_gguf
from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.source import resolve
from moefy.errors import UsageError
from moefy.evaluation.llama_cpp import llama_cpp_seconds
from moefy.experts.layers import VIEWS, register
from moefy.hardware import device, synchronise
from moefy.progress import Progress, ProgressFn, silent

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
_DTYPES = {
    "transformers": ("float32", "bfloat16"),
    "llama.cpp": ("float32", "bfloat16", "q8_0"),
}
_GGUF_NAMES = {"float32": "f32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Speed:
    """One model in one phase at one batch size."""

    model: str  # its name
    phase: Phase
    batch: int  # sequences at once
    tokens_per_s: float  # of all sequences together; median
    of_active_size: float | None  # that over the dense model's of the same active size
    implementation: str | None  # of the experts, the fastest; None where there is no choice
    tried: dict[str, float]  # tokens_per_s by implementation


@dataclass(frozen=True)
class SpeedComparison:
    """What `measure_speed` found."""

    runtime: str
    device: str  # "cpu", or the accelerator's name
    threads: int  # of the CPU
    dtype: str  # of weights and computation
    prompt_tokens: int  # of each sequence
    new_tokens: int  # of each sequence
    speeds: list[Speed]  # by phase, then batch, then model


@dataclass(frozen=True)
class Contender:
    """A model whose speed is measured."""

    name: str
    config: Mapping[str, Any]  # of config.json
    folder: Path | None = None  # None for random weights

    @property
    def size(self) -> int:
        """Neurons that run for one token."""
        return ffn_shape(self.config).running

    def load(self, dtype: str) -> Any:
        """Return the model on the device."""
        kind = getattr(torch, dtype)
        if self.folder is None:
            return random_model(self.config, kind)
        return load_model(self.folder, dtype=kind).to(device())


Seconds = defaultdict[tuple[Phase, int, int], dict[str, list[float]]]
"""By phase, batch and contender: of one pass, by implementation of the experts ("": none)."""


def measure_speed(
    models: str | Path | Sequence[str | Path],
    *,
    batches: Sequence[int] | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    rounds: int = 3,
    dtype: str = "float32",
    runtime: str = "transformers",
    names: Sequence[str] | None = None,
    report: ProgressFn = silent,
) -> SpeedComparison:
    """Measure prefill and greedy decoding of models in turn.

    For every active size among the converted models, a dense model of that size is made and
    measured too (random weights: speed does not depend on them). The prompt is random tokens. In
    transformers its expert implementations `eager` and `grouped_mm` and our `expert_views` are
    tried, and the fastest counts, for each phase and batch size. Medians over the rounds, the
    models taking turns in each.

    Args:
        models: model folders, or anything `convert` takes as a source.
        batches: sequences at once; None for 1 and 8, in llama.cpp for 1, which is all it takes.
        prompt_tokens: of each sequence.
        new_tokens: decoded after it.
        rounds: times that everything is measured.
        dtype: "float32" or "bfloat16", of weights and computation; in llama.cpp also "q8_0", of
            weights.
        runtime: "transformers", on the accelerator if there is one, or "llama.cpp", on the CPU.
        names: shown instead of `models`.
        report: told about progress.

    Raises:
        UsageError: a model or a number is not usable, or the runtime is not installed.
        CheckpointError: llama.cpp cannot run a file; its last words are in the message.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    batches = batches or ((1,) if runtime == "llama.cpp" else (1, 8))
    if not given or min(*batches, prompt_tokens, new_tokens, rounds) < 1:
        raise UsageError(
            "name at least one model, and give at least 1 for --batch, --prompt-tokens, "
            "--new-tokens and --rounds"
        )
    _check(dtype, runtime, batches)
    folders = [resolve(model, report=report) for model in given]
    contenders = contenders_of(folders, list(names) if names else [str(model) for model in given])
    sizes = (prompt_tokens, new_tokens)
    for contender in contenders:
        room = contender.config.get("max_position_embeddings") or sum(sizes)
        if sum(sizes) > room:
            raise UsageError(
                f"{contender.name} has room for {room} tokens, not for {prompt_tokens} of prompt "
                f"and {new_tokens} new ones: lower --prompt-tokens or --new-tokens"
            )
    seconds: Seconds = defaultdict(lambda: defaultdict(list))
    with tempfile.TemporaryDirectory(prefix="moefy-speed-") as work:
        for idx in _turns(contenders, rounds, report):
            if runtime == "llama.cpp":
                file = Path(work) / f"{idx}.gguf"
                if not file.is_file():
                    export_contender(contenders[idx], file, dtype, folders[0], report)
                vocab_size = contenders[idx].config["vocab_size"]
                ids = _random_prompt(vocab_size, 1, prompt_tokens)[0].tolist()
                found = llama_cpp_seconds(file, ids, new_tokens, float32=dtype == "float32")
                for phase, elapsed_s in zip(PHASES, found, strict=True):
                    seconds[phase, 1, idx][""].append(elapsed_s)
            else:
                _round(contenders[idx], batches, sizes, dtype, seconds, idx)
    return SpeedComparison(
        runtime=runtime,
        device=torch.cuda.get_device_name() if device().type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        dtype=dtype,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        speeds=_speeds(contenders, prompt_tokens, seconds),
    )


def relative_speeds(
    contenders: Sequence[Contender],
    *,
    prompt_tokens: int,
    new_tokens: int,
    rounds: int = 3,
    report: ProgressFn = silent,
) -> list[dict[Phase, float]]:
    """Return each model's tokens per second over the first one's, by phase.

    One sequence, float32, in transformers; otherwise as `measure_speed`.
    """
    seconds: Seconds = defaultdict(lambda: defaultdict(list))
    for idx in _turns(contenders, rounds, report):
        _round(contenders[idx], (1,), (prompt_tokens, new_tokens), "float32", seconds, idx)
    fastest = {key: min(map(statistics.median, tried.values())) for key, tried in seconds.items()}
    return [
        {phase: fastest[phase, 1, 0] / fastest[phase, 1, idx] for phase in PHASES}
        for idx in range(len(contenders))
    ]


def _turns(contenders: Sequence[Contender], rounds: int, report: ProgressFn) -> Iterator[int]:
    """Iterate over the contenders, round by round: a busy machine slows all of them down."""
    turns = rounds * len(contenders)
    for done in range(turns):
        idx = done % len(contenders)
        report(Progress("measure speed", done, turns, contenders[idx].name))
        yield idx
    report(Progress("measure speed", turns, turns))


def _check(dtype: str, runtime: str, batches: Sequence[int]) -> None:
    if runtime not in _DTYPES:
        raise UsageError(f"--runtime {runtime!r}: allowed are {' and '.join(_DTYPES)}")
    if dtype not in _DTYPES[runtime]:
        allowed = " and ".join(_DTYPES[runtime])
        raise UsageError(f"--dtype {dtype!r}: allowed are {allowed} in {runtime}")
    if runtime == "llama.cpp" and set(batches) != {1}:
        raise UsageError("--runtime llama.cpp is measured with one sequence: pass --batch 1")


def contenders_of(folders: list[Path], names: list[str]) -> list[Contender]:
    """Return the models, and before the first of every active size a dense model of that size.

    Raises:
        ArchitectureError: a model that `cost` cannot count.
    """
    given = [
        Contender(name, read_config(folder), folder)
        for name, folder in zip(names, folders, strict=True)
    ]
    # the last that is written is the first of its size
    first = {each.size: each for each in reversed(given) if ffn_shape(each.config).experts}
    found: list[Contender] = []
    for each in given:
        if first.get(each.size) is each:
            size = f", {each.size} neurons" if len(first) > 1 else ""
            made = dense_of_active_size(each.config)
            found.append(Contender(f"dense (same active size{size})", made))
        found.append(each)
    return found


def dense_of_active_size(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a dense model with as many neurons as a converted model runs per token.

    Multipliers and windows are left out: they change its speed by less than can be measured.
    """
    shape = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
    shape += " vocab_size tie_word_embeddings max_position_embeddings"
    made = {key: config[key] for key in shape.split() if config.get(key) is not None}
    made["model_type"] = "qwen3" if has_qk_norm(config) else "llama"
    made["architectures"] = [f"{made['model_type'].capitalize()}ForCausalLM"]
    made["attention_bias"] = bool(config.get("attention_bias"))
    return {**made, "intermediate_size": ffn_shape(config).running}


def _speeds(contenders: list[Contender], prompt_tokens: int, seconds: Seconds) -> list[Speed]:
    # by active neurons, the dense model that was made for comparison
    made = {each.size: idx for idx, each in enumerate(contenders) if each.folder is None}
    rates = {
        (phase, batch, idx): {
            name: batch * (prompt_tokens if phase == "prefill" else 1) / statistics.median(values)
            for name, values in measured.items()
        }
        for (phase, batch, idx), measured in seconds.items()
    }
    rows = []
    for phase, batch, idx in sorted(rates, key=lambda key: (PHASES.index(key[0]), *key[1:])):
        found = rates[phase, batch, idx]
        best = max(found, key=found.__getitem__)
        same = made.get(contenders[idx].size)
        if same is None and len(made) == 1:  # the whole dense model, beside a single size
            (same,) = made.values()
        rows.append(
            Speed(
                model=contenders[idx].name,
                phase=phase,
                batch=batch,
                tokens_per_s=found[best],
                of_active_size=None
                if same is None
                else found[best] / rates[phase, batch, same][""],
                implementation=best or None,
                tried={name: rate for name, rate in found.items() if name},
            )
        )
    return rows


def _round(
    contender: Contender,
    batches: Sequence[int],
    sizes: tuple[int, int],  # tokens of the prompt, and new ones
    dtype: str,
    seconds: Seconds,
    idx: int,
) -> None:
    """Time both phases once, with every implementation of the experts."""
    network, config = contender.load(dtype), contender.config
    for batch in batches:
        ids = _random_prompt(config["vocab_size"], batch, sizes[0])
        names = ["eager"] if ffn_shape(config).experts else [""]
        # torch refuses grouped products of rows that are no multiple of 16 bytes
        row_bytes = math.gcd(ffn_shape(config).size, config["hidden_size"]) * network.dtype.itemsize
        if names[0] and row_bytes % 16 == 0:
            # with several tokens VIEWS is grouped_mm
            names += ["grouped_mm", register(VIEWS)] if batch == 1 else ["grouped_mm"]
        for name in names:
            if name:  # a dense model has none
                network.set_experts_implementation(name)
            # the first run of an implementation is slow
            decode(network, *prefill(network, ids[:, :8])[:2], 1)
            cache, token, elapsed_s = prefill(network, ids)
            if name != VIEWS:
                seconds["prefill", batch, idx][name].append(elapsed_s)
            elapsed_s = decode(network, cache, token, sizes[1]) / sizes[1]
            seconds["decode", batch, idx][name].append(elapsed_s)


def _random_prompt(vocab_size: int, batch: int, tokens: int) -> Int[Tensor, "batch tokens"]:
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


def export_contender(
    contender: Contender, file: Path, dtype: str, tokenizer: Path, report: ProgressFn = silent
) -> None:
    """Write a contender as a GGUF file, with the tokenizer of a folder where it has none."""
    with tempfile.TemporaryDirectory(dir=file.parent) as made:
        folder = contender.folder or Path(made)
        if contender.folder is None:
            stored = dtype if dtype == "float32" else "bfloat16"
            contender.load(stored).cpu().save_pretrained(folder)
            load_tokenizer(tokenizer).save_pretrained(folder)
        export_gguf(folder, file, dtype=_GGUF_NAMES.get(dtype, dtype), report=report)
