"""Tokens per second of models side by side, and what bounds each."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moefy.checkpoint.cost import cost, ffn_shape, has_qk_norm
from moefy.checkpoint.families import FAMILIES
from moefy.checkpoint.meaning import meaning_of
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.source import resolve
from moefy.errors import UsageError
from moefy.evaluation.timing import (
    GGUF_DTYPES,
    PHASES,
    Contender,
    Phase,
    Seconds,
    llama_cpp_round,
    no_seconds,
    one_round,
)
from moefy.hardware import device, multiply_rate, read_rate
from moefy.progress import Progress, ProgressFn, silent

RUNTIMES = ("transformers", "llama.cpp")


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
    # share of the measured time that reading the weights alone would take ("memory"), and
    # multiplying alone ("arithmetic"); the larger of them
    limits: dict[str, float]
    bound_by: str


@dataclass(frozen=True)
class SpeedComparison:
    """What `measure_speed` found."""

    runtime: str
    device: str  # "cpu", or the accelerator's name
    threads: int  # of the CPU
    dtype: str  # of weights and computation
    bytes_per_s: float  # read from memory, measured
    flops_per_s: float  # of a large matrix product, measured
    prompt_tokens: int  # of each sequence
    new_tokens: int  # of each sequence
    speeds: list[Speed]  # by phase, then batch, then model


def measure_speed(
    models: str | Path | Sequence[str | Path],
    *,
    batches: Sequence[int] | None = None,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    rounds: int = 3,
    dtype: str = "float32",
    threads: int | None = None,
    runtime: str = "transformers",
    names: Sequence[str] | None = None,
    report: ProgressFn = silent,
) -> SpeedComparison:
    """Measure prefill and greedy decoding of models in turn, and say what bounds each.

    For every active size among the converted models, a dense model of that size is made and
    measured too (random weights: speed does not depend on them). The prompt is random tokens. In
    transformers every expert implementation that works here is tried, `experts.expert_views`
    among them, and the fastest counts, for each phase and batch size. Medians over the rounds, the
    models taking turns in each.

    Args:
        models: model folders, or anything `convert` takes as a source.
        batches: sequences at once; None for 1 and 8, in llama.cpp for 1, which is all it takes.
        prompt_tokens: of each sequence.
        new_tokens: decoded after it.
        rounds: times that everything is measured.
        dtype: "float32" or "bfloat16", of weights and computation.
        threads: of the CPU; None for torch's own choice.
        runtime: "transformers", on the accelerator if there is one, or "llama.cpp", on the CPU.
        names: shown instead of `models`.
        report: told about progress.

    Raises:
        UsageError: a model or a number is not usable, or the runtime is not installed.
        CheckpointError: llama.cpp cannot run a file; its last words are in the message.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    if batches is None:
        batches = (1,) if runtime == "llama.cpp" else (1, 8)
    counts = (min(batches, default=0), prompt_tokens, new_tokens, rounds, threads or 1)
    _check(given, counts, dtype, runtime, one_sequence=set(batches) == {1})
    folders = [resolve(model, report=report) for model in given]
    contenders = contenders_of(folders, list(names) if names else [str(model) for model in given])
    sizes, seconds = (prompt_tokens, new_tokens), no_seconds()
    for contender in contenders:
        room = contender.config.get("max_position_embeddings") or sum(sizes)
        if sum(sizes) > room:
            raise UsageError(
                f"{contender.name} has room for {room} tokens, not for {prompt_tokens} of prompt "
                f"and {new_tokens} new ones: lower --prompt-tokens or --new-tokens"
            )
    with _threads(threads), tempfile.TemporaryDirectory(prefix="moefy-speed-") as work:
        rates = {"memory": read_rate(), "arithmetic": multiply_rate(getattr(torch, dtype))}
        turns = rounds * len(contenders)
        for done in range(turns):  # in turns, so that a busy machine slows all of them down
            idx = done % len(contenders)
            report(Progress("measure speed", done, turns, contenders[idx].name))
            if runtime == "llama.cpp":
                folder = Path(work) / str(idx)
                found = llama_cpp_round(contenders[idx], sizes, dtype, folders[0], folder, report)
                for phase, elapsed_s in zip(PHASES, found, strict=True):
                    seconds[idx, phase, 1][""].append(elapsed_s)
            else:
                one_round(contenders[idx], batches, sizes, dtype, seconds, idx)
        report(Progress("measure speed", turns, turns))
        return SpeedComparison(
            runtime=runtime,
            device=torch.cuda.get_device_name() if device().type == "cuda" else "cpu",
            threads=torch.get_num_threads(),
            dtype=dtype,
            bytes_per_s=rates["memory"],
            flops_per_s=rates["arithmetic"],
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            speeds=_speeds(contenders, sizes, dtype, seconds, rates),
        )


