"""What the routers of MoE models do on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from moefy.checkpoint.cost import ffn_shape
from moefy.data.records import Side
from moefy.errors import UsageError
from moefy.evaluation.compare import ComparedModel, compared_models
from moefy.evaluation.heldout import Windows, evaluation_windows
from moefy.experts.routers import RouterTrace
from moefy.hardware import device
from moefy.progress import Progress, ProgressFn, silent

Counts = Float[np.ndarray, "layers experts"]


@dataclass(frozen=True)
class RoutingStats:
    """What one model's routers chose.

    A *choice* is one expert chosen for one token: a token makes `active` of them in every layer.
    """

    name: str
    experts: int  # routed experts per layer, E
    active: int  # routed experts chosen per token
    shared: int | None  # slices that always run; None where they are no whole number of experts
    load: dict[str, list[list[float]]]  # by domain, layer and expert: share of the domain's choices
    entropy: list[float]  # by layer, of the load over all tokens, over log E; 1 is even use
    dead: list[list[int]]  # by layer, experts that were never chosen
    max_over_mean: list[float]  # by layer, the largest load over the mean one
    domain_distance: list[float]  # by layer, bits: `divergence` of the domains' loads


@dataclass(frozen=True)
class RoutingResult:
    """What `measure_routing` measured."""

    tokens: dict[str, int]  # by domain, tokens that were routed
    sequence_length: int  # tokens per window
    models: list[RoutingStats]  # the MoE models, in the order given


@torch.inference_mode()
def measure_routing(
    models: str | Path | Sequence[str | Path],
    *,
    data: str | Path = "demo",
    split: Side = "heldout",
    windows: int = 8,
    sequence_length: int = 512,
    names: Sequence[str] | None = None,
    report: ProgressFn = silent,
) -> RoutingResult:
    """Watch the routers of MoE models on held-out text, one model in memory, in float32.

    The arguments are those of `evaluate`; dense models are left out.

    Raises:
        UsageError: no model has experts, a model or the text is not usable, or the models'
            vocabularies differ.
    """
    compared = compared_models(models, names, report)
    routed = [each for each in compared if ffn_shape(each.config).experts]
    if not routed:
        raise UsageError(
            f"{', '.join(each.name for each in compared)}: no model has experts to choose from; "
            "name one that `moefy convert` wrote"
        )
    folder = compared[0].folder
    text = evaluation_windows(data, folder, windows, sequence_length, split, report=report)
    return RoutingResult(
        tokens={domain: rows.size for domain, rows in text.items()},
        sequence_length=sequence_length,
        models=[_watch(model, text, report) for model in routed],
    )


def _watch(model: ComparedModel, text: Windows, report: ProgressFn) -> RoutingStats:
    network = model.load(report)
    shape, trace = ffn_shape(model.config), RouterTrace(network)
    counts: dict[str, Counts] = dict.fromkeys(text, np.zeros(()))
    rows = [(domain, row) for domain, several in text.items() for row in several]
    with trace:
        for done, (domain, row) in enumerate(rows, start=1):
            network(torch.from_numpy(row)[None].to(device()), use_cache=False, logits_to_keep=1)
            # [layers, tokens, experts]: how many tokens chose each expert
            found = trace.runs().double().sum(1).cpu().numpy()
            counts[domain] = counts[domain] + found
            trace.clear()
            report(Progress("routing", done, len(rows), model.name))
    loads = [load_shares(each) for each in counts.values()]
    choices = np.sum([*counts.values()], axis=0)
    load = load_shares(choices)
    return RoutingStats(
        name=model.name,
        experts=shape.experts,
        active=shape.active,
        shared=None if shape.shared_size % shape.size else shape.shared_size // shape.size,
        load={domain: shares.tolist() for domain, shares in zip(text, loads, strict=True)},
        entropy=relative_entropy(load).tolist(),
        dead=[np.flatnonzero(layer == 0).tolist() for layer in choices],
        max_over_mean=(load.max(-1) * shape.experts).tolist(),
        domain_distance=divergence(np.stack(loads)).tolist(),
    )


def load_shares(choices: Counts) -> Counts:
    """Return each expert's share of its layer's choices; they sum to 1.

    Args:
        choices: how often each expert was chosen.
    """
    return choices / choices.sum(-1, keepdims=True)


def relative_entropy(load: Counts) -> Float[np.ndarray, " layers"]:
    """Return −Σ_e p_e·log p_e / log E: 1 for even use, 0 where one expert takes everything.

    Args:
        load: p, sums to 1 over the experts. A single expert is used evenly.
    """
    num_experts = load.shape[-1]
    return _entropy_bits(load) / np.log2(num_experts) if num_experts > 1 else np.ones(len(load))


def divergence(
    loads: Float[np.ndarray, "domains layers experts"],
) -> Float[np.ndarray, " layers"]:
    """Return the Jensen–Shannon divergence of the domains' loads, in bits.

    JSD = 1/D·Σ_d KL(p_d ‖ m) = H(m) − 1/D·Σ_d H(p_d), with p_d the load of domain d, m their mean
    and H the entropy (Lin 1991, "Divergence measures based on the Shannon entropy", section V,
    with equal weights): the bits that one choice tells about the domain, 0 to log2 D.

    Args:
        loads: p, sums to 1 over the experts.
    """
    mixed: Float[np.ndarray, " layers"] = _entropy_bits(loads.mean(0))
    # rounding may leave a negative number where all domains are alike
    return np.maximum(mixed - _entropy_bits(loads).mean(0), 0)


def _entropy_bits(load: Float[np.ndarray, "*any experts"]) -> Float[np.ndarray, "*any"]:
    # 0·log 0 is 0
    logs = np.log2(load, out=np.zeros_like(load), where=load > 0)
    return -(load * logs).sum(-1)
