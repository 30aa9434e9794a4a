"""What a report says first: one sentence and one small table."""

from __future__ import annotations

from moefy.evaluation.compare import Result
from moefy.evaluation.paired import Interval
from moefy.report.findings import Report
from moefy.report.suite_tables import percent
from moefy.report.tables import Columns, Rows, millions, number, shown, table, with_interval


def verdict(report: Report) -> str:
    """Say in a sentence what the best MoE model keeps of the dense one, and at what cost."""
    results, dense = report.comparison.results, report.dense
    # Several conversions may be shown: the sentence is about the one that lost least.
    moes = [result for result in results if result.cost.experts]
    best = min(moes or results, key=lambda result: result.perplexity)
    perplexity = number(best.perplexity)
    if dense is None or dense is best:
        return (
            f"{best.name} uses {millions(best.cost.active_params)} parameters per token and has a "
            f"perplexity of {perplexity} on {report.text}."
        )
    share = best.cost.active_params / dense.cost.active_params
    excess = best.excess_loss or Interval(0.0, 0.0, 0.0)
    # Training on the same text can bring a conversion below its dense model.
    side = "below" if excess.value < 0 else "above"
    parts = [
        f"has a loss {abs(excess.value):.3f} nats per token {side} "
        f"{dense.name}'s (95% interval {excess.low:+.3f} to {excess.high:+.3f}; perplexity "
        f"{perplexity} against {number(dense.perplexity)})"
    ]
    if kept := _kept(report, best):
        parts.append(f"keeps {with_interval(kept, '.1f')} percent of its average on the benchmarks")
    if best.decode_tokens_per_s and dense.decode_tokens_per_s:
        speed = best.decode_tokens_per_s / dense.decode_tokens_per_s
        parts.append(f"decodes {speed:.2f} times as fast here")
    said = ", ".join(parts[:-1]) + (", and " if parts[1:] else "") + parts[-1]
    return f"With {share:.0%} of the parameters active per token, {best.name} {said}."


def verdict_rows(report: Report) -> Rows:
    """Return header and rows of the verdict: quality, speed and size of every model."""
    dense, suite = report.dense, report.suite

    def decode(result: Result) -> str:
        speed = shown(result.decode_tokens_per_s, ".1f")
        if not (dense and dense.decode_tokens_per_s and result.decode_tokens_per_s):
            return speed
        return f"{speed} (× {result.decode_tokens_per_s / dense.decode_tokens_per_s:.2f})"

    columns: Columns[Result] = [("model", lambda r: r.name)]
    if dense:
        columns.append(("loss above dense, nats", lambda r: with_interval(r.excess_loss, ".3f")))
    columns.append(("perplexity", lambda r: number(r.perplexity)))
    if suite:
        averages = {m.name: percent(m.average, m.average_stderr) for m in suite.models}
        columns.append(("benchmarks, %", lambda r: averages[r.name]))
        columns.append(("kept of dense, %", lambda r: with_interval(_kept(report, r), ".1f")))
    columns += [
        ("decode, tokens/s", decode),
        ("parameters", lambda r: millions(r.cost.total_params)),
        ("active", lambda r: millions(r.cost.active_params)),
    ]
    return table(report.comparison.results, columns)


def _kept(report: Report, result: Result) -> Interval | None:
    """Return how many percent of the dense model's average on the benchmarks a model has."""
    models = report.suite.models if report.suite else []
    paired = next((m.against_reference for m in models if m.name == result.name), None)
    # None where the dense model's average may be 0.
    kept = paired.retention if paired else None
    return kept and Interval(100 * kept.value, 100 * kept.low, 100 * kept.high)
