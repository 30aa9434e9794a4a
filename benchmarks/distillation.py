"""Distillation against cross-entropy: docs/objective.md, "What distillation is worth".

    python benchmarks/distillation.py WORK --model smollm2-135m --data ../shared/data/pretrain
    python benchmarks/distillation.py WORK --model ../shared/models/stories260K.bin --data self

Converts the dense model once, then trains the same conversion on the same tokens with every method,
share of the tokens, learning rate and seed, each run with its own whole schedule, and measures
cross-entropy on text that no run has seen. A share of 0.5 is a run of half the tokens: what it ends
at is what distillation reaches in half the tokens. Every method tries all rates at every share with
the first seed; further seeds use the best rate alone. `--methods`, `--rates` and `--shares` of
several calls add up.

Finished runs in WORK are kept, an interrupted one starts again. Writes
docs/training/distillation-<model>.csv and .png, and the table in docs/objective.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Int
from llama2c import write_llama2c_model
from publish_distillation import BASELINE, CONVERTED, DENSE, FRUGAL, RANDOM, RESCALED, Run, publish

import moefy
from moefy.calibrate.text import SELF, self_windows
from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.checkpoint.source import resolve
from moefy.data.records import Side, open_domains
from moefy.data.tokenise import pack
from moefy.evaluation.output_loss import LogitsInput, output_loss
from moefy.experts.balance import switch_loss
from moefy.experts.routers import RouterTrace, routers_of
from moefy.hardware import device
from moefy.training.objective import LayerMatch, Place
from moefy.training.optimizer import learning_rate


@dataclass(frozen=True)
class Method:
    """How much of the objective is the teacher's, layer matching, and what is trained."""

    teacher_share: float = 0.0
    temperature: float = 1.0
    match: Place | None = None
    match_weight: float = 1.0
    conversion: str = CONVERTED


PAPER_RECIPE = Path(__file__).parents[1] / "recipes" / "llama-moe.yaml"
METHODS = {
    BASELINE: Method(),
    "KL": Method(1.0),
    "KL, temperature 2": Method(1.0, temperature=2.0),
    "half KL": Method(0.5),
    **{
        f"{name} + {weight:g} {place}": Method(share, match=place, match_weight=weight)
        for name, share in (("KL", 1.0), ("half KL", 0.5), (BASELINE, 0.0))
        for place in get_args(Place)
        for weight in (0.3, 1, 3, 10, 30, 100)
    },
    f"{RANDOM}, {BASELINE}": Method(conversion=RANDOM),
    f"{RESCALED}, {BASELINE}": Method(conversion=RESCALED),
}


def main() -> None:
    options = _options()
    runs: Path = options.work / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    dense = _dense(options)
    _convert(options, dense)
    train, heldout = _windows(options, dense)
    teacher = load_model(dense, dtype=torch.float32).to(device())
    measure = _Measure(teacher, heldout, options)

    def done(run: Run) -> float:
        if not run.file(runs).exists():
            _train(run, options, teacher, train, measure)
        last = json.loads(run.file(runs).read_text().splitlines()[-1])
        print(f"{run.file(runs).stem}: {last['heldout']:.4f}", flush=True)
        return float(last["heldout"])

    for name in (DENSE, *_conversions(options)):
        untrained = Run(name, 0.0, 0.0, 0)
        if not untrained.file(runs).exists():
            model = teacher if name == DENSE else _load(options, name)
            _write(untrained, [measure(model, tokens=0, seconds=0.0)], runs)
    first_seed, *seeds = options.seeds
    for method in options.methods:
        for share in options.shares:
            tried = {rate: done(Run(method, rate, share, first_seed)) for rate in options.rates}
            best = min(tried, key=lambda rate: tried[rate])
            for seed in seeds:
                done(Run(method, best, share, seed))
            publish(runs, Path(options.model).stem.lower())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="smollm2-135m", help="any source, or a llama2.c .bin")
    parser.add_argument("--data", default="demo", help="a corpus as for moefy train, or self")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--global-batch-size", type=int, default=4)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--heldout-windows", type=int, default=28, help="in all")
    parser.add_argument("--evaluations", type=int, default=8, help="per run")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-5, 1e-4, 3e-4])
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.5, 0.25])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    for key in ("experts", "active", "shared"):
        parser.add_argument(f"--{key}", type=int)
    return parser.parse_args()


