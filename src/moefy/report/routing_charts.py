"""What routers do, as figures with their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from moefy.report.chart import Chart, load_rows, matrix_rows
from moefy.report.routing_figures import (
    coactivation_maps,
    domain_loads,
    expert_load,
    overall_load,
    quality_curve,
    shown_layers,
)
from moefy.report.routing_tables import k_rows
from moefy.report.tables import Rows

if TYPE_CHECKING:
    from moefy.evaluation.routing import RoutingResult, RoutingStats


def routing_charts(result: RoutingResult) -> list[Chart]:
    """Return figures with their numbers.

    Of each model `routing-load`, `routing-domains` and `routing-coactivation`, or where there are
    several `routing-load-1` and so on in their order, those of one kind together; of all models the
    last, `routing-k`.
    """
    charts = []
    for kind, (draw, rows_of, caption) in _OF_A_MODEL.items():
        for place, model in enumerate(result.models, start=1):
            name = f"routing-{kind}" + (f"-{place}" if len(result.models) > 1 else "")
            rows = rows_of(model, result.tokens)
            charts.append(Chart(name, draw(model, result.tokens), rows, f"{model.name}. {caption}"))
    caption = (
        "Loss with another number of experts chosen per token than the model was saved with; a "
        "ring is the saved one, the dashed line the dense model."
    )
    charts.append(Chart("routing-k", quality_curve(result), k_rows(result), caption))
    return charts


def _load_rows(model: RoutingStats, tokens: Mapping[str, int]) -> Rows:
    return load_rows(overall_load(model, tokens))


def _domain_rows(model: RoutingStats, tokens: Mapping[str, int]) -> Rows:
    rows = [["layer", "domain", "expert", "load"]]
    for layer_idx in shown_layers(model):
        for domain in tokens:
            shares = model.load[domain][layer_idx]
            rows += [
                [str(layer_idx), domain, str(expert_idx), f"{share * model.experts:.5g}"]
                for expert_idx, share in enumerate(shares)
            ]
    return rows


def _coactivation_rows(model: RoutingStats, _: Mapping[str, int]) -> Rows:
    rows = [["layer", "e", "f", "share of e's tokens that chose f"]]
    for layer_idx in shown_layers(model):
        entries = matrix_rows(np.array(model.coactivation[layer_idx]))
        rows += [[str(layer_idx), *entry] for entry in entries if entry[0] != entry[1]]
    return rows


_OF_A_MODEL: dict[str, tuple[Callable[..., Figure], Callable[..., Rows], str]] = {
    "load": (
        expert_load,
        _load_rows,
        "How often each routed expert was chosen, by layer; 1 is even use, 3 and more are yellow.",
    ),
    "domains": (
        domain_loads,
        _domain_rows,
        "The same by domain, in the first, a middle and the last layer. Rows that look alike say "
        "that the routers do not tell the domains apart.",
    ),
    "coactivation": (
        coactivation_maps,
        _coactivation_rows,
        "Which experts are chosen together: of the tokens that chose e, the share that chose f "
        "too, in the first, a middle and the last layer.",
    ),
}
"""How to draw a kind, its numbers, and its caption."""
