"""Tokens per second of models side by side, in transformers or in llama.cpp."""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from moefy.checkpoint.cost import cost, ffn_shape
from moefy.checkpoint.expert_layers import register
from moefy.checkpoint.quantise import QUANTISED
from moefy.errors import UsageError
from moefy.evaluation.contenders import GGUF_NAMES, Contender, contenders_of, gguf_file
from moefy.evaluation.llama_cpp import llama_cpp_seconds
from moefy.evaluation.vllm import require_vllm, vllm_seconds
from moefy.hardware import device, fastest, synchronise
from moefy.progress import Progress, ProgressFn, silent
from moefy.split import PRESETS

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
_DTYPES = {
    "transformers": ("float32", "bfloat16"),
    "llama.cpp": (*GGUF_NAMES, *QUANTISED),
    "vllm": ("float32", "bfloat16"),
}
_USUAL_DTYPE = {"transformers": "float32", "llama.cpp": "q8_0", "vllm": "bfloat16"}
_QUICK_SIZES, _QUICK_LAYERS = (256, 16), 4


@dataclass(frozen=True)
class Speed:
    """One model in one phase at one batch size; ratios are medians of those within a round."""

    runtime: str
    dtype: str  # of the weights
    model: str  # its name
    phase: Phase
    batch: int  # sequences at once
    tokens_per_s: float  # of all sequences together; median
    of_dense: float | None  # over the first dense model's
    of_active_size: float | None  # over the dense model's of the same active size
    spread: tuple[float, float]  # the lowest and highest ratio of a round; of_dense if there is one
    implementation: str | None  # of the experts, the fastest; None where there is no choice
    tried: dict[str, float]  # tokens_per_s by implementation
    flops_per_s: float  # of matrix products and attention
    bytes_per_s: float | None  # weights that are read; None for prefill and several sequences


@dataclass(frozen=True)
class SpeedComparison:
    """What `measure_speed` found."""

    device: str  # "cpu", or the accelerator's name
    threads: int  # of the CPU
    prompt_tokens: int  # of each sequence
    new_tokens: int  # of each sequence
    rounds: int
    layers: int | None  # that were measured, and scaled to all of them; None for all
    read_bytes_per_s: float  # at which the device sums up a large tensor
    speeds: list[Speed]  # by runtime, dtype, phase, batch, then model


Key = tuple[Phase, int]  # with the batch size
Seconds = dict[Key, dict[str, float]]
"""Of one pass, by implementation of the experts ("": none)."""
Rounds = Sequence[Mapping[int, Seconds]]
"""By round and contender."""
How = tuple[str, str, Sequence[int], tuple[int, int]]
"""Runtime, dtype, batch sizes, and the tokens of a prompt and behind it."""


def measure_speed(
    models: str | Path | Sequence[str | Path],
    *,
    batches: Sequence[int] | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    rounds: int = 3,
    runtime: str | None = None,
    dtype: str | None = None,
    splits: Sequence[str] | None = None,
    layers: int | None = None,
    quick: bool = False,
    names: Sequence[str] | None = None,
    work: Path | None = None,
    report: ProgressFn = silent,
) -> SpeedComparison:
    """Measure prefill and greedy decoding of models in turn.

    A dense model needs no weights, since speed does not depend on them: they are random. Where no
    converted model is named, splits of the first dense one are measured too, and beside every
    active size a dense model of that size. The prompt is random tokens. In transformers its expert
    implementations `eager` and `grouped_mm` and our `lean` are tried, and the fastest
    counts, for each phase and batch size. A short pass runs up to three times, and the fastest
    counts. Medians over the rounds, the models taking turns in each.

    Args:
        models: model folders, config.json files, names that `inspect` knows, or anything else that
            `convert` takes as a source.
        batches: sequences at once; None for 1, which is all that llama.cpp takes.
        prompt_tokens: of each sequence.
        new_tokens: decoded after it.
        rounds: times that everything is measured.
        runtime: "transformers", on the accelerator if there is one, "llama.cpp", on the CPU, "vllm"
            or "vllm=PYTHON", that of its environment, or several with commas; None for the first
            two where the second is installed and no converted model named.
        dtype: of weights: "float32", "bfloat16", in llama.cpp also "float16" and `QUANTISED`, or
            several with commas; None for float32, and q8_0 in llama.cpp.
        splits: as in "8/16+4" (8 of 16 slices active, 4 of these shared); None for the presets, and
            a half and a quarter of 16 slices.
        layers: random models have 1 layer and then so many, and the time is scaled to all.
        quick: measure a short prompt, the presets alone, and 4 layers of random models of more.
        names: shown instead of `models`.
        work: folder that keeps the GGUF files for the next call; None for a temporary one.
        report: told about progress.

    Raises:
        UsageError: a model or a number is not usable, or the runtime is not installed.
        CheckpointError: llama.cpp cannot run a file; its last words are in the message.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    sizes = _QUICK_SIZES if quick else (prompt_tokens, new_tokens)
    batches = batches or (1,)
    if not given or min(*batches, *sizes, rounds, (layers or 2) - 1) < 1:
        raise UsageError(
            "name at least one model, and give at least 1 for --batch, --prompt-tokens, "
            "--new-tokens and --rounds, and 2 for --layers"
        )
    contenders = contenders_of(given, names, splits or ([*PRESETS] if quick else None), report)
    layers = layers or (_quick_layers(contenders) if quick else None)
    pairs = _runs(runtime, dtype, batches, alone=all(each.folder is None for each in contenders))
    _check_room(contenders, sizes, layers)
    speeds = []
    with tempfile.TemporaryDirectory(prefix="moefy-speed-") as made:
        folder = work or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        for runtime, dtype in pairs:
            how, stage = (runtime, dtype, batches, sizes), f"measure {runtime}, {dtype}"
            seconds = partial(_scaled_seconds, layers=layers, how=how, folder=folder)
            measured = _in_turns(contenders, rounds, seconds, stage, report)
            speeds += _speeds(contenders, runtime, dtype, sizes[0], measured)
    return SpeedComparison(
        device=torch.cuda.get_device_name() if device().type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        prompt_tokens=sizes[0],
        new_tokens=sizes[1],
        rounds=rounds,
        layers=layers,
        read_bytes_per_s=_read_rate(),
        speeds=speeds,
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

    One sequence, in float32, in transformers; the models take turns, and medians count.
    """
    sizes = (prompt_tokens, new_tokens)
    seconds = partial(_transformers_seconds, batches=(1,), sizes=sizes, dtype="float32")
    measured = _in_turns(contenders, rounds, seconds, "measure speed", report)
    return [
        {phase: statistics.median(_ratios(measured, (phase, 1), idx, 0)) for phase in PHASES}
        for idx in range(len(contenders))
    ]


