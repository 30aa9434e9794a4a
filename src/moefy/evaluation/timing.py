"""Models timed in transformers, in turn, with every expert implementation that works here."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from moefy.checkpoint.cost import cost, ffn_shape
from moefy.checkpoint.load import load_model
from moefy.experts.views import register
from moefy.hardware import available_bytes, device, synchronise
from moefy.progress import Progress, ProgressFn

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")
_SLOWER = 1.25
"""An implementation this many times slower than the best is not measured again."""
_COPIED_BYTES = 2**30
"""batched_mm copies the weights of every token's experts: not tried where that is more."""


@dataclass(frozen=True)
class Contender:
    """A model whose speed is measured.

    Attributes:
        name: shown in tables.
        config: its config.json.
        folder: where it lies; None for random weights.
    """

    name: str
    config: Mapping[str, Any]
    folder: Path | None = None

    def load(self, dtype: torch.dtype) -> Any:
        """Return the model on the device."""
        if self.folder is None:
            return random_model(self.config, dtype)
        return load_model(self.folder, dtype=dtype).to(device())


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes:
        batches: sequences at once.
        prompt_tokens, new_tokens: of each sequence.
        rounds: times that everything is measured.
        dtype: of weights and computation.
    """

    batches: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int
    rounds: int
    dtype: torch.dtype


_Key = tuple[int, Phase, int]  # contender, phase, batch
Seconds = dict[_Key, dict[str | None, list[float]]]
"""Seconds of one forward pass, one value per round, by implementation of the experts."""


def in_transformers(contenders: list[Contender], setting: Setting, report: ProgressFn) -> Seconds:
    """Time everything; the models take turns, so that a busy machine slows all of them down."""
    seconds: Seconds = {}
    params = sum(cost(contender.config).total_params for contender in contenders)
    keep_all = 2 * params * setting.dtype.itemsize <= available_bytes()
    loaded: dict[int, Any] = {}
    done, total = 0, setting.rounds * len(contenders)
    for _ in range(setting.rounds):
        for i, contender in enumerate(contenders):
            report(Progress("measure speed", done, total, contender.name))
            if i not in loaded:
                if not keep_all:
                    loaded.clear()
                loaded[i] = contender.load(setting.dtype)
            for batch in setting.batches:
                _one_round(loaded[i], i, contender.config, batch, setting, seconds)
            done += 1
    report(Progress("measure speed", done, total))
    return seconds


def _one_round(
    network: Any,
    i: int,
    config: Mapping[str, Any],
    batch: int,
    setting: Setting,
    seconds: Seconds,
) -> None:
    """Time both phases once, with every implementation that is still in the race."""
    ids = random_prompt(config["vocab_size"], batch, setting.prompt_tokens)
    short = random_prompt(2, 1, 8)
    cache, token = None, ids
    for phase in PHASES:
        measured = seconds.setdefault((i, phase, batch), {})
        if phase == "decode":  # what prefills fastest fills the cache
            _use(network, _kept(seconds[i, "prefill", batch])[0])
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

    ours = register()
    names: list[str | None] = ["eager", *ALL_EXPERTS_FUNCTIONS.valid_keys()]
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
