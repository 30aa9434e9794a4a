"""Passes over held-out text: which experts were chosen, and what was predicted with k of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefy.evaluation.compare import Predictions
from moefy.evaluation.recall import Recall
from moefy.experts.active_experts import ActiveExperts
from moefy.experts.router_trace import RouterTrace
from moefy.hardware import device
from moefy.progress import Progress, ProgressFn

Text = Mapping[str, Int[np.ndarray, "_windows sequence"]]


@dataclass(frozen=True)
class Watched:
    """What a MoE model did.

    Attributes:
        choices: by domain, how often each expert was chosen in each window, with the saved k.
        pairs: over all domains, how many tokens chose both of two experts; on the diagonal, how
            many chose one.
        predictions: by k.
    """

    choices: dict[str, Float[np.ndarray, "_windows layers experts"]]
    pairs: Float[np.ndarray, "layers experts experts"]
    predictions: dict[int, Predictions]


def remember(network: Any, text: Text, report: ProgressFn, name: str) -> tuple[Recall, Predictions]:
    """Return a dense model without its layers, and what it predicted.

    Args:
        network: the model.
        text: token ids by domain.
        report: told about progress.
        name: of the model, for that.
    """
    recall, predictions = Recall(network), Predictions()
    total = sum(map(len, text.values()))
    for done, (_, ids) in enumerate(_windows(text), start=1):
        predictions.add(ids, _logits(network, ids), None)
        report(Progress(name, done, total))
    recall.forget_layers()
    return recall, predictions


def watch(
    network: Any,
    ks: Sequence[int],
    text: Text,
    recall: Recall | None,
    report: ProgressFn,
    name: str,
) -> Watched:
    """Run a MoE model with several numbers of active experts.

    Args:
        network: the model.
        ks: routed experts to choose per token; the model's own number must be among them.
        text: token ids by domain.
        recall: of the reference's passes over the same text.
        report: told about progress.
        name: of the model, for that.
    """
    saved = network.config.num_experts_per_tok
    trace = RouterTrace(network)
    choices: dict[str, list[Any]] = {domain: [] for domain in text}
    pairs: Any = 0
    predictions = {k: Predictions() for k in ks}
    total = len(ks) * sum(map(len, text.values()))
    for done, (domain, ids) in enumerate(_windows(text)):
        expected = recall.logits(done) if recall else None
        for place, k in enumerate(ks, start=1):
            trace.clear()
            with ActiveExperts(network, k), trace:
                logits = _logits(network, ids)
            if k == saved:
                runs = trace.runs().float()
                together = (runs.mT @ runs).double().cpu().numpy()
                choices[domain].append(np.diagonal(together, axis1=-2, axis2=-1).copy())
                pairs += together
            predictions[k].add(ids, logits, expected)
            report(Progress(name, done * len(ks) + place, total, f"{k} active"))
    by_domain = {domain: np.stack(windows) for domain, windows in choices.items()}
    return Watched(by_domain, pairs, predictions)


def _windows(text: Text) -> Iterator[tuple[str, Int[Tensor, " sequence"]]]:
    for domain, rows in text.items():
        for row in rows:
            yield domain, torch.from_numpy(row).to(device())


def _logits(network: Any, ids: Int[Tensor, " sequence"]) -> Float[Tensor, "sequence vocab"]:
    return network(ids[None], use_cache=False).logits[0]
