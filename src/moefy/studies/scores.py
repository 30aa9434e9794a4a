"""What the leaderboard measured: one score per row, kept in a file."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moefy.errors import OutputError
from moefy.storage import read_records, replace_file, write_records


@dataclass(frozen=True)
class Score:
    """What one method came to.

    Attributes:
        method: its name.
        experts, active, shared: slices of the FFN.
        loss: mean next-token loss on the evaluation windows, nats.
        nats_above_dense: loss minus that of the dense model.
        domain_loss: by domain.
        kl_to_dense: mean KL(dense ‖ model) over all positions, nats.
        ffn_error: by layer, Σω‖y − f‖²/Σω‖y‖² on the evaluation windows, y the dense FFN's output
            for the inputs that the converted layers give it.
        router_gap_closed: share of the way from a random choice of experts to the oracle's, in
            energy kept on the evaluation windows, mean over layers; None without routing.
        load_imbalance: largest over mean load of a layer's experts, mean over layers; None without
            routing.
        construct_s: seconds of construction, evaluation not counted.
        recipe: the choices; None for the dense model.
        peak_rss_bytes: most memory held while this row ran, None where the system does not tell.
    """

    method: str
    experts: int
    active: int
    shared: int
    loss: float
    nats_above_dense: float
    domain_loss: dict[str, float]
    kl_to_dense: float
    ffn_error: list[float]
    router_gap_closed: float | None
    load_imbalance: float | None
    construct_s: float
    peak_rss_bytes: int | None
    recipe: dict[str, Any] | None


def write_leaderboard(out: Path, scores: list[Score]) -> None:
    """Write `leaderboard.csv`, `leaderboard.md` and `leaderboard.png`."""
    from moefy.report.tables import markdown
    from moefy.studies.figures import leaderboard_figure
    from moefy.studies.tables import leaderboard_rows

    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "leaderboard.md", markdown(leaderboard_rows(scores)))
    rows = [_flat(score) for score in scores]
    with (out / "leaderboard.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
    leaderboard_figure(scores).savefig(out / "leaderboard.png", dpi=150)


def _flat(score: Score) -> dict[str, Any]:
    """Return a score as one row of numbers and names."""
    row = asdict(score)
    del row["recipe"]
    losses, errors = row.pop("domain_loss"), row.pop("ffn_error")
    row["perplexity"] = math.exp(score.loss)
    row |= {f"loss_{domain}": loss for domain, loss in losses.items()}
    row |= {f"perplexity_{domain}": math.exp(loss) for domain, loss in losses.items()}
    return row | {f"ffn_error_{layer_idx}": error for layer_idx, error in enumerate(errors)}


def key_of(score: Score) -> tuple[str, int, int]:
    """Return what tells rows apart: method, E and k."""
    return score.method, score.experts, score.active


def read_scores(out: Path, key: str) -> dict[tuple[str, int, int], Score]:
    """Read `scores.jsonl`.

    Raises:
        OutputError: it was measured under other conditions than `key`.
    """
    file = out / "scores.jsonl"
    known = {}
    for conditions, score in read_records(file, _conditions_and_score, what="score"):
        if conditions != key:
            raise OutputError(
                f"{file} was measured on another model, text or seed: choose another folder"
            )
        known[key_of(score)] = score
    return known


def write_scores(out: Path, key: str, scores: Iterable[Score]) -> None:
    """Write `scores.jsonl`, whole."""
    records = ({"conditions": key, **asdict(score)} for score in scores)
    write_records(out / "scores.jsonl", records)


def _conditions_and_score(record: dict[str, Any]) -> tuple[str, Score]:
    return record.pop("conditions"), Score(**record)
