"""Models side by side: perplexity, distance from the dense model, cost and measured speed."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from moefy.checkpoint.cost import Cost, cost
from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.data.domains import Domain, Split, documents_of, open_domains
from moefy.data.packing import pack
from moefy.errors import CorpusError
from moefy.evaluation.candidates import candidates_of
from moefy.evaluation.paired import Interval, paired_difference
from moefy.evaluation.recall import Recall
from moefy.hardware import device, synchronise
from moefy.progress import Progress, ProgressFn, silent

_DECODE_TOKENS = 24
_DECODE_ROUNDS = 3


@dataclass(frozen=True)
class Result:
    """One model's row.

    Attributes:
        name: as given.
        perplexity: over all tokens of all domains.
        domain_perplexity: by domain.
        excess_loss: mean loss minus the reference's on the same windows, nats per token, with its
            95 % interval over windows; None for the reference and without one.
        kl_to_reference: mean over tokens of KL(reference ‖ model), nats; None without a reference.
        top1_agreement: share of positions where the likeliest token is the reference's; None
            without a reference.
        cost: parameters and FLOPs.
        prefill_tokens_per_s: median over the evaluation windows.
        decode_tokens_per_s: median of greedy generation, batch 1; None if not measured.
    """

    name: str
    perplexity: float
    domain_perplexity: dict[str, float]
    excess_loss: Interval | None
    kl_to_reference: float | None
    top1_agreement: float | None
    cost: Cost
    prefill_tokens_per_s: float
    decode_tokens_per_s: float | None


@dataclass(frozen=True)
class Comparison:
    """What `evaluate` measured.

    Attributes:
        reference: the dense model that the KL is taken to, or None.
        tokens: predicted tokens per model.
        sequence_length: tokens per window.
        results: one per model, in the order given.
    """

    reference: str | None
    tokens: int
    sequence_length: int
    results: list[Result]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def token_losses(
    logits: Float[Tensor, "tokens vocab"], ids: Int[Tensor, " tokens"]
) -> Float[Tensor, " predicted"]:
    """Return −log p of every token but the first, in nats."""
    return F.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")


def token_divergences(
    reference: Float[Tensor, "tokens vocab"], logits: Float[Tensor, "tokens vocab"]
) -> Float[Tensor, " tokens"]:
    """Return KL(p ‖ q) = Σ p·(log p − log q) for every position, in nats.

    Args:
        reference: logits of p.
        logits: logits of q.
    """
    log_p, log_q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


@dataclass
class Predictions:
    """What a model predicted, by token.

    Attributes:
        losses: −log p of the next token, nats.
        divergences: KL(reference ‖ model), nats; empty without a reference.
        agreements: whether the likeliest token is the reference's; empty without a reference.
    """

    losses: list[float] = field(default_factory=list)
    divergences: list[float] = field(default_factory=list)
    agreements: list[bool] = field(default_factory=list)

    def add(
        self,
        ids: Int[Tensor, " tokens"],
        logits: Float[Tensor, "tokens vocab"],
        expected: Float[Tensor, "tokens vocab"] | None,
    ) -> None:
        """Add a window.

        Args:
            ids: its tokens.
            logits: of the model.
            expected: of the reference.
        """
        self.losses += token_losses(logits, ids).tolist()
        if expected is not None:
            self.divergences += token_divergences(expected, logits).tolist()
            self.agreements += (expected.argmax(-1) == logits.argmax(-1)).tolist()


@torch.inference_mode()
def evaluate(
    models: str | Path | Sequence[str | Path],
    *,
    data: str | Path = "demo",
    split: Split = "heldout",
    windows: int = 8,
    sequence_length: int = 512,
    decode: bool = True,
    names: Sequence[str] | None = None,
    report: ProgressFn = silent,
) -> Comparison:
    """Measure models on the same windows of held-out text, in one run.

    One model at a time is in memory, in float32; of the first dense model, the reference of the
    KL, the last hidden states and the output matrix stay. The speeds are those of that moment:
    `measure_speed` lets the models take turns.

    Args:
        models: model folders, or anything `convert` takes as a source.
        data: a folder of `<domain>.jsonl(.gz)` files, or `demo`.
        split: `heldout` (the documents `train` leaves out), `train`, or `all`.
        windows: per domain; fewer where a domain has less text.
        sequence_length: tokens per window.
        decode: measure generation too.
        names: to show instead of `models`.
        report: told about progress.

    Raises:
        UsageError: a model or the text is not usable, or the models' vocabularies differ.
    """
    candidates = candidates_of(models, names, report)
    shown = [candidate.name for candidate in candidates]
    folders = [candidate.folder for candidate in candidates]
    costs = [cost(candidate.config, context=sequence_length) for candidate in candidates]
    text = evaluation_windows(
        open_domains(data, report=report),
        split,
        load_tokenizer(folders[0]),
        windows=windows,
        sequence_length=sequence_length,
        report=report,
    )
    reference = next((i for i, c in enumerate(costs) if c.experts == 0), None)
    recall: Recall | None = None
    measured: dict[int, _Measured] = {}
    for i in sorted(range(len(folders)), key=lambda i: i != reference):
        report(Progress("load", len(measured), len(folders), shown[i]))
        network = load_model(folders[i], dtype=torch.float32).to(device())
        speed = _decode_speed(network, next(iter(text.values()))[0]) if decode else None
        watched = Recall(network) if i == reference else None
        measured[i] = _measure(network, text, recall, speed, report)
        if watched is not None:
            watched.forget_layers()
            recall = watched
        del network
    report(Progress("load", len(folders), len(folders)))

    results = []
    for i, name in enumerate(shown):
        found = measured[i]
        kl, top1, excess = None, None, None
        if reference is not None:
            if i != reference:
                excess = paired_difference(
                    measured[reference].window_losses(sequence_length - 1),
                    found.window_losses(sequence_length - 1),
                )
            kl = statistics.fmean(found.all_of("divergences") or [0.0])
            top1 = statistics.fmean(found.all_of("agreements") or [True])
        results.append(
            Result(
                name=name,
                perplexity=perplexity(found.all_of("losses")),
                domain_perplexity={
                    domain: perplexity(each.losses) for domain, each in found.predictions.items()
                },
                excess_loss=excess,
                kl_to_reference=kl,
                top1_agreement=top1,
                cost=costs[i],
                prefill_tokens_per_s=sequence_length / statistics.median(found.seconds),
                decode_tokens_per_s=found.decode_tokens_per_s,
            )
        )
    tokens = sum(map(len, text.values())) * (sequence_length - 1)
    label = None if reference is None else shown[reference]
    return Comparison(label, tokens, sequence_length, results)


def perplexity(losses: Sequence[float]) -> float:
    """Return exp of the mean loss, infinite where that is too large for a float.

    Args:
        losses: −log p of tokens, nats.
    """
    mean = statistics.fmean(losses)
    return math.exp(mean) if mean < 700 else math.inf


def evaluation_windows(
    domains: Sequence[Domain],
    split: Split,
    tokenizer: Any,
    *,
    windows: int,
    sequence_length: int,
    report: ProgressFn = silent,
) -> dict[str, Int[np.ndarray, "windows sequence"]]:
    """Return evaluation windows by domain.

    Args:
        domains: of the corpus.
        split: whose documents to read.
        tokenizer: of the models.
        windows: per domain; fewer where a domain has less text.
        sequence_length: tokens per window.
        report: told about progress.

    Raises:
        CorpusError: a domain is shorter than one window.
    """
    text = {}
    for done, domain in enumerate(domains):
        report(Progress("tokenise", done, len(domains), domain.name))
        packed = pack(
            documents_of(domain, split),
            tokenizer,
            sequence_length=sequence_length,
            max_windows=windows,
        )
        if not len(packed):
            raise CorpusError(
                f"the {split} documents of the domain {domain.name!r} are shorter than one window "
                f"of {sequence_length} tokens: add text, lower --sequence-length, or pass "
                "--split all"
            )
        text[domain.name] = packed
    report(Progress("tokenise", len(domains), len(domains)))
    return text


@dataclass(frozen=True)
class _Measured:
    """What one model predicted by domain, and times of the windows."""

    predictions: dict[str, Predictions]
    seconds: list[float]
    decode_tokens_per_s: float | None

    def all_of(self, kind: Literal["losses", "divergences", "agreements"]) -> list[Any]:
        """Return the numbers of all domains, one after the other."""
        return [each for found in self.predictions.values() for each in getattr(found, kind)]

    def window_losses(self, tokens: int) -> list[list[float]]:
        """Return each domain's mean losses of its windows, which predict so many tokens each."""
        return [
            np.reshape(found.losses, (-1, tokens)).mean(-1).tolist()
            for found in self.predictions.values()
        ]


