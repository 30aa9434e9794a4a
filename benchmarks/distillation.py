"""Distillation against cross-entropy: docs/objective.md, "What distillation is worth".

    python benchmarks/distillation.py WORK --model smollm2-135m --data ../shared/data/pretrain
    python benchmarks/distillation.py WORK --model ../shared/models/stories260K.bin --data self

Converts the dense model once, then trains the same conversion on the same tokens with every method,
learning rate, share of the tokens and seed, each run with its own whole schedule, and measures
cross-entropy on text that no run has seen. A share of 0.5 is a run of half the tokens: what it ends
at is what distillation reaches in half the tokens. First every method finds its best rate with the
first seed and all tokens; shares and further seeds use that rate alone.

Finished runs in WORK are kept, an interrupted one starts again. Writes
docs/training/distillation-<model>.csv and .png, and the table in docs/objective.md.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from llama2c import write_llama2c_model
from publish_distillation import BASELINE, Run, publish

import moefy
from moefy.calibrate.text import SELF, self_windows
from moefy.checkpoint.load import device, load_model, load_tokenizer
from moefy.checkpoint.source import resolve
from moefy.data.domains import documents_of, open_domains
from moefy.data.packing import pack
from moefy.training.balance import switch_loss
from moefy.training.layer_match import LayerMatch, Place
from moefy.training.output_loss import LogitsInput, next_labels, output_loss
from moefy.training.router_trace import RouterTrace, routers_of
from moefy.training.schedule import learning_rate


@dataclass(frozen=True)
class Method:
    """An objective: how much of it is the teacher's, at which temperature, and layer matching."""

    teacher_share: float = 0.0
    temperature: float = 1.0
    match: Place | None = None
    match_weight: float = 1.0


METHODS = {
    BASELINE: Method(),
    "KL": Method(1.0),
    "KL, temperature 2": Method(1.0, temperature=2.0),
    "half KL": Method(0.5),
    "KL + residual": Method(1.0, match="residual"),
    "KL + FFN": Method(1.0, match="ffn"),
}


def main() -> None:
    options = _options()
    work: Path = options.work
    (work / "runs").mkdir(parents=True, exist_ok=True)
    dense = _dense(options)
    if not (work / "moe").exists():
        counts = {key: getattr(options, key) for key in ("experts", "active", "shared")}
        moefy.convert(dense, work / "moe", data=options.data, **counts)
    train, heldout = _windows(options, dense)
    teacher = load_model(dense, dtype=torch.float32).to(device())
    floor, _ = _measure(teacher, None, heldout, options)
    start, _ = _measure(
        load_model(work / "moe", dtype=torch.float32).to(device()), None, heldout, options
    )
    print(f"dense {floor:.4f}, converted {start:.4f} nats per held-out token", flush=True)

    def done(run: Run) -> float:
        if not run.file(work / "runs").exists():
            _train(run, options, teacher, train, heldout)
        last = json.loads(run.file(work / "runs").read_text().splitlines()[-1])
        print(f"{run.file(work / 'runs').stem}: {last['heldout']:.4f}", flush=True)
        return float(last["heldout"])

    for method in options.methods:
        tried = {rate: done(Run(method, rate, 1.0, options.seeds[0])) for rate in options.rates}
        best = min(tried, key=lambda rate: tried[rate])
        shares = [1.0] if method == BASELINE else [1.0, *options.shares]
        for run in (Run(method, best, share, seed) for share in shares for seed in options.seeds):
            done(run)
        publish(work / "runs", Path(options.model).stem.lower(), floor, start)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--model", default="smollm2-135m", help="any source, or a llama2.c .bin")
    parser.add_argument("--data", default="demo", help="a corpus as for moefy train, or self")
    parser.add_argument("--tokens", type=int, default=262_144)
    parser.add_argument("--sequence-length", type=int, default=512)
    parser.add_argument("--sequences-per-step", type=int, default=4)
    parser.add_argument("--sequences-per-pass", type=int, default=1)
    parser.add_argument("--heldout-windows", type=int, default=28, help="in all")
    parser.add_argument("--evaluations", type=int, default=8, help="per run")
    parser.add_argument("--rates", type=float, nargs="+", default=[5e-5, 1e-4, 3e-4])
    parser.add_argument("--shares", type=float, nargs="*", default=[0.5, 0.25])
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


