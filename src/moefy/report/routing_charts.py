"""What routers do, as figures with their numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from moefy.report.chart import Chart, load_rows, matrix_rows
from moefy.report.routing_figures import overall_load, routing_figures, shown_layers
from moefy.report.routing_tables import k_rows
from moefy.report.tables import Rows

if TYPE_CHECKING:
    from moefy.evaluation.routing import Routing, RoutingResult

_CAPTIONS = {
    "load": "How often each routed expert was chosen on held-out text, by layer; 1 is even use, 3 "
    "and more are yellow.",
    "domains": "The same by domain, in the first, a middle and the last layer. Rows that look "
    "alike say that the routers do not tell the domains apart.",
    "coactivation": "Which experts are chosen together: of the tokens that chose e, the share that "
    "chose f too, in the first, a middle and the last layer.",
}


def routing_charts(result: RoutingResult) -> list[Chart]:
    """Return the figures of `routing_figures` with the numbers that each shows.

    The models' figures of one kind are together; that of other numbers of experts is the last.
    """
    charts = []
    for file, figure in routing_figures(result).items():
        name = file.removesuffix(".png")
        kind, _, place = name.removeprefix("routing-").partition("-")
        if kind == "k":
            rows = k_rows(result)
            caption = (
                "Loss with another number of experts chosen per token than the model was saved "
                "with; a ring is the saved one, the dashed line the dense model."
            )
        else:
            model = result.models[int(place or 1) - 1]
            rows = _ROWS[kind](model, result.tokens)
            caption = f"{model.name}. {_CAPTIONS[kind]}"
        charts.append((_KINDS.index(kind), Chart(name, figure, rows, caption)))
    return [chart for _, chart in sorted(charts, key=lambda pair: pair[0])]


def _load_rows(model: Routing, tokens: Mapping[str, int]) -> Rows:
    return load_rows(overall_load(model, tokens))


def _domain_rows(model: Routing, tokens: Mapping[str, int]) -> Rows:
    rows = [["layer", "domain", "expert", "load"]]
    for layer_idx in shown_layers(model):
        for domain in tokens:
            shares = model.load[domain][layer_idx]
            rows += [
                [str(layer_idx), domain, str(expert_idx), f"{share * model.experts:.5g}"]
                for expert_idx, share in enumerate(shares)
            ]
    return rows


def _coactivation_rows(model: Routing, _: Mapping[str, int]) -> Rows:
    rows = [["layer", "e", "f", "share of e's tokens that chose f"]]
    for layer_idx in shown_layers(model):
        entries = matrix_rows(np.array(model.coactivation[layer_idx]))
        rows += [[str(layer_idx), *entry] for entry in entries if entry[0] != entry[1]]
    return rows


_ROWS = {"load": _load_rows, "domains": _domain_rows, "coactivation": _coactivation_rows}
_KINDS = (*_ROWS, "k")
