"""The tables of the leaderboard and of `plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moefy.report.tables import Rows, millions

if TYPE_CHECKING:
    from moefy.studies.plan import Plan
    from moefy.studies.scores import Score

_BRIEF = ("method", "active", "shared", "nats above dense", "KL to dense", "router gap closed")


def leaderboard_rows(scores: Sequence[Score], *, brief: bool = False) -> Rows:
    """Return header and rows of a leaderboard, the best of each active share first.

    Args:
        scores: one per row.
        brief: only the columns that fit a terminal.
    """
    domains = list(scores[0].domain_loss)
    header = ["method", "active", "shared", "loss", "nats above dense", *domains, "KL to dense"]
    header += ["FFN error", "router gap closed", "load max/mean", "construct s", "peak GiB"]
    rows = [header]
    for score in sorted(scores, key=lambda score: (-score.active / score.experts, score.loss)):
        error = sum(score.ffn_error) / len(score.ffn_error)
        peak = score.peak_rss_bytes
        rows.append(
            [
                score.method,
                f"{score.active}/{score.experts}",
                str(score.shared),
                f"{score.loss:.3f}",
                f"{score.nats_above_dense:.3f}",
                *(f"{score.domain_loss[domain]:.3f}" for domain in domains),
                f"{score.kl_to_dense:.3f}",
                f"{error:.3f}",
                "–" if score.router_gap_closed is None else f"{score.router_gap_closed:.0%}",
                "–" if score.load_imbalance is None else f"{score.load_imbalance:.1f}",
                f"{score.construct_s:.0f}",
                "–" if peak is None else f"{peak / 2**30:.1f}",
            ]
        )
    if brief:
        kept = [rows[0].index(name) for name in _BRIEF]
        rows = [[row[place] for place in kept] for row in rows]
    return rows


def plan_rows(plan: Plan) -> Rows:
    """Return header and rows of a plan: its candidates, the recommended one marked."""
    rows = [["split", "shared", "active", "of dense", "nats above dense", "prefill", "decode"]]
    rows[0] += ["meets target"]
    for candidate in plan.candidates:
        point, mark = candidate.point, "yes" if candidate.fits else ""
        rows.append(
            [
                point.split.name,
                str(point.shared),
                millions(candidate.cost.active_params),
                f"{candidate.cost.active_params / plan.dense.total_params:.0%}",
                f"{point.nats_above_dense:.3f}"
                + (f" ± {point.half_width:.3f}" if point.half_width else ""),
                f"× {point.prefill_of_dense:.2f}",
                f"× {point.decode_of_dense:.2f}",
                "recommended" if candidate is plan.recommended else mark,
            ]
        )
    return rows
