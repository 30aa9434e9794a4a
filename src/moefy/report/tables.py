"""Results as tables: one list of columns for the terminal, Markdown and HTML."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moefy.checkpoint.inspect import Inspection
    from moefy.evaluation.compare import Comparison
    from moefy.evaluation.speed import SpeedComparison
    from moefy.studies.plan import Plan
    from moefy.studies.scores import Score
    from moefy.training.dry_run import DryRun

Rows = list[list[str]]


def comparison_rows(comparison: Comparison) -> Rows:
    """Return header and rows of a comparison, every cell as text."""
    domains = list(comparison.results[0].domain_perplexity)
    header = ["model", "perplexity", *domains, "KL to dense", "top-1", "params", "active"]
    header += ["GFLOP/token", "prefill tok/s", "decode tok/s"]
    rows = [header]
    for result in comparison.results:
        counted = result.cost
        kl, top1 = result.kl_to_reference, result.top1_agreement
        decode = result.decode_tokens_per_s
        rows.append(
            [
                result.name,
                number(result.perplexity),
                *(number(result.domain_perplexity[domain]) for domain in domains),
                "–" if kl is None else f"{kl:.3f}",
                "–" if top1 is None else f"{top1:.1%}",
                millions(counted.total_params),
                millions(counted.active_params),
                f"{counted.flops_per_token / 1e9:.3f}",
                f"{result.prefill_tokens_per_s:.0f}",
                "–" if decode is None else f"{decode:.1f}",
            ]
        )
    return rows


def speed_rows(comparison: SpeedComparison) -> Rows:
    """Return header and rows of measured speeds."""
    header = ["phase", "batch", "model", "tok/s", "of the active size", "experts by"]
    rows = [[*header, "GB/s", "GFLOP/s", "operations", "bound by"]]
    for speed in comparison.speeds:
        share = speed.of_active_size
        rows.append(
            [
                speed.phase,
                str(speed.batch),
                speed.model,
                number(speed.tokens_per_s),
                "–" if share is None else f"{share:.0%}",
                speed.implementation or "–",
                f"{speed.bytes_per_s / 1e9:.1f}",
                f"{speed.flops_per_s / 1e9:.0f}",
                "–" if speed.operations is None else f"{speed.operations:,}",
                f"{speed.bound_by} {speed.limits[speed.bound_by]:.0%}",
            ]
        )
    return rows


def speed_title(comparison: SpeedComparison) -> str:
    """Say what was measured, and on what."""
    machine = comparison.machine
    place = f"{machine.threads} CPU threads" if machine.device == "cpu" else machine.device
    return (
        f"{comparison.runtime}, {machine.dtype}, {comparison.prompt_tokens} tokens of prompt and "
        f"{comparison.new_tokens} decoded; {place}: {machine.bytes_per_s / 1e9:.1f} GB/s, "
        f"{machine.flops_per_s / 1e9:.0f} GFLOP/s"
    )


def inspection_rows(inspection: Inspection) -> Rows:
    """Return header and rows of an inspection: each split beside the dense model."""
    rows = [["split", "total", "active", "GFLOP/token", "of dense"]]
    baseline = inspection.costs.get("dense")
    for label, counted in inspection.costs.items():
        share = f"{counted.flops_per_token / baseline.flops_per_token:.0%}" if baseline else "–"
        rows.append(
            [
                label,
                millions(counted.total_params),
                millions(counted.active_params),
                f"{counted.flops_per_token / 1e9:.3f}",
                share,
            ]
        )
    return rows


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


def mixture_rows(log: list[dict[str, Any]]) -> Rows:
    """Return header and rows of a mixture's history: one row for each domain and change.

    Args:
        log: as for `figures.mixture_weights`. The losses of the weights that a run starts with are
            empty.
    """
    rows = [["step", "tokens", "domain", "weight", "loss", "reference"]]
    tokens_per_step = log[0]["tokens"] // log[0]["step"]
    for update in (line["mixture"] for line in log if "mixture" in line):
        step = update["step"]
        for domain, weight in update["weights"].items():
            losses = (update[key].get(domain, "") for key in ("losses", "reference"))
            cells = (step, step * tokens_per_step, domain, weight, *losses)
            rows.append([str(cell) for cell in cells])
    return rows


def write_csv(path: Path, rows: Rows) -> None:
    """Write rows as a CSV file."""
    with path.open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def corpus_rows(record: dict[str, Any]) -> Rows:
    """Return header and rows of a prepared corpus's record, a domain a row."""
    rows = [["domain", "documents", "tokens", "held-out documents", "held-out tokens"]]
    rows[0] += ["characters/token", "filtered", "broken"]
    for domain, found in record["domains"].items():
        tokens = found["tokens"] + found["heldout_tokens"]
        characters = found["characters"] + found["heldout_characters"]
        rows.append(
            [
                domain,
                f"{found['documents']:,}",
                f"{found['tokens']:,}",
                f"{found['heldout_documents']:,}",
                f"{found['heldout_tokens']:,}",
                f"{characters / tokens:.2f}" if tokens else "–",
                f"{found['filtered']:,}",
                f"{found['broken_lines']:,}",
            ]
        )
    return rows


