"""Tokens per second of models side by side, and what bounds each."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moefy.checkpoint.source import resolve
from moefy.errors import UsageError
from moefy.evaluation.contenders import Contender, contenders_of
from moefy.evaluation.llama_cpp import GGUF_DTYPES, check_installed, in_llama_cpp
from moefy.evaluation.roofline import Machine, Work, bound, measure_machine, work
from moefy.evaluation.timing import (
    PHASES,
    Phase,
    Seconds,
    Setting,
    in_transformers,
    small_operations,
)
from moefy.progress import Progress, ProgressFn, silent

RUNTIMES = ("transformers", "llama.cpp")


@dataclass(frozen=True)
class Speed:
    """One model in one phase at one batch size.

    Attributes:
        model: as named.
        phase: "prefill" (the prompt) or "decode" (tokens after it, one by one).
        batch: sequences at once.
        tokens_per_s: of all sequences together; median.
        of_active_size: that over the dense model's of the same active size; None without one.
        implementation: of the experts, the fastest; None for a dense model or another runtime.
        tried: tokens_per_s by implementation.
        pass_bytes, pass_flops: what one forward pass must read and compute; see `roofline.work`.
        bytes_per_s, flops_per_s: what it achieved.
        operations: that one forward pass hands to torch; None in another runtime.
        limits: by limit, its time over the measured time; see `roofline.Bound`.
        bound_by: the largest of them.
    """

    model: str
    phase: Phase
    batch: int
    tokens_per_s: float
    of_active_size: float | None
    implementation: str | None
    tried: dict[str, float]
    pass_bytes: int
    pass_flops: int
    bytes_per_s: float
    flops_per_s: float
    operations: int | None
    limits: dict[str, float]
    bound_by: str


@dataclass(frozen=True)
class SpeedComparison:
    """What `measure_speed` found.

    Attributes:
        runtime: "transformers" or "llama.cpp".
        machine: what the machine was measured to do.
        prompt_tokens, new_tokens: of each sequence.
        speeds: by phase, then batch, then model.
    """

    runtime: str
    machine: Machine
    prompt_tokens: int
    new_tokens: int
    speeds: list[Speed]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


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
        names: to show instead of `models`.
        report: told about progress.

    Raises:
        UsageError: a model or a number is not usable, or the runtime is not installed.
    """
    given = [models] if isinstance(models, str | Path) else list(models)
    if batches is None:
        batches = (1,) if runtime == "llama.cpp" else (1, 8)
    _check(given, batches, prompt_tokens, new_tokens, rounds, dtype, threads, runtime)
    folders = [resolve(model, report=report) for model in given]
    contenders = contenders_of(folders, list(names) if names else [str(model) for model in given])
    for contender in contenders:
        room = contender.config.get("max_position_embeddings") or prompt_tokens + new_tokens
        if prompt_tokens + new_tokens > room:
            raise UsageError(
                f"{contender.name} has room for {room} tokens, not for {prompt_tokens} of prompt "
                f"and {new_tokens} new ones: lower --prompt-tokens or --new-tokens"
            )
    setting = Setting(tuple(batches), prompt_tokens, new_tokens, rounds, getattr(torch, dtype))
    with _threads(threads):
        machine = measure_machine(setting.dtype)
        if runtime == "llama.cpp":
            seconds = in_llama_cpp(contenders, setting, folders[0], report)
        else:
            seconds = in_transformers(contenders, setting, report)
        speeds = _speeds(contenders, setting, seconds, machine, runtime, report)
    return SpeedComparison(runtime, machine, prompt_tokens, new_tokens, speeds)


def _check(
    given: list[str | Path],
    batches: Sequence[int],
    prompt_tokens: int,
    new_tokens: int,
    rounds: int,
    dtype: str,
    threads: int | None,
    runtime: str,
) -> None:
    if not given:
        raise UsageError("name at least one model")
    counts = {
        "--batch": min(batches, default=0),
        "--prompt-tokens": prompt_tokens,
        "--new-tokens": new_tokens,
        "--rounds": rounds,
        "--threads": 1 if threads is None else threads,
    }
    for option, count in counts.items():
        if count < 1:
            raise UsageError(f"{option} {count}: at least 1 is needed")
    if dtype not in GGUF_DTYPES:
        raise UsageError(f"--dtype {dtype!r}: allowed are {' and '.join(GGUF_DTYPES)}")
    if runtime not in RUNTIMES:
        raise UsageError(f"--runtime {runtime!r}: allowed are {' and '.join(RUNTIMES)}")
    if runtime == "llama.cpp":
        check_installed()
        if set(batches) != {1}:
            raise UsageError("--runtime llama.cpp is measured with one sequence: pass --batch 1")


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _speeds(
    contenders: list[Contender],
    setting: Setting,
    seconds: Seconds,
    machine: Machine,
    runtime: str,
    report: ProgressFn,
) -> list[Speed]:
    """Turn seconds into rows; the small operations of each winner are measured on the way."""
    best = {
        key: min((statistics.median(values), name or "") for name, values in measured.items())
        for key, measured in seconds.items()
    }
    rows = []
    order = sorted(best, key=lambda key: (PHASES.index(key[1]), key[2], key[0]))
    for done, key in enumerate(order):
        report(Progress("find what bounds it", done, len(best)))
        i, phase, batch = key
        contender, (elapsed_s, name) = contenders[i], best[key]
        per_pass = batch * (setting.prompt_tokens if phase == "prefill" else 1)
        todo = _work(contender.config, phase, batch, setting)
        operations, small_s = None, None
        if runtime == "transformers":
            operations, small_s = small_operations(
                contender.config, phase, batch, setting, name or None
            )
        found = bound(elapsed_s, todo, machine, small_s)
        same = contender.same_size
        rows.append(
            Speed(
                model=contender.name,
                phase=phase,
                batch=batch,
                tokens_per_s=per_pass / elapsed_s,
                of_active_size=None if same is None else best[same, phase, batch][0] / elapsed_s,
                implementation=name or None,
                tried={
                    tried: per_pass / statistics.median(values)
                    for tried, values in seconds[key].items()
                    if tried is not None
                },
                pass_bytes=todo.num_bytes,
                pass_flops=todo.flops,
                bytes_per_s=todo.num_bytes / elapsed_s,
                flops_per_s=todo.flops / elapsed_s,
                operations=operations,
                limits=found.shares,
                bound_by=found.by,
            )
        )
    report(Progress("find what bounds it", len(best), len(best)))
    return rows


def _work(config: Mapping[str, Any], phase: Phase, batch: int, setting: Setting) -> Work:
    prompt = setting.prompt_tokens
    prefill = phase == "prefill"
    return work(
        config,
        batch=batch,
        new_tokens=prompt if prefill else 1,
        cached_tokens=0 if prefill else prompt + setting.new_tokens // 2,
        itemsize=setting.dtype.itemsize,
    )