def _measure(
    network: Any,
    text: dict[str, Int[np.ndarray, "windows sequence"]],
    recall: Recall | None,
    decode_tokens_per_s: float | None,
    report: ProgressFn,
) -> _Measured:
    measured = _Measured({domain: Predictions() for domain in text}, [], decode_tokens_per_s)
    total, done = sum(map(len, text.values())), 0
    for domain, rows in text.items():
        for row in rows:
            ids = torch.from_numpy(row).to(device())
            logits, elapsed_s = _forward(network, ids)
            measured.seconds.append(elapsed_s)
            expected = recall.logits(done) if recall else None
            measured.predictions[domain].add(ids, logits, expected)
            done += 1
            report(Progress("evaluate", done, total, domain))
    return measured


def _forward(network: Any, ids: Tensor) -> tuple[Tensor, float]:
    synchronise()
    started = time.perf_counter()
    logits = network(ids[None], use_cache=False).logits[0]
    synchronise()
    return logits, time.perf_counter() - started


def _decode_speed(network: Any, window: Int[np.ndarray, " sequence"]) -> float:
    """Time greedy generation; the prompt's pass is not counted."""
    prompt = torch.from_numpy(window[:32])[None].to(device())
    speeds = []
    for _ in range(_DECODE_ROUNDS):
        out = network(prompt, use_cache=True)
        synchronise()
        started = time.perf_counter()
        for _ in range(_DECODE_TOKENS):
            token = out.logits[:, -1:].argmax(-1)
            out = network(token, past_key_values=out.past_key_values, use_cache=True)
        synchronise()
        speeds.append(_DECODE_TOKENS / (time.perf_counter() - started))
    return statistics.median(speeds)