def _dense(options: argparse.Namespace) -> Path:
    if not options.model.endswith(".bin"):
        return resolve(options.model)
    folder: Path = options.work / "dense"
    if not folder.exists():
        write_llama2c_model(Path(options.model), folder)
    return folder


def _conversions(options: argparse.Namespace) -> list[str]:
    """Return what is to be trained; beside the paper's also what a tenth of its tokens can fit."""
    names = {METHODS[method].conversion for method in options.methods}
    return sorted(names | {FRUGAL} if names & {RANDOM, RESCALED} else names)


def _folder(options: argparse.Namespace, conversion: str) -> Path:
    return Path(options.work / conversion.replace(" ", "-").replace(",", ""))


def _load(options: argparse.Namespace, conversion: str) -> Any:
    return load_model(_folder(options, conversion), dtype=torch.float32).to(device())


def _convert(options: argparse.Namespace, dense: Path) -> None:
    """Write what is trained: moefy's conversion and, where asked for, the paper's.

    The paper's constant is meant for its own counts, 2 or 4 of 16; with and without it are both
    measured.
    """
    counts = {key: getattr(options, key) for key in ("experts", "active", "shared")}
    for name in _conversions(options):
        folder = _folder(options, name)
        if folder.exists():
            continue
        if name in (CONVERTED, FRUGAL):
            read = {"calibration_tokens": options.tokens // 10, "calibration_length": 256}
            read = read if name == FRUGAL else {}
            moefy.convert(dense, folder, data=options.data, **counts, **read)
        else:
            paper = {**counts, "shared": 0, "repair": "paper" if name == RESCALED else "none"}
            moefy.convert(dense, folder, recipe=PAPER_RECIPE, **paper)


def _windows(
    options: argparse.Namespace, dense: Path
) -> tuple[Int[np.ndarray, "windows sequence"], Int[np.ndarray, "windows sequence"]]:
    """Return training and held-out windows, as many of every domain, kept in WORK.

    They are drawn from all of a domain's documents: the first ones would be a single book.
    """
    length, kept = options.sequence_length, options.work / "windows.npz"
    wanted = {"train": -(-options.tokens // length), "heldout": options.heldout_windows}
    if kept.exists():
        found = np.load(kept)
        return found["train"], found["heldout"]
    if options.data == SELF:
        found = {
            side: self_windows(dense, tokens=count * length, sequence_length=length, seed=seed)
            for seed, (side, count) in enumerate(wanted.items(), start=1)
        }
    else:
        tokenizer = load_tokenizer(dense)
        domains = open_domains(options.data)

        def drawn(split: Side, seed: int) -> Int[np.ndarray, "windows sequence"]:
            count = -(-wanted[split] // len(domains))
            picked = []
            for domain in domains:
                every = pack(
                    domain.documents(split),
                    tokenizer,
                    sequence_length=length,
                    max_windows=sys.maxsize,
                )
                chosen = np.random.default_rng(seed).permutation(len(every))[:count]
                picked.append(every[np.sort(chosen)])
            return np.concatenate(picked)

        found = {"train": drawn("train", 1), "heldout": drawn("heldout", 2)}
    assert len(found["train"]) >= wanted["train"], "the corpus is too small: lower --tokens"
    np.savez(kept, **found)
    return found["train"], found["heldout"]


def _train(
    run: Run,
    options: argparse.Namespace,
    teacher: Any,
    train: Int[np.ndarray, "windows sequence"],
    measure: _Measure,
) -> None:
    """Train one run and write its curve, one line a measurement."""
    method = METHODS[run.method]
    student = _load(options, method.conversion).train()
    per_step, per_pass = options.global_batch_size, options.micro_batch_size
    tokens_per_step = per_step * options.sequence_length
    num_steps = int(run.share * options.tokens) // tokens_per_step  # never more than the share
    order = np.random.default_rng(run.seed).permutation(len(train))
    routers = {id(p) for router in routers_of(student) for p in router.parameters()}
    groups = [
        {"params": [p for p in student.parameters() if (id(p) in routers) == is_router], "of": of}
        for is_router, of in ((False, 1.0), (True, 0.01))  # as moefy train does
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    measured = {
        round(num_steps * (n + 1) / options.evaluations) for n in range(options.evaluations)
    }
    lines: list[dict[str, Any]] = []
    elapsed_s = 0.0
    for step in range(num_steps + 1):
        if step in measured:
            tokens = step * tokens_per_step
            lines.append(measure(student, tokens=tokens, seconds=elapsed_s))
        if step == num_steps:
            break
        started = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = group["of"] * learning_rate(
                step, num_steps, peak=run.rate, warmup_fraction=0.1, final_fraction=0.1
            )
        batch = torch.from_numpy(train[np.sort(order[step * per_step : (step + 1) * per_step])])
        for tokens in batch.to(device()).split(per_pass):
            loss = _objective(method, student, teacher, tokens, options)
            (loss * len(tokens) / per_step).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        elapsed_s += time.perf_counter() - started
    _write(run, lines, options.work / "runs")


def _write(run: Run, lines: list[dict[str, Any]], folder: Path) -> None:
    text = "".join(json.dumps({**asdict(run), **line}) + "\n" for line in lines)
    run.file(folder).write_text(text)


def _autocast(options: argparse.Namespace) -> torch.autocast:
    return torch.autocast(device().type, torch.bfloat16, enabled=options.precision == "bfloat16")


def _objective(
    method: Method, student: Any, teacher: Any, tokens: torch.Tensor, options: argparse.Namespace
) -> torch.Tensor:
    """Return one pass's loss: tokens, balance at 1e-2 in every method, layers where asked."""
    labels = tokens[:, 1:]
    with _autocast(options), RouterTrace(student) as trace:
        if not method.teacher_share and not method.match:
            out = output_loss(LogitsInput.of(student, tokens).predicting(), labels)
            return out.loss + 1e-2 * switch_loss(trace.sums())
        with LayerMatch(student, teacher, method.match or "residual") as match:
            with torch.no_grad():
                parent = LogitsInput.of(teacher, tokens).predicting()
            out = output_loss(
                LogitsInput.of(student, tokens).predicting(),
                labels,
                teacher=parent,
                teacher_share=method.teacher_share,
                temperature=method.temperature,
            )
            loss = out.loss + 1e-2 * switch_loss(trace.sums())
            return loss + method.match_weight * match.loss() if method.match else loss


class _Measure:
    """Held-out cross-entropy and KL(dense‖model), nats per token; the dense model runs once."""

    def __init__(
        self,
        teacher: Any,
        heldout: Int[np.ndarray, "windows sequence"],
        options: argparse.Namespace,
    ) -> None:
        self._options = options
        self._batches = torch.from_numpy(heldout).to(device()).split(4)
        with torch.no_grad(), _autocast(options):
            self._parents = [LogitsInput.of(teacher, b).predicting() for b in self._batches]

    @torch.no_grad()
    def __call__(self, model: Any, *, tokens: int, seconds: float) -> dict[str, Any]:
        """Return a line of a run's curve, with the loss of every window."""
        model.eval()
        losses, divergences = [], []
        with _autocast(self._options):
            for windows, parent in zip(self._batches, self._parents, strict=True):
                student = LogitsInput.of(model, windows).predicting()
                out = output_loss(student, windows[:, 1:], teacher=parent)
                assert out.divergence is not None
                losses.append(out.cross_entropy.mean(-1))
                divergences.append(out.divergence.mean(-1))
        model.train()
        by_window = torch.cat(losses)
        return {
            "tokens": tokens,
            "heldout": float(by_window.mean()),
            "kl_to_dense": float(torch.cat(divergences).mean()),
            "seconds": seconds,
            "by_window": [round(loss, 4) for loss in by_window.tolist()],
        }


if __name__ == "__main__":
    main()