def _in_turns(
    contenders: Sequence[Contender],
    rounds: int,
    seconds: Callable[[Contender], Seconds],
    stage: str,
    report: ProgressFn,
) -> Rounds:
    """Time all contenders in each round: a busy machine slows all of them down.

    Another one begins each round: what is measured at the same place is disturbed alike.
    """
    measured: list[dict[int, Seconds]] = [{} for _ in range(rounds)]
    turns = rounds * len(contenders)
    for done in range(turns):
        number = done // len(contenders)
        idx = (done + 5 * number) % len(contenders)
        report(Progress(stage, done, turns, contenders[idx].name))
        measured[number][idx] = seconds(contenders[idx])
    report(Progress(stage, turns, turns))
    return measured


def _runs(
    runtime: str | None, dtype: str | None, batches: Sequence[int], *, alone: bool
) -> list[tuple[str, str]]:
    """Return the runtimes and dtypes that are measured."""
    runtimes = runtime.split(",") if runtime else ["transformers"]
    if runtime is None and alone and set(batches) == {1} and find_spec("xllamacpp"):
        runtimes.append("llama.cpp")
    pairs = []
    for each in runtimes:
        name, _, python = each.partition("=")
        if name not in _DTYPES or (python and name != "vllm"):
            raise UsageError(f"--runtime {each!r}: allowed are {', '.join(_DTYPES)}, vllm=PYTHON")
        if name == "vllm":
            require_vllm(python)
        wanted = dtype.split(",") if dtype else [_USUAL_DTYPE[name]]
        if name == "llama.cpp" and set(batches) != {1}:
            raise UsageError("--runtime llama.cpp is measured with one sequence: pass --batch 1")
        pairs += [(each, kind) for kind in wanted if kind in _DTYPES[name]]
    if not pairs or set((dtype or "").split(",")) - {"", *(each for _, each in pairs)}:
        allowed = "; ".join(f"{', '.join(_DTYPES[name])} in {name}" for name in _DTYPES)
        raise UsageError(f"--dtype {dtype!r}: allowed are {allowed}")
    return pairs


def _quick_layers(contenders: list[Contender]) -> int | None:
    """Return the layers that `quick` measures; None where a model is real, or has no more."""
    layers = (0 if each.folder else each.config["num_hidden_layers"] for each in contenders)
    return _QUICK_LAYERS if min(layers) > _QUICK_LAYERS else None


def _check_room(contenders: list[Contender], sizes: tuple[int, int], layers: int | None) -> None:
    """Refuse texts that are too long for a model, and fewer layers where weights are not random."""
    for each in contenders:
        if layers and (each.folder or layers > each.config["num_hidden_layers"]):
            raise UsageError(
                f"--layers {layers} is for random models of more layers, not for {each.name}"
            )
        room = each.config.get("max_position_embeddings") or sum(sizes)
        if sum(sizes) > room:
            raise UsageError(
                f"{each.name} has room for {room} tokens, not for {sizes[0]} of prompt "
                f"and {sizes[1]} new ones: lower --prompt-tokens or --new-tokens"
            )


def _ratios(measured: Rounds, key: Key, idx: int, other: int) -> list[float]:
    """Return how many times as fast as another one a model was, by round; the fastest of each."""

    def seconds(which: int) -> list[float]:
        names = measured[0][which][key]
        runs = {name: [each[which][key][name] for each in measured] for name in names}
        return min(runs.values(), key=statistics.median)

    return [theirs / own for own, theirs in zip(seconds(idx), seconds(other), strict=True)]