def markdown(rows: Rows) -> str:
    """Return rows as a Markdown table, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "".join(f"| {' | '.join(row)} |\n" for row in [rows[0], rule, *rows[1:]])


def rows_of(records: Sequence[Mapping[str, str]]) -> Rows:
    """Return header and rows of records that all have the same keys."""
    return [list(records[0]), *(list(record.values()) for record in records)]


def dry_run_rows(found: DryRun) -> Rows:
    """Return header and rows of a dry run, a figure a row."""
    gib = 2**30
    teacher = [["the teacher's weights: GiB a process", f"{found.teacher_bytes / gib:.2f}"]]
    return [
        ["of the run", ""],
        ["optimizer steps", f"{found.steps:,}"],
        ["tokens a step", f"{found.tokens_per_step:,}"],
        ["passes a step and process", f"{found.passes_per_step:,}"],
        ["parameters", f"{found.total_params:,}"],
        ["active parameters", f"{found.active_params:,}"],
        ["learned parameters", f"{found.learned_params:,}"],
        ["weights, gradients, optimizer: GiB a process", f"{found.state_bytes / gib:.2f}"],
        ["activations of a pass: GiB a process", f"{found.activation_bytes / gib:.2f}"],
        *(teacher if found.teacher_bytes else []),
        ["FLOPs, forward and backward", f"{found.total_flops:.3g}"],
    ]


def plan_rows(plan: Plan) -> Rows:
    """Return header and rows of a plan: its candidates, the recommended one marked."""
    rows = [["split", "shared", "active", "of dense", "nats above dense", "prefill", "decode"]]
    rows[0] += ["asked for"]
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


def publish_table(rows: Rows, file: Path, page: Path) -> None:
    """Write measured rows as a CSV file, and on a page between the marks of that file's name."""
    write_csv(file, rows)
    replace_table(page, file.stem, rows)


def replace_table(page: Path, mark: str, rows: Rows) -> None:
    """Put a table between `<!-- mark -->` and `<!-- /mark -->` on a Markdown page.

    Raises:
        ValueError: the page has no such marks.
    """
    block = f"<!-- {mark} -->\n{markdown(rows)}<!-- /{mark} -->"
    pattern = f"<!-- {mark} -->\n.*?<!-- /{mark} -->"
    text, count = re.subn(pattern, lambda _: block, page.read_text(), flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{page} has {count} places for the table {mark!r}")
    page.write_text(text)


def number(value: float) -> str:
    """Return a number with one decimal, or none where it is large."""
    if value >= 1e6:
        return f"{value:.1e}"
    return f"{value:,.1f}" if value < 1000 else f"{value:,.0f}"


def millions(count: int) -> str:
    """Return a count in millions; in billions or thousands where that is easier to read."""
    if count >= 1e9:
        return f"{count / 1e9:.2f}B"
    return f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}K"
