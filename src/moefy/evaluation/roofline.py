"""Why a model is as fast as it is: what a pass must at least do, and what the machine can do."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moefy.checkpoint.cost import cost, ffn_shape
from moefy.checkpoint.families import FAMILIES, canonical_config
from moefy.hardware import device, synchronise

_REPEATS = 5


@dataclass(frozen=True)
class Work:
    """The least that one forward pass can do.

    Attributes:
        num_bytes: weights that are met, once, and the key-value cache.
        flops: of the matrix products, the last position's logits alone among them.
    """

    num_bytes: int
    flops: int


@dataclass(frozen=True)
class Machine:
    """What the machine was measured to do.

    Attributes:
        device: "cpu", or the accelerator's name.
        threads: of the CPU.
        dtype: of the matrix product.
        bytes_per_s: read from memory.
        flops_per_s: of a large matrix product.
    """

    device: str
    threads: int
    dtype: str
    bytes_per_s: float
    flops_per_s: float


@dataclass(frozen=True)
class Bound:
    """Which limit a pass is near.

    Attributes:
        shares: by limit, its time over the measured time. "memory": the pass's bytes at the
            machine's bandwidth; "arithmetic": its FLOPs at the machine's rate; "small operations":
            the same operations on matrices too narrow to cost anything.
        by: the largest of them.
    """

    shares: dict[str, float]

    @property
    def by(self) -> str:
        """The limit that explains most of the time."""
        return max(self.shares, key=lambda name: self.shares[name])


def work(
    config: Mapping[str, Any], *, batch: int, new_tokens: int, cached_tokens: int, itemsize: int
) -> Work:
    """Count one forward pass.

    Every expert that a token of the pass chooses is read once: with even routing, E·(1 − (1 −
    k/E)^tokens) of E. A token's query meets the keys of the cached tokens, of the tokens before it
    in the pass and its own.

    Args:
        config: config.json of a model that `cost` counts.
        batch: sequences.
        new_tokens: of each sequence, computed in this pass.
        cached_tokens: of each sequence, from earlier passes.
        itemsize: bytes of one weight.
    """
    counted, ffn = cost(config, context=new_tokens), ffn_shape(config)
    if config["model_type"] in FAMILIES:
        config = canonical_config(FAMILIES[config["model_type"]], config)
    hidden, vocab, layers = (
        config[key] for key in ("hidden_size", "vocab_size", "num_hidden_layers")
    )
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or hidden // heads

    weights = counted.active_params
    if ffn.experts:
        met = ffn.experts * (1 - (1 - ffn.active / ffn.experts) ** (batch * new_tokens))
        weights += round(layers * 3 * hidden * ffn.size * (met - ffn.active))
    if not config.get("tie_word_embeddings", False):
        weights -= vocab * hidden  # of the input table only rows are read
    cache = 2 * layers * kv_heads * head_dim * batch * (cached_tokens + new_tokens)

    flops = new_tokens * counted.flops_per_token - 2 * vocab * hidden * (new_tokens - 1)
    flops += 4 * layers * heads * head_dim * new_tokens * cached_tokens
    return Work(num_bytes=itemsize * (weights + cache), flops=batch * flops)


def bound(
    elapsed_s: float, done: Work, machine: Machine, small_operations_s: float | None
) -> Bound:
    """Compare a measured pass with its limits.

    Args:
        elapsed_s: of the pass.
        done: what it must do.
        machine: what it runs on.
        small_operations_s: what the same operations take on narrow matrices, if that is known.
    """
    shares = {
        "memory": done.num_bytes / machine.bytes_per_s / elapsed_s,
        "arithmetic": done.flops / machine.flops_per_s / elapsed_s,
    }
    if small_operations_s is not None:
        shares["small operations"] = small_operations_s / elapsed_s
    return Bound(shares)


@torch.inference_mode()
def measure_machine(dtype: torch.dtype) -> Machine:
    """Measure reading and multiplying on the device that models run on.

    Reading is the faster of a sum and a matrix-vector product over 256 MiB of float32, multiplying
    a product of square matrices; the best of five each.
    """
    place = device()
    table, vector = torch.ones(8192, 8192, device=place), torch.ones(8192, device=place)
    read_s = min(_best_s(table.sum), _best_s(lambda: table @ vector))
    return Machine(
        device=torch.cuda.get_device_name() if place.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        dtype=str(dtype).removeprefix("torch."),
        bytes_per_s=table.numel() * table.element_size() / read_s,
        flops_per_s=multiply_rate(dtype),
    )


@torch.inference_mode()
def multiply_rate(dtype: torch.dtype) -> float:
    """Return the FLOP/s of a product of large square matrices, the best of five."""
    place = device()
    width = 8192 if place.type == "cuda" else 1024
    left = torch.ones(width, width, dtype=dtype, device=place)
    right = torch.ones(width, width, dtype=dtype, device=place)
    return 2 * width**3 / _best_s(lambda: left @ right)


def _best_s(operation: Callable[[], object]) -> float:
    elapsed = []
    for _ in range(_REPEATS):
        synchronise()
        started = time.perf_counter()
        operation()
        synchronise()
        elapsed.append(time.perf_counter() - started)
    return min(elapsed)