def _speeds(
    contenders: list[Contender], runtime: str, dtype: str, prompt_tokens: int, measured: Rounds
) -> list[Speed]:
    dense = next((idx for idx, each in enumerate(contenders) if each.is_dense), None)
    sizes = {each.size: idx for idx, each in enumerate(contenders) if each.is_dense}
    rows = []
    for key in sorted(measured[0][0], key=lambda key: (PHASES.index(key[0]), key[1])):
        phase, batch = key
        tokens = batch * (prompt_tokens if phase == "prefill" else 1)
        for idx, each in enumerate(contenders):
            tried = {
                name: tokens / statistics.median(run[idx][key][name] for run in measured)
                for name in measured[0][idx][key]
            }
            best = max(tried, key=tried.__getitem__)
            of_dense = _ratios(measured, key, idx, dense or 0)
            same = sizes.get(each.size)
            counted = cost(each.config, context=prompt_tokens)
            read = counted.active_params * _weight_bytes(dtype) * tried[best]
            speed = Speed(
                runtime=runtime.partition("=")[0],
                dtype=dtype,
                model=each.name,
                phase=phase,
                batch=batch,
                tokens_per_s=tried[best],
                of_dense=statistics.median(of_dense),
                of_active_size=None
                if same is None
                else statistics.median(_ratios(measured, key, idx, same)),
                spread=(min(of_dense), max(of_dense)),
                implementation=best or None,
                tried={name: rate for name, rate in tried.items() if name},
                flops_per_s=counted.flops_per_token * tried[best],
                bytes_per_s=read if key == ("decode", 1) else None,
            )
            rows.append(speed)
    return rows


def _weight_bytes(dtype: str) -> float:
    bits = {"float32": 32, "q8_0": 8.5, "q6_k": 6.6, "q5_k_m": 5.7, "q4_k_m": 4.9, "q4_0": 4.6}
    return bits.get(dtype, 16) / 8


def _read_rate() -> float:
    """Return the bytes per second at which the device sums up a large tensor."""
    tensor, seconds = torch.zeros(1 << 27, device=device()), []
    for _ in range(3):
        synchronise()
        started = time.perf_counter()
        tensor.sum()
        synchronise()
        seconds.append(time.perf_counter() - started)
    return tensor.nbytes / min(seconds)


def _scaled_seconds(each: Contender, layers: int | None, how: How, folder: Path) -> Seconds:
    """Time one pass; with fewer layers, what each beyond the first adds counts for the rest."""
    if layers is None:
        return _seconds(each, how, folder)
    first, several = (_seconds(each.with_layers(n), how, folder) for n in (1, layers))
    rest = (each.config["num_hidden_layers"] - 1) / (layers - 1)
    return {
        key: {name: low + rest * max(several[key][name] - low, 0.0) for name, low in tried.items()}
        for key, tried in first.items()
    }


def _seconds(each: Contender, how: How, folder: Path) -> Seconds:
    runtime, dtype, batches, sizes = how
    if runtime == "transformers":
        return _transformers_seconds(each, batches, sizes, dtype)
    if runtime.startswith("vllm"):
        return vllm_seconds(each.config, each.folder, runtime[5:], dtype, batches, sizes)
    file = gguf_file(each, dtype, folder)
    ids = _random_prompt(each.config["vocab_size"], 1, sizes[0])[0].tolist()
    found = llama_cpp_seconds(file, ids, sizes[1], float32=dtype == "float32")
    return {(phase, 1): {"": elapsed} for phase, elapsed in zip(PHASES, found, strict=True)}


def _transformers_seconds(
    contender: Contender, batches: Sequence[int], sizes: tuple[int, int], dtype: str
) -> Seconds:
    """Time both phases once, with every implementation of the experts."""
    network, config = contender.load(dtype), contender.config
    seconds: Seconds = defaultdict(dict)
    row_bytes = math.gcd(ffn_shape(config).size, config["hidden_size"]) * network.dtype.itemsize
    for batch in batches:
        ids = _random_prompt(config["vocab_size"], batch, sizes[0])
        # torch refuses grouped products of rows that are no multiple of 16 bytes
        grouped = ["grouped_mm"] if row_bytes % 16 == 0 else []
        names = [""] if contender.is_dense else ["eager", *grouped, register()]
        for name in names:
            if name:  # a dense model has none
                network.set_experts_implementation(name)
            # the first run of an implementation is slow
            decode(network, *prefill(network, ids[:, :8])[:2], 1)

            def run(ids: Tensor = ids) -> list[float]:
                cache, token, elapsed_s = prefill(network, ids)
                return [elapsed_s, decode(network, cache, token, sizes[1]) / sizes[1]]

            for phase, elapsed_s in zip(PHASES, fastest(run), strict=True):
                seconds[phase, batch][name] = elapsed_s
    return seconds


def _random_prompt(vocab_size: int, batch: int, tokens: int) -> Int[Tensor, "batch tokens"]:
    """Return token ids, always the same."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (batch, tokens), generator=generator).to(device())


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
