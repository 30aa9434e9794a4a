"""What routers do, as tables."""

from __future__ import annotations

from math import exp, isnan, nan
from typing import TYPE_CHECKING

import numpy as np

from moefy.report.tables import Rows, millions, number, shown

if TYPE_CHECKING:
    from moefy.evaluation.routing import RoutingResult


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
            mark = ", as saved" if at.k == model.active else ""
            row = [model.name, f"{at.k} of {model.experts}{mark}", f"{at.loss:.3f}"]
            row += [number(at.perplexity), shown(at.kl_to_reference, ".3f")]
            rows.append([*row, shown(at.top1_agreement, ".1%"), millions(at.active_params)])
    return rows


def routing_rows(result: RoutingResult) -> Rows:
    """Return header and rows of the load, a layer of a model a row, below them the model's mean."""
    rows = [["model", "layer", "entropy", "dead", "max/mean", "domains (bits)", "by chance (bits)"]]
    for model in result.models:
        layers = len(model.entropy)
        dead, noise = [len(experts) for experts in model.dead], model.domain_noise or [nan] * layers
        # An absent noise becomes nan, so that one array holds all columns.
        columns = [model.entropy, dead, model.max_over_mean, model.domain_distance, noise]
        stats = np.array(columns).T  # [layers, columns]
        lines = [*((str(idx), stats[idx]) for idx in range(layers)), ("mean", stats.mean(0))]
        for label, (entropy, died, peak, distance, chance) in lines:
            row = [model.name, label, f"{entropy:.3f}", f"{died:.1f}".removesuffix(".0")]
            row += [f"{peak:.2f}", f"{distance:.4f}", "–" if isnan(chance) else f"{chance:.4f}"]
            rows.append(row)
    return rows