def _windows(
    options: argparse.Namespace, dense: Path
) -> tuple[Int[np.ndarray, "windows sequence"], Int[np.ndarray, "windows sequence"]]:
    """Return training and held-out windows, as many of every domain, kept in WORK."""
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
        found = {
            side: np.concatenate(
                [
                    pack(
                        documents_of(domain, side),  # type: ignore[arg-type]
                        tokenizer,
                        sequence_length=length,
                        max_windows=-(-count // len(domains)),
                    )
                    for domain in domains
                ]
            )
            for side, count in wanted.items()
        }
    assert len(found["train"]) >= wanted["train"], "the corpus is too small: lower --tokens"
    np.savez(kept, **found)
    return found["train"], found["heldout"]


def _train(
    run: Run,
    options: argparse.Namespace,
    teacher: Any,
    train: Int[np.ndarray, "windows sequence"],
    heldout: Int[np.ndarray, "windows sequence"],
) -> None:
    """Train one run and write its curve, one line a measurement."""
    method = METHODS[run.method]
    student = load_model(options.work / "moe", dtype=torch.float32).to(device()).train()
    per_step, per_pass = options.sequences_per_step, options.sequences_per_pass
    tokens_per_step = per_step * options.sequence_length
    num_steps = round(run.share * options.tokens / tokens_per_step)
    order = np.random.default_rng(run.seed).permutation(len(train))
    routers = {id(p) for router in routers_of(student) for p in router.parameters()}
    groups = [
        {"params": [p for p in student.parameters() if (id(p) in routers) == is_router], "of": of}
        for is_router, of in ((False, 1.0), (True, 0.01))  # as moefy train does
    ]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.1)
    measured = {round(num_steps * n / options.evaluations) for n in range(options.evaluations + 1)}
    lines, elapsed_s = [], 0.0
    for step in range(num_steps + 1):
        if step in measured:
            loss, divergence = _measure(student, teacher, heldout, options)
            lines.append(
                {
                    **asdict(run),
                    "tokens": step * tokens_per_step,
                    "heldout": loss,
                    "kl_to_dense": divergence,
                    "seconds": elapsed_s,
                }
            )
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
    run.file(options.work / "runs").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _autocast(options: argparse.Namespace) -> torch.autocast:
    return torch.autocast(device().type, torch.bfloat16, enabled=options.precision == "bfloat16")


def _objective(
    method: Method, student: Any, teacher: Any, tokens: torch.Tensor, options: argparse.Namespace
) -> torch.Tensor:
    """Return one pass's loss: tokens, balance at 1e-2 in every method, layers where asked."""
    labels = next_labels(tokens)
    with _autocast(options), RouterTrace(student) as trace:
        if not method.teacher_share:
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


@torch.no_grad()
def _measure(
    model: Any,
    teacher: Any | None,
    heldout: Int[np.ndarray, "windows sequence"],
    options: argparse.Namespace,
) -> tuple[float, float]:
    """Return held-out cross-entropy and KL(teacher‖model), nats per token."""
    model.eval()
    sums = np.zeros(2)
    with _autocast(options):
        for window in torch.from_numpy(heldout).to(device()).split(4):
            out = output_loss(
                LogitsInput.of(model, window).predicting(),
                next_labels(window),
                teacher=LogitsInput.of(teacher, window).predicting() if teacher else None,
            )
            divergence = out.divergence if out.divergence is not None else torch.zeros(())
            sums += [float(out.cross_entropy.sum()), float(divergence.sum())]
    model.train()
    loss, divergence_mean = sums / (len(heldout) * (options.sequence_length - 1))
    return float(loss), float(divergence_mean)


if __name__ == "__main__":
    main()
