"""What the routers of MoE models do on held-out text, and what another number of experts costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moefy.data.domains import Split
from moefy.progress import ProgressFn, silent


@dataclass(frozen=True)
class KQuality:
    """One model with k of its routed experts chosen per token.

    Attributes:
        k: routed experts chosen.
        loss: mean −log p of the next token, nats, over all domains.
        perplexity: of that loss.
        kl_to_reference: mean over tokens of KL(reference ‖ model), nats; None without a reference.
        top1_agreement: share of positions where the likeliest token is the reference's; None
            without a reference.
        active_params: parameters that one token uses.
    """

    k: int
    loss: float
    perplexity: float
    kl_to_reference: float | None
    top1_agreement: float | None
    active_params: int


@dataclass(frozen=True)
class Routing:
    """What one model's routers chose, with as many experts as the model was saved with.

    A *choice* is one expert chosen for one token: a token makes `active` of them in every layer.

    Attributes:
        name: as given.
        experts: routed experts per layer, E.
        active: routed experts chosen per token, as saved.
        shared: slices that always run; None where they are no whole number of experts.
        load: by domain, layer and expert: the share of that domain's choices; sums to 1.
        entropy: by layer, of the load over all tokens, divided by log E; 1 is even use.
        dead: by layer, the experts that were never chosen.
        max_over_mean: by layer, the largest load over the mean one.
        coactivation: by layer, [e][f]: share of the tokens that chose e which chose f too, to 4
            digits; 0 for all f where e is dead.
        domain_distance: by layer, the Jensen–Shannon divergence of the domains' loads, bits; see
            `routing_stats.divergence`.
        domain_noise: by layer, what that would be if the domains did not differ, as far as one
            domain's windows tell; None where a domain has a single window. See
            `routing_stats.expected_divergence`.
        quality: by k, ascending.
    """

    name: str
    experts: int
    active: int
    shared: int | None
    load: dict[str, list[list[float]]]
    entropy: list[float]
    dead: list[list[int]]
    max_over_mean: list[float]
    coactivation: list[list[list[float]]]
    domain_distance: list[float]
    domain_noise: list[float] | None
    quality: list[KQuality]


@dataclass(frozen=True)
class RoutingResult:
    """What `measure_routing` measured.

    Attributes:
        reference: name of the dense model, or None.
        reference_loss: its mean −log p of the next token, nats, on the same text.
        tokens: by domain, tokens that were routed.
        sequence_length: tokens per window.
        models: one per MoE model, in the order given.
    """

    reference: str | None
    reference_loss: float | None
    tokens: dict[str, int]
    sequence_length: int
    models: list[Routing]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def measure_routing(
    models: str | Path | Sequence[str | Path],
    *,
    data: str | Path = "demo",
    split: Split = "heldout",
    windows: int = 8,
    sequence_length: int = 512,
    active: Sequence[int] | None = None,
    names: Sequence[str] | None = None,
    report: ProgressFn = silent,
) -> RoutingResult:
    """Watch the routers of MoE models on held-out text."""
    raise NotImplementedError
