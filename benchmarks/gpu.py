"""What one GPU makes of a split: training, expert products, decoding, recovery.

    python benchmarks/gpu.py --out OUT --model MOE --dense DENSE --tokens WINDOWS.npz [--minutes 9]
    python benchmarks/gpu.py --out OUT --rehearse       # the same on a CPU, tiny and in seconds

Each section ends with its share of the time, and writes OUT/SECTION.csv line by line, so that what
is known stays when the machine goes. Speeds are of random weights at the shape of Llama-3.2-1B, in
bfloat16 on a GPU. Recovery trains a converted model for as long as its share allows, with a
schedule by the clock; WINDOWS is a .npz with `train` and `heldout`, [windows, length] token ids, or
a .npy, whose last 64 windows are held out.

It needs torch and transformers with what they need, no network, and of moefy only what computes.

MFU = 3 · FLOPs of a forward pass · tokens/s / peak FLOP/s (PaLM, arXiv 2204.02311, appendix B). It
counts the experts that run, not those that wait, and not the teacher.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM

try:
    import jaxtyping  # noqa: F401
except ImportError:  # annotations alone need it

    class _Shape:
        def __class_getitem__(cls, _: Any) -> Any:
            return object

    sys.modules["jaxtyping"] = ModuleType("jaxtyping")
    vars(sys.modules["jaxtyping"]).update(dict.fromkeys(("Bool", "Float", "Int"), _Shape))

sys.path.insert(0, str(Path(__file__).parents[1] / "src"))
from moefy.checkpoint.expert_layers import register
from moefy.evaluation.output_loss import LogitsInput, output_loss
from moefy.experts.balance import switch_loss
from moefy.experts.routers import RouterTrace, routers_of
from moefy.hardware import device, multiply_rate, products_in, synchronise

SHARES = {"training": 0.3, "experts": 0.1, "decode": 0.2, "recovery": 0.35}  # of --minutes
TRAINED_PASSES = 3  # forward once, backward twice: gradients of inputs and of weights
IMPLEMENTATIONS = ("eager", "grouped_mm", "lean")  # eager: a loop over the experts
_LLAMA_1B: dict[str, Any] = {
    **{"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64},
    **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "max_position_embeddings": 8192,
}
_TINY = _LLAMA_1B | {
    **{"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 16},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256},
}
_PUBLISHED_TFLOPS = {  # bfloat16, dense, from NVIDIA's data sheets; the longest name that fits
    **{"B200": 2250.0, "H200": 989.5, "H100": 989.5, "H100 PCIe": 756.5, "H100 NVL": 835.5},
    **{"A100": 312.0, "A10": 125.0, "A40": 149.7, "L40S": 362.0, "L4": 121.0, "V100": 125.0},
    **{"RTX 4090": 165.2, "RTX 3090": 71.2},
}


def main() -> int:
    options = _options()
    options.out.mkdir(parents=True, exist_ok=True)
    options.shape = _TINY if options.rehearse else _LLAMA_1B
    options.precision = "bfloat16" if device().type == "cuda" else "float32"
    register()
    if options.rehearse:
        _tiny_models(options)
    failed = []
    sections = {"training": training, "experts": experts, "decode": decode, "recovery": recovery}
    for name, section in sections.items():
        if name == "recovery" and not (options.model and options.dense and options.tokens):
            print("recovery: left out, it needs --model, --dense and --tokens", file=sys.stderr)
            continue
        try:
            section(
                _Table(options.out / f"{name}.csv"), options, 60 * options.minutes * SHARES[name]
            )
        except Exception:  # the other sections are worth their time
            traceback.print_exc()
            failed.append(name)
        if device().type == "cuda":
            torch.cuda.empty_cache()
    with suppress(ImportError):
        _draw(options.out)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=9.0, help="of all sections")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, for a CPU")
    parser.add_argument(
        "--sequences", type=int, default=16, help="a step of `training` and recovery"
    )
    parser.add_argument("--length", type=int, default=1024, help="of a sequence in `training`")
    parser.add_argument("--model", type=Path, help="the converted model that is recovered")
    parser.add_argument("--dense", type=Path, help="the dense model that it was converted from")
    parser.add_argument("--tokens", type=Path, help=".npz or .npy of token windows")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--router-lr-scale", type=float, default=0.01)
    parser.add_argument("--alpha", type=float, default=1.0, help="the teacher's share of the loss")
    parser.add_argument("--evaluate-every", type=int, default=50, help="steps of recovery")
    options = parser.parse_args()
    if options.rehearse:
        options.minutes, options.sequences, options.length = min(options.minutes, 0.2), 2, 32
        options.evaluate_every = 2
    return options


class _Table:
    """A CSV file whose lines are on the disk, and on the screen, as soon as they are known."""

    def __init__(self, file: Path) -> None:
        self._file, self._name = file, file.stem

    def add(self, **cells: Any) -> None:
        """Add a line; the first one's keys are the header."""
        is_first = not self._name.endswith("…")
        with self._file.open("w" if is_first else "a", newline="") as file:
            writer = csv.writer(file)
            if is_first:
                writer.writerow(cells)
            shown = [f"{c:.5g}" if isinstance(c, float) else str(c) for c in cells.values()]
            writer.writerow(shown)
        self._name = f"{self._file.stem}…"
        print(self._file.stem, *shown, sep="\t", flush=True)


