"""What routers do, as figures with their numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moefy.report.chart import Chart
from moefy.report.routing_figures import routing_figures
from moefy.report.routing_tables import k_rows
from moefy.report.tables import Rows

if TYPE_CHECKING:
    from moefy.evaluation.routing import Routing, RoutingResult

_CAPTIONS = {
    "load": "share of a domain's choices that each expert gets, by layer",
    "domains": "how much the domains differ in the experts they choose, by layer, in bits; what "
    "chance alone would give beside it",
    "coactivation": "share of the tokens that chose one expert which chose the other too",
}


def routing_charts(result: RoutingResult) -> list[Chart]:
    """Return the figures of `routing_figures` with the numbers that each shows."""
    charts = []
    for file, figure in routing_figures(result).items():
        name = file.removesuffix(".png")
        kind, _, number = name.removeprefix("routing-").partition("-")
        if kind == "k":
            caption = (
                "Quality with another number of experts chosen per token than the model was "
                "saved with."
            )
            charts.append(Chart(name, figure, k_rows(result), caption))
            continue
        model = result.models[int(number) - 1 if number else 0]
        rows = _ROWS[kind](model)
        charts.append(Chart(name, figure, rows, f"{model.name}: {_CAPTIONS[kind]}."))
    return charts


def _load_rows(model: Routing) -> Rows:
    return [
        ["domain", "layer", "expert", "share of choices"],
        *(
            [domain, *place, share]
            for domain, layers in model.load.items()
            for *place, share in _entries(layers)
        ),
    ]


def _domain_rows(model: Routing) -> Rows:
    rows = [["layer", "distance of the domains, bits", "by chance, bits"]]
    for layer_idx, distance in enumerate(model.domain_distance):
        chance = "" if model.domain_noise is None else str(model.domain_noise[layer_idx])
        rows.append([str(layer_idx), str(distance), chance])
    return rows


def _coactivation_rows(model: Routing) -> Rows:
    rows = [["layer", "expert", "other expert", "share of its tokens"]]
    for layer_idx, layer in enumerate(model.coactivation):
        rows += [[str(layer_idx), *entry] for entry in _entries(layer)]
    return rows


def _entries(matrix: Sequence[Sequence[float]]) -> list[list[str]]:
    return [
        [str(i), str(j), str(value)] for i, row in enumerate(matrix) for j, value in enumerate(row)
    ]


_ROWS = {"load": _load_rows, "domains": _domain_rows, "coactivation": _coactivation_rows}
