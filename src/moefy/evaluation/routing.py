"""What the routers of MoE models do on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float

from moefy.checkpoint.cost import ffn_shape
from moefy.data.records import Side
from moefy.errors import UsageError
from moefy.evaluation.compare import ComparedModel, compared_models
from moefy.evaluation.heldout import Windows, evaluation_windows
from moefy.experts.routers import RouterTrace
from moefy.hardware import device
from moefy.progress import Progress, ProgressFn, silent

_CUTS = 64  # of every domain's windows into halves

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
    # by layer, that of domains that do not differ (`expected_divergence`); None where a domain has
    # a single window
    domain_noise: list[float] | None


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

    Args:
        models: model folders, or anything `convert` takes as a source; dense ones are left out.
        data: a folder of `<domain>.jsonl(.gz)` files, or `demo`.
        split: `heldout` (the documents `train` leaves out), `train`, or `all`.
        windows: per domain; fewer where a domain has less text.
        sequence_length: tokens per window.
        names: to show instead of `models`.
        report: told about progress.

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
    counts: dict[str, list[Counts]] = {domain: [] for domain in text}
    rows = [(domain, row) for domain, several in text.items() for row in several]
    with trace:
        for done, (domain, row) in enumerate(rows, start=1):
            network(torch.from_numpy(row)[None].to(device()), use_cache=False, logits_to_keep=1)
            # [layers, tokens, experts]: how many tokens chose each expert
            counts[domain].append(trace.runs().double().sum(1).cpu().numpy())
            trace.clear()
            report(Progress(model.name, done, len(rows)))
    windows = [np.stack(each) for each in counts.values()]  # by domain [windows, layers, experts]
    loads = [load_shares(domain.sum(0)) for domain in windows]
    choices = np.sum([domain.sum(0) for domain in windows], axis=0)
    load = load_shares(choices)
    noise = expected_divergence(windows)
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
        domain_noise=None if noise is None else noise.tolist(),
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


def expected_divergence(
    windows: Sequence[Float[np.ndarray, "_windows layers experts"]], *, seed: int = 0
) -> Float[np.ndarray, " layers"] | None:
    """Return the divergence to expect of domains that do not differ, from windows of the same size.

    Each domain's n windows are cut at random into halves of a and b windows, 64 times. To first
    order the divergence of two halves is v/8·(1/a + 1/b), and that of D domains v/2·(D − 1)/(D·n),
    with the same v, so each of the former is multiplied by 4·(D − 1)/(D·n·(1/a + 1/b)); the mean
    over cuts and domains is returned. It is too small where documents are longer than a window,
    because their windows are then alike.

    Args:
        windows: of every domain, how often each expert was chosen in each window.
        seed: of the cuts.

    Returns:
        By layer, bits; None where a domain has one window, which has no halves.
    """
    if min(map(len, windows)) < 2:
        return None
    generator = np.random.default_rng(seed)
    found = [
        np.mean([_scaled_halves(domain, generator) for _ in range(_CUTS)], axis=0)
        for domain in windows
    ]
    share: Float[np.ndarray, " layers"] = np.mean(found, axis=0)
    # the rest of the factor, 4/(n·(1/a + 1/b)), depends on the cut: `_scaled_halves` has it
    return share * (len(windows) - 1) / len(windows)


def _scaled_halves(
    windows: Float[np.ndarray, "_windows layers experts"], generator: np.random.Generator
) -> Float[np.ndarray, " layers"]:
    number = len(windows)
    first: Bool[np.ndarray, " _windows"] = generator.permutation(number) < number // 2
    halves = [load_shares(windows[chosen].sum(0)) for chosen in (first, ~first)]
    inverse_sizes = 1 / first.sum() + 1 / (~first).sum()
    return divergence(np.stack(halves)) * 4 / (number * inverse_sizes)


def _entropy_bits(load: Float[np.ndarray, "*any experts"]) -> Float[np.ndarray, "*any"]:
    # 0·log 0 is 0
    logs = np.log2(load, out=np.zeros_like(load), where=load > 0)
    return -(load * logs).sum(-1)