def _models(shape: dict[str, Any]) -> dict[str, Any]:
    """Return the configs that are compared: dense, dense of the active size, and two splits."""
    size = shape["intermediate_size"]
    configs = {
        "dense": ("llama", {}),
        "dense, active size": ("llama", {"intermediate_size": size // 2}),
    }
    for active, count in ((8, 16), (4, 8)):
        split = {"num_local_experts": count, "num_experts_per_tok": active}
        configs[f"{active}/{count}"] = "mixtral", {**split, "intermediate_size": size // count}
    return {
        name: AutoConfig.for_model(kind, **shape | own | {"tie_word_embeddings": True})
        for name, (kind, own) in configs.items()
    }


def _random(config: Any, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    with torch.device(device()):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def flops_per_token(network: Any, length: int) -> float:
    """Return the FLOPs of a forward pass: products with weights that run, and causal attention."""
    config = network.config
    share = getattr(config, "num_experts_per_tok", 0) / getattr(config, "num_local_experts", 1)
    head = network.get_output_embeddings().weight
    kinds = [(p.numel(), p.ndim) for n, p in network.named_parameters() if "embed_tokens" not in n]
    run = sum(count * (share if ndim == 3 else 1) for count, ndim in kinds if ndim > 1)
    if head is network.get_input_embeddings().weight:  # else it is among those of the list
        run += head.numel()
    width = config.num_attention_heads * config.head_dim
    return 2 * (run + config.num_hidden_layers * length * width)


def _steps(
    student: Any,
    teacher: Any | None,
    batches: Iterator[torch.Tensor],
    options: argparse.Namespace,
    schedule: Callable[[], float | None],
) -> Iterator[tuple[float, float]]:
    """Train as `moefy train` does; yield the loss and the seconds of each step.

    `schedule` returns the share of the peak learning rate, None behind the last step.
    """
    routers = {id(p) for router in routers_of(student) for p in router.parameters()}
    groups = [
        {"params": [p for p in student.parameters() if (id(p) in routers) == is_router], "of": of}
        for is_router, of in ((False, 1.0), (True, options.router_lr_scale))
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    while (rate := schedule()) is not None:
        synchronise()
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["of"] * rate * options.learning_rate
        ids, parent = next(batches), None
        with products_in(options.precision, ids.device), RouterTrace(student) as trace:
            if teacher is not None:
                with torch.no_grad():
                    parent = LogitsInput.of(teacher, ids).predicting()
            share = options.alpha if parent else 0.0
            states = LogitsInput.of(student, ids).predicting()
            loss = output_loss(states, ids[:, 1:], teacher=parent, teacher_share=share).loss
            sums = trace.sums()
            total = loss if sums is None else loss + 1e-2 * switch_loss(sums).to(loss.dtype)
        total.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronise()
        yield float(loss.detach()), time.perf_counter() - started


def training(table: _Table, options: argparse.Namespace, seconds: float) -> None:
    """Measure tokens/s and MFU of training steps."""
    models = _models(options.shape)
    size = (options.sequences, options.length)
    rates: dict[str, float] = {}
    for name, config in models.items():
        until = time.perf_counter() + seconds / len(models)
        network = _random(config, torch.float32).train()
        if name[0].isdigit():
            network.set_experts_implementation("lean")
        ids = torch.randint(0, config.vocab_size, size, device=device())
        count = itertools.count()

        def schedule(until: float = until, count: Iterator[int] = count) -> float | None:
            done = next(count)
            return None if done >= 40 or (done >= 4 and time.perf_counter() > until) else 1e-3

        steps = _steps(network, None, itertools.repeat(ids), options, schedule)
        found = [taken for _, taken in steps]
        rates[name] = size[0] * size[1] / statistics.median(found[1:] or found)
        peak = peak_flops(options.precision)
        table.add(
            model=name,
            precision=options.precision,
            tokens_per_s=rates[name],
            of_dense=rates[name] / rates["dense"],
            of_active_size=rates[name] / rates.get("dense, active size", math.nan),
            mfu=TRAINED_PASSES * flops_per_token(network, size[1]) * rates[name] / peak,
            steps=len(found),
        )
        del network


def experts(table: _Table, options: argparse.Namespace, seconds: float) -> None:
    """Measure one layer's experts, forward and backward: a loop over them, grouped products."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    shape, count = options.shape, options.sequences * options.length
    counts = (8, 16, 64)
    for num_experts in counts:
        until, active = time.perf_counter() + seconds / len(counts), num_experts // 2
        dtype = getattr(torch, options.precision)
        own = {"num_local_experts": num_experts, "num_experts_per_tok": active}
        size = {"intermediate_size": shape["intermediate_size"] // num_experts}
        layers = {}
        for name in IMPLEMENTATIONS:
            config = AutoConfig.for_model("mixtral", **shape | own | size)
            config._experts_implementation = name
            layers[name] = MixtralExperts(config).to(device(), dtype)
            for parameter in layers[name].parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        x = torch.randn(
            count, shape["hidden_size"], device=device(), dtype=dtype, requires_grad=True
        )
        chosen = torch.rand(count, num_experts, device=device()).topk(active, dim=-1).indices
        weights = torch.full(chosen.shape, 1 / active, device=device(), dtype=dtype)
        found: dict[str, list[float]] = {name: [] for name in layers}
        while len(found["lean"]) < 3 or (time.perf_counter() < until and len(found["lean"]) < 30):
            for name, layer in layers.items():
                synchronise()
                started = time.perf_counter()
                layer(x, chosen, weights).float().sum().backward()
                synchronise()
                found[name].append(time.perf_counter() - started)
        loop = statistics.median(found["eager"][1:])
        for name, times in found.items():
            taken = statistics.median(times[1:])
            table.add(
                split=f"{active}/{num_experts}",
                implementation=name,
                ms=1000 * taken,
                times_as_fast=loop / taken,
                tokens=count,
            )


@torch.inference_mode()
def decode(table: _Table, options: argparse.Namespace, seconds: float) -> None:
    """Measure greedy decoding behind a prompt, with every implementation of the experts."""
    models = _models(options.shape)
    prompt, count = (8, 4) if options.rehearse else (512, 64)
    rates: dict[tuple[str, int], float] = {}  # of the fastest implementation
    for name, config in models.items():
        until = time.perf_counter() + seconds / len(models)
        network = _random(config, getattr(torch, options.precision)).eval()
        for batch in (1, 8):
            for how in ("eager", "grouped_mm") if name[0].isdigit() else ("",):
                if how:
                    network.set_experts_implementation(how)
                taken: list[float] = []
                while len(taken) < 2 or (time.perf_counter() < until and len(taken) < 4):
                    ids = torch.randint(0, config.vocab_size, (batch, prompt), device=device())
                    out = network(ids, use_cache=True, logits_to_keep=1)
                    cache, token = out.past_key_values, out.logits[:, -1:].argmax(-1)
                    synchronise()
                    started = time.perf_counter()
                    for _ in range(count):
                        out = network(token, past_key_values=cache, use_cache=True)
                        token = out.logits[:, -1:].argmax(-1)
                    synchronise()
                    taken.append(time.perf_counter() - started)
                rate = batch * count / min(taken[1:])
                rates[name, batch] = max(rate, rates.get((name, batch), 0.0))
                table.add(
                    model=name,
                    batch=batch,
                    implementation=how,
                    tokens_per_s=rate,
                    of_dense=rate / rates["dense", batch],
                )
        del network


def recovery(table: _Table, options: argparse.Namespace, seconds: float) -> None:
    """Distil a converted model; measure KL to the dense one on held-out windows on the way."""
    ends = time.perf_counter() + seconds
    loaded = np.load(options.tokens)
    windows = (loaded["train"], loaded["heldout"]) if options.tokens.suffix == ".npz" else (
        loaded[:-64], loaded[-64:]
    )  # fmt: skip
    load = AutoModelForCausalLM.from_pretrained
    student = load(options.model, dtype=torch.float32).to(device()).train()
    if routers_of(student):
        student.set_experts_implementation("lean")
    teacher = load(options.dense, dtype=getattr(torch, options.precision)).to(device()).eval()
    teacher.requires_grad_(False)
    order = torch.from_numpy(np.random.default_rng(0).permutation(len(windows[0])))
    batches = iter(order.split(options.sequences))
    heldout = torch.from_numpy(windows[1].astype(np.int64)).to(device()).split(8)
    started, steps = time.perf_counter(), 0

    def taken() -> Iterator[torch.Tensor]:
        for rows in batches:
            yield torch.from_numpy(windows[0][rows.numpy()].astype(np.int64)).to(device())

    def schedule() -> float | None:
        # by the clock and the text, whichever ends first: warm-up, then cosine to a tenth
        by_text = (steps + 1) * options.sequences / len(windows[0])
        done = max((time.perf_counter() - started) / (ends - started), by_text)
        if done >= 1:
            return None
        return min(1.0, done / 0.05) * (0.55 + 0.45 * math.cos(math.pi * done))

    def measure(train_loss: float) -> None:
        losses, distances = [], []
        student.eval()
        with torch.no_grad(), products_in(options.precision, device()):
            for ids in heldout:
                parent = LogitsInput.of(teacher, ids).predicting()
                out = output_loss(
                    LogitsInput.of(student, ids).predicting(), ids[:, 1:], teacher=parent
                )
                assert out.divergence is not None
                losses.append(out.cross_entropy.double().mean(1))
                distances.append(out.divergence.double().mean(1))
        student.train()
        table.add(
            tokens=steps * options.sequences * windows[0].shape[1],
            seconds=time.perf_counter() - started,
            kl_to_dense=float(torch.cat(distances).mean()),
            heldout_loss=float(torch.cat(losses).mean()),
            training_loss=train_loss,
        )

    loss = math.nan
    measure(loss)
    for loss, _ in _steps(student, teacher, taken(), options, schedule):
        steps += 1
        if steps % options.evaluate_every == 0:
            measure(loss)
    if steps % options.evaluate_every:
        measure(loss)


def _tiny_models(options: argparse.Namespace) -> None:
    """Write what recovery reads: random models and random tokens."""
    for key, name in (("dense", "dense"), ("model", "8/16")):
        setattr(options, key, options.out / "rehearsed" / key)
        _random(_models(_TINY)[name], torch.float32).save_pretrained(getattr(options, key))
    options.tokens = options.out / "rehearsed" / "tokens.npz"
    drawn = np.random.default_rng(0).integers(0, _TINY["vocab_size"], (100, 16), dtype=np.uint16)
    np.savez(options.tokens, train=drawn[8:], heldout=drawn[:8])


def _draw(out: Path) -> None:
    """Draw every section that was measured."""
    import matplotlib as mpl

    mpl.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 8))
    bars = {"training": "tokens_per_s", "experts": "ms", "decode": "tokens_per_s"}
    for axis, name in zip(axes.flat, SHARES, strict=True):
        axis.set_title(name)
        file = out / f"{name}.csv"
        if not file.is_file():
            continue
        with file.open(newline="") as lines:
            rows = list(csv.DictReader(lines))
        if name == "recovery":
            numbers = [[float(row[key]) for row in rows] for key in ("tokens", "kl_to_dense")]
            axis.plot(*numbers, marker=".")
            axis.set(xlabel="tokens", ylabel="KL to the dense model, nats per token")
        else:
            keys = [key for key in ("model", "split", "batch", "implementation") if key in rows[0]]
            labels = [" · ".join(filter(None, (row[key] for key in keys))) for row in rows]
            axis.barh(labels, [float(row[bars[name]]) for row in rows])
            axis.invert_yaxis()
            axis.set_xlabel(bars[name].replace("_per_", "/"))
    figure.tight_layout()
    figure.savefig(out / "gpu.png", dpi=120)


def peak_flops(precision: str) -> float:
    """Return the published FLOP/s of a known GPU in bfloat16, else those of a large product."""
    if device().type == "cuda" and precision == "bfloat16":
        chosen = known_gpu(torch.cuda.get_device_name())
        if chosen:
            return _PUBLISHED_TFLOPS[chosen] * 1e12
    return multiply_rate(getattr(torch, precision))


def known_gpu(name: str) -> str | None:
    """Return which GPU of the data sheets a device's name means; None for others and for slices."""
    words = name.replace("-", " ").split()
    if "MIG" in words:
        return None
    known = [key for key in _PUBLISHED_TFLOPS if all(part in words for part in key.split())]
    return max(known, key=len, default=None)


if __name__ == "__main__":
    sys.exit(main())
