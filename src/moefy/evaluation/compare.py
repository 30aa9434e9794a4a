"""Models side by side: perplexity, distance from the dense model, cost and measured speed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moefy.checkpoint.cost import Cost, cost
from moefy.data.records import Side
from moefy.evaluation.compared import ComparedModel, compared_models
from moefy.evaluation.heldout import Quality, Windows, evaluation_windows, passes, perplexity
from moefy.evaluation.output_loss import LogitsInput
from moefy.evaluation.paired import Interval, paired_difference
from moefy.evaluation.timing import decode, prefill
from moefy.hardware import device
from moefy.progress import Progress, ProgressFn, silent

_DECODE_PROMPT, _DECODE_TOKENS, _DECODE_ROUNDS = 32, 24, 3


@dataclass(frozen=True)
class Result:
    """One model's row."""

    name: str
    perplexity: float  # over all tokens of all domains
    domain_perplexity: dict[str, float]
    # mean loss minus the reference's on the same windows, nats per token, with its 95 % interval
    # over windows; None for the reference and without one
    excess_loss: Interval | None
    kl_to_reference: float | None  # mean over tokens of KL(reference ‖ model), nats
    top1_agreement: float | None  # share of positions with the reference's likeliest token
    cost: Cost
    prefill_tokens_per_s: float  # median over the windows, without the output matrix
    decode_tokens_per_s: float | None  # median of greedy generation, batch 1; None if not measured


@dataclass(frozen=True)
class Comparison:
    """What `evaluate` measured."""

    reference: str | None  # name of the dense model that the others are compared with
    tokens: int  # predicted tokens per model
    sequence_length: int  # tokens per window
    results: list[Result]  # in the order given

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@torch.inference_mode()
def evaluate(
    models: str | Path | Sequence[str | Path],
    *,
    data: str | Path = "demo",
    split: Side = "heldout",
    windows: int = 8,
    sequence_length: int = 512,
    decode: bool = True,
    names: Sequence[str] | None = None,
    report: ProgressFn = silent,
) -> Comparison:
    """Measure models on the same windows of held-out text, in one run.

    One model at a time is in memory, in float32; of the first dense model, the reference of the
    KL, the last hidden states and the output matrix stay. The models are measured one after
    another: `measure_speed` lets them take turns.

    Args:
        models: model folders, or anything `convert` takes as a source.
        data: a folder of `<domain>.jsonl(.gz)` files, or `demo`.
        split: `heldout` (the documents `train` leaves out), `train`, or `all`.
        windows: per domain; fewer where a domain has less text.
        sequence_length: tokens per window.
        decode: measure generation too.
        names: shown instead of `models`.
        report: told about progress.

    Raises:
        UsageError: a model or the text is not usable, or the models' vocabularies differ.
    """
    compared = compared_models(models, names, report)
    costs = [cost(model.config, context=sequence_length) for model in compared]
    folder = compared[0].folder
    text = evaluation_windows(data, folder, windows, sequence_length, split, report=report)
    found: dict[int, Result] = {}
    reference: _Reference | None = None
    # dense models first: the others are compared with the first of them
    for i in sorted(range(len(compared)), key=lambda i: costs[i].experts > 0):
        found[i], itself = _measure(compared[i], costs[i], text, reference, decode, report)
        if reference is None and costs[i].experts == 0:
            reference = itself
            found[i] = replace(found[i], kl_to_reference=0.0, top1_agreement=1.0)
    return Comparison(
        reference=reference.name if reference else None,
        tokens=sum(map(len, text.values())) * (sequence_length - 1),
        sequence_length=sequence_length,
        results=[found[i] for i in range(len(compared))],
    )


class _Reference(NamedTuple):
    """What is needed of the dense model once its layers are gone."""

    name: str
    states: list[LogitsInput]  # of every window
    losses: list[list[float]]  # by domain and window


def _measure(
    model: ComparedModel,
    counted: Cost,
    text: Windows,
    reference: _Reference | None,
    decode: bool,
    report: ProgressFn,
) -> tuple[Result, _Reference]:
    """Return a model's row, and the model as a reference for others."""
    network = model.load(report)
    decode_tokens_per_s = _decode_tokens_per_s(network, text) if decode else None
    quality, speeds, states = Quality(), [], []
    total = sum(map(len, text.values()))
    measured = passes(network, text, quality, reference.states if reference else None)
    for done, (domain, state, elapsed_s) in enumerate(measured, start=1):
        speeds.append(state.hidden.shape[1] / elapsed_s)
        if reference is None and counted.experts == 0:
            states.append(state)
        report(Progress("evaluate", done, total, domain))
    losses = list(quality.losses.values())
    row = Result(
        name=model.name,
        perplexity=perplexity(quality.loss),
        domain_perplexity={name: perplexity(loss) for name, loss in quality.domain_loss.items()},
        excess_loss=paired_difference(reference.losses, losses) if reference else None,
        kl_to_reference=quality.kl_to_reference,
        top1_agreement=quality.top1_agreement,
        cost=counted,
        prefill_tokens_per_s=statistics.median(speeds),
        decode_tokens_per_s=decode_tokens_per_s,
    )
    return row, _Reference(model.name, states, losses)


def _decode_tokens_per_s(network: Any, text: Windows) -> float:
    """Time greedy generation; the prompt's pass is not counted."""
    window = next(iter(text.values()))[0]
    prompt = torch.from_numpy(window[:_DECODE_PROMPT])[None].to(device())
    seconds = []
    for _ in range(_DECODE_ROUNDS):
        cache, token, _ = prefill(network, prompt)
        seconds.append(decode(network, cache, token, _DECODE_TOKENS))
    return _DECODE_TOKENS / statistics.median(seconds)