def _check(
    given: list[str | Path],
    counts: Sequence[int],
    dtype: str,
    runtime: str,
    *,
    one_sequence: bool,
) -> None:
    if not given:
        raise UsageError("name at least one model")
    if min(counts) < 1:
        raise UsageError(
            f"--batch, --prompt-tokens, --new-tokens, --rounds, --threads: {min(counts)} was "
            "given, and at least 1 is needed"
        )
    known = {"--dtype": (dtype, [*GGUF_DTYPES]), "--runtime": (runtime, [*RUNTIMES])}
    for option, (value, allowed) in known.items():
        if value not in allowed:
            raise UsageError(f"{option} {value!r}: allowed are {' and '.join(allowed)}")
    if runtime == "llama.cpp" and importlib.util.find_spec("xllamacpp") is None:
        raise UsageError(
            "--runtime llama.cpp needs the package xllamacpp: pip install 'moefy[gguf]' xllamacpp"
        )
    if runtime == "llama.cpp" and not one_sequence:
        raise UsageError("--runtime llama.cpp is measured with one sequence: pass --batch 1")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def contenders_of(folders: list[Path], names: list[str]) -> list[Contender]:
    """Return the models, and before the first of every active size a dense model of that size.

    Raises:
        ArchitectureError: a model that `cost` cannot count.
    """
    configs = [read_config(folder) for folder in folders]
    sizes = {ffn_shape(config).running for config in configs if ffn_shape(config).experts}
    found: list[Contender] = []
    for name, folder, config in zip(names, folders, configs, strict=True):
        shape = ffn_shape(config)
        if shape.experts and shape.running not in _same_sizes(found):
            size = f", {shape.running} neurons" if len(sizes) > 1 else ""
            made = dense_of_active_size(config)
            found.append(Contender(f"dense (same active size{size})", made))
        found.append(Contender(name, config, folder))
    return found


def _same_sizes(contenders: Sequence[Contender]) -> dict[int, int]:
    """Return, by active neurons, the index of the dense model that was made for comparison."""
    made = [i for i, contender in enumerate(contenders) if contender.folder is None]
    return {ffn_shape(contenders[i].config).running: i for i in made}


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


def _speeds(
    contenders: list[Contender],
    sizes: tuple[int, int],
    dtype: str,
    seconds: Seconds,
    rates: Mapping[str, float],
) -> list[Speed]:
    same_sizes = _same_sizes(contenders)
    medians = {
        key: {name: statistics.median(values) for name, values in measured.items()}
        for key, measured in seconds.items()
    }
    rows = []
    for key in sorted(medians, key=lambda key: (PHASES.index(key[1]), key[2], key[0])):
        i, phase, batch = key
        config, best = contenders[i].config, min(medians[key], key=medians[key].__getitem__)
        elapsed_s = medians[key][best]
        new, cached = sizes[0], 0
        if phase == "decode":  # the mean over the decoded tokens
            new, cached = 1, sizes[0] + sizes[1] // 2
        weights, flops = least_work(config, batch, new, cached)
        limits = {
            "memory": weights * getattr(torch, dtype).itemsize / rates["memory"] / elapsed_s,
            "arithmetic": flops / rates["arithmetic"] / elapsed_s,
        }
        same = same_sizes.get(ffn_shape(config).running)
        if same is None and len(same_sizes) == 1:  # the whole dense model, beside a single size
            (same,) = same_sizes.values()
        other = None if same is None else min(medians[same, phase, batch].values())
        tried = {name: batch * new / value for name, value in medians[key].items() if name}
        rows.append(
            Speed(
                model=contenders[i].name,
                phase=phase,
                batch=batch,
                tokens_per_s=batch * new / elapsed_s,
                of_active_size=None if other is None else other / elapsed_s,
                implementation=best or None,
                tried=tried,
                limits=limits,
                bound_by=max(limits, key=lambda limit: limits[limit]),
            )
        )
    return rows


def least_work(
    config: Mapping[str, Any], batch: int, new_tokens: int, cached_tokens: int
) -> tuple[int, int]:
    """Return how many weights one forward pass must read, and its FLOPs.

    Args:
        config: config.json of a model that `cost` counts.
        batch: sequences.
        new_tokens: of each sequence, computed in this pass.
        cached_tokens: of each sequence, from earlier passes.
    """
    # a query meets all cached keys and, on average, half of the new ones: `cost` halves the context
    counted, ffn = cost(config, context=2 * cached_tokens + new_tokens), ffn_shape(config)
    if config["model_type"] in FAMILIES:
        config = meaning_of(config, "config.json")
    table = config["vocab_size"] * config["hidden_size"]
    weights = counted.active_params
    if not config.get("tie_word_embeddings", False):
        weights -= table  # of the input table only rows are read
    if ffn.experts:
        # each expert that some token chooses is read once; here with even routing
        chosen = ffn.experts * (1 - (1 - ffn.active / ffn.experts) ** (batch * new_tokens))
        per_expert = 3 * config["hidden_size"] * ffn.size
        weights += round(config["num_hidden_layers"] * per_expert * (chosen - ffn.active))
    # only the last position's logits are computed
    flops = new_tokens * counted.flops_per_token - 2 * table * (new_tokens - 1)
    return weights, batch * flops
