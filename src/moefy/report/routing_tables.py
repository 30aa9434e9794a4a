"""What routers do, as tables."""

from __future__ import annotations

from math import exp
from statistics import fmean
from typing import TYPE_CHECKING

from moefy.report.tables import Rows, millions, number

if TYPE_CHECKING:
    from moefy.evaluation.routing import RoutingResult, RoutingStats


def k_rows(result: RoutingResult) -> Rows:
    """Return header and rows of the quality by number of chosen experts, a model and k a row.

    The first row is the dense model's, if there is one.
    """
    rows = [["model", "chosen", "loss", "perplexity", "KL to dense", "top-1 as dense", "active"]]
    if result.reference is not None and result.reference_loss is not None:
        loss = result.reference_loss
        rows.append([result.reference, "dense", f"{loss:.3f}", number(exp(loss)), "–", "–", "–"])
    for model in result.models:
        for at in model.quality:
            kl, agreement = at.kl_to_reference, at.top1_agreement
            mark = ", as saved" if at.k == model.active else ""
            rows.append(
                [
                    model.name,
                    f"{at.k} of {model.experts}{mark}",
                    f"{at.loss:.3f}",
                    number(at.perplexity),
                    "–" if kl is None else f"{kl:.3f}",
                    "–" if agreement is None else f"{agreement:.1%}",
                    millions(at.active_params),
                ]
            )
    return rows


def routing_rows(result: RoutingResult) -> Rows:
    """Return header and rows of the load, a layer of a model a row, below them the model's mean."""
    rows = [["model", "layer", "entropy", "dead", "max/mean", "domains (bits)", "by chance (bits)"]]
    for model in result.models:
        rows += [_row(model, str(idx), [idx]) for idx in range(len(model.entropy))]
        rows.append(_row(model, "mean", range(len(model.entropy))))
    return rows


def _row(model: RoutingStats, label: str, layers: range | list[int]) -> list[str]:
    dead = fmean(len(model.dead[idx]) for idx in layers)
    noise = model.domain_noise
    return [
        model.name,
        label,
        f"{fmean(model.entropy[idx] for idx in layers):.3f}",
        f"{dead:g}" if dead.is_integer() else f"{dead:.1f}",
        f"{fmean(model.max_over_mean[idx] for idx in layers):.2f}",
        f"{fmean(model.domain_distance[idx] for idx in layers):.4f}",
        "–" if noise is None else f"{fmean(noise[idx] for idx in layers):.4f}",
    ]
