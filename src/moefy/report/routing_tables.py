"""What routers do, as tables."""

from __future__ import annotations

from math import exp
from statistics import fmean
from typing import TYPE_CHECKING

from moefy.report.tables import Columns, Rows, millions, number, shown, table

if TYPE_CHECKING:
    from moefy.evaluation.routing import KQuality, RoutingResult, RoutingStats


def k_rows(result: RoutingResult) -> Rows:
    """Return header and rows of the quality by number of chosen experts, a model and k a row.

    The first row is the dense model's, if there is one.
    """

    def chosen(model: RoutingStats, k: int) -> str:
        return f"{k} of {model.experts}" + (", as saved" if k == model.active else "")

    columns: Columns[tuple[RoutingStats, KQuality]] = [
        ("model", lambda at: at[0].name),
        ("chosen", lambda at: chosen(at[0], at[1].k)),
        ("loss", lambda at: f"{at[1].loss:.3f}"),
        ("perplexity", lambda at: number(at[1].perplexity)),
        ("KL to dense", lambda at: shown(at[1].kl_to_reference, ".3f")),
        ("top-1 as dense", lambda at: shown(at[1].top1_agreement, ".1%")),
        ("active", lambda at: millions(at[1].active_params)),
    ]
    rows = table(((model, at) for model in result.models for at in model.quality), columns)
    if result.reference is not None and result.reference_loss is not None:
        loss = result.reference_loss
        dense = [result.reference, "dense", f"{loss:.3f}", number(exp(loss)), "–", "–", "–"]
        rows.insert(1, dense)
    return rows


def routing_rows(result: RoutingResult, *, means_only: bool = False) -> Rows:
    """Return header and rows of the load, a layer of a model a row, below them the model's mean."""

    def mean(values: list[float], layers: list[int]) -> float:
        return fmean(values[idx] for idx in layers)

    def dead(model: RoutingStats, layers: list[int]) -> str:
        count = fmean(len(model.dead[idx]) for idx in layers)
        return f"{count:g}" if count.is_integer() else f"{count:.1f}"

    def noise(model: RoutingStats, layers: list[int]) -> str:
        return "–" if model.domain_noise is None else f"{mean(model.domain_noise, layers):.4f}"

    columns: Columns[tuple[RoutingStats, str, list[int]]] = [
        ("model", lambda row: row[0].name),
        ("layer", lambda row: row[1]),
        ("entropy", lambda row: f"{mean(row[0].entropy, row[2]):.3f}"),
        ("dead", lambda row: dead(row[0], row[2])),
        ("max/mean", lambda row: f"{mean(row[0].max_over_mean, row[2]):.2f}"),
        ("domains (bits)", lambda row: f"{mean(row[0].domain_distance, row[2]):.4f}"),
        ("by chance (bits)", lambda row: noise(row[0], row[2])),
    ]
    items = []
    for model in result.models:
        layers = list(range(len(model.entropy)))
        if not means_only:
            items += [(model, str(idx), [idx]) for idx in layers]
        items.append((model, "mean", layers))
    return table(items, columns)
