"""The sections of a report's page."""

from __future__ import annotations

import math
from html import escape

from moefy.checkpoint.card import command_of, recipe_of, steps_of
from moefy.evaluation.compare import Comparison, Result
from moefy.evaluation.routing import RoutingResult
from moefy.evaluation.suite import SuiteResult
from moefy.report.findings import SPLIT_NAMES, Findings
from moefy.report.page import Section, html_table
from moefy.report.quality_charts import benchmark_chart, quality_charts
from moefy.report.routing_charts import routing_charts
from moefy.report.routing_tables import k_rows, routing_rows
from moefy.report.suite_tables import nll_rows, published_rows, suite_notes, suite_rows
from moefy.report.tables import comparison_rows, number
from moefy.report.training_charts import training_charts

_COLUMNS = (
    "Perplexity is that of the next token, over all domains and of each. KL is the mean "
    "divergence of the next token's distribution from the dense model's, in nats; top-1 is the "
    "share of positions where both find the same token the likeliest. Params are stored, active "
    "ones are used for a token. Speeds were measured one after the other, at batch 1."
)


def headline(findings: Findings) -> str:
    """Say in a sentence what the best MoE model keeps of the dense one, and at what cost."""
    comparison = findings.comparison
    split = [result for result in comparison.results if result.cost.experts]
    best = min(split or comparison.results, key=lambda result: result.perplexity)
    dense = next((r for r in comparison.results if r.name == comparison.reference), None)
    if dense is None or dense is best:
        active = best.cost.active_params / 1e6
        return (
            f"{best.name} has perplexity {number(best.perplexity)} on {findings.text} and uses "
            f"{active:,.1f}M parameters for a token."
        )
    share = best.cost.flops_per_token / dense.cost.flops_per_token
    said = (
        f"{best.name} needs {share:.0%} of the FLOPs per token of {dense.name}: its perplexity is "
        f"{number(best.perplexity)} against {number(dense.perplexity)}"
    )
    if best.top1_agreement is not None:
        said += f", it agrees on the likeliest token in {best.top1_agreement:.0%} of the positions"
    kept = _retention(findings, best)
    return f"{said}{kept}."


def _retention(findings: Findings, best: Result) -> str:
    if findings.suite is None:
        return ""
    model = next(m for m in findings.suite.models if m.name == best.name)
    found = model.against_reference and model.against_reference.retention
    if not found:
        return ""
    value, low, high = (100 * number for number in (found.value, found.low, found.high))
    return (
        f", and it keeps {value:.1f}% [{low:.1f}, {high:.1f}] of the benchmarks' average "
        "(95 % interval)"
    )


def sections(findings: Findings) -> list[Section]:
    """Return what was found, section by section."""
    found = [_quality(findings)]
    if findings.suite is not None:
        found.append(_benchmarks(findings.suite))
    found.append(
        Section(
            "cost",
            "Quality against cost",
            "",
            quality_charts(findings.comparison, findings.suite),
        )
    )
    if findings.routing is not None:
        found += _routing(findings.routing)
    if any(model.log for model in findings.models):
        found.append(_training(findings))
    found += [_recipes(findings), _measured(findings)]
    return found


def _dense_losses(comparison: Comparison) -> dict[str, float]:
    """Return the reference's held-out losses by domain, nats per token; empty without one."""
    for result in comparison.results:
        if result.name == comparison.reference:
            return {domain: math.log(p) for domain, p in result.domain_perplexity.items()}
    return {}


def _quality(findings: Findings) -> Section:
    comparison = findings.comparison
    facts = (
        f"{findings.text}, in windows of {comparison.sequence_length}, the same for every model. "
        f"{_COLUMNS}"
    )
    body = html_table(comparison_rows(comparison)) + _soft(facts)
    kind = SPLIT_NAMES[findings.split].capitalize()
    return Section("quality", f"{kind} text, cost and speed", body)


def _benchmarks(suite: SuiteResult) -> Section:
    items = "all items" if suite.limit is None else f"at most {suite.limit:,} items of each"
    note = f"Measured here: {items}, in {suite.dtype}."
    if any(benchmark.stock for benchmark in suite.benchmarks):
        note += (
            " The published rows are of models of 2.7 to 3.5 billion active parameters, measured "
            "by others: they say where the field stands, and compare with a model of that size "
            "only."
        )
    body = [html_table(published_rows(suite)), _soft(note)]
    if suite.failures:
        body.append("<p>No score, shown as –:</p><ul>")
        body += [f"<li>{escape(': '.join(each))}</li>" for each in suite.failures]
        body.append("</ul>")
    body.append("<h3>Differences from the dense model</h3>")
    body.append(html_table(suite_rows(suite)))
    body.append(
        _soft(
            "Differences are in points on the same items, with the 95 % interval of a paired "
            "bootstrap. Retention is a model's average over the dense model's, in percent."
        )
    )
    if any(score.gold_nll is not None for m in suite.models for score in m.scores.values()):
        body.append("<h3>−log p of the right answer</h3>")
        body.append(html_table(nll_rows(suite)))
        body.append(_soft("Nats ± standard error. It moves long before the scores do."))
    body += [_soft(note) for note in suite_notes(suite)]
    return Section("benchmarks", "Benchmarks", "".join(body), [benchmark_chart(suite)])


def _routing(routing: RoutingResult) -> list[Section]:
    header, *rows = routing_rows(routing)
    means = [header, *(row for row in rows if row[1] == "mean")]
    body = (
        html_table(means)
        + _soft(
            "On the same text. Entropy is that of the experts' load over that of even use; dead "
            "experts were never chosen; domains is how far the domains' loads are apart "
            "(Jensen–Shannon divergence), with what chance alone would give beside it."
        )
        + f"<details><summary>Every layer</summary>{html_table([header, *rows])}</details>"
    )
    other, *charts = routing_charts(routing)
    return [
        Section("routing", "Routing", body, charts),
        Section("k", "Other numbers of experts", html_table(k_rows(routing)), [other]),
    ]


def _training(findings: Findings) -> Section:
    logs = {model.name: model.log for model in findings.models if model.log}
    # the dense model's held-out losses stand beside the run's where both are of the same corpus
    corpora = {
        str(model.record["run"]["data"]) for model in findings.models if model.log and model.record
    }
    is_beside = corpora == {findings.data} and findings.split == "heldout"
    losses = _dense_losses(findings.comparison) if is_beside else {}
    rows = [["model", "steps", "tokens", "first loss", "last loss", "tok/s"]]
    for name, log in logs.items():
        speeds = sorted(line["tokens_per_s"] for line in log)
        first, last = (f"{log[place]['loss']:.3f}" for place in (0, -1))
        speed = f"{speeds[len(speeds) // 2]:,.0f}"
        rows.append([name, f"{len(log):,}", f"{log[-1]['tokens']:,}", first, last, speed])
    return Section("training", "Training", html_table(rows), training_charts(logs, losses))


def _recipes(findings: Findings) -> Section:
    parts = []
    for model in findings.models:
        if model.record is None:
            parts.append(f"<p><b>{escape(model.name)}</b> was not made by moefy.</p>")
            continue
        steps = "".join(
            f"<p><code>{escape(command_of(step))}</code> (moefy {escape(step['moefy'])})</p>"
            f"<pre>{escape(recipe_of(step))}</pre>"
            for step in steps_of(model.record)
        )
        parts.append(f"<details><summary><b>{escape(model.name)}</b></summary>{steps}</details>")
    return Section("recipes", "How the models were made", "".join(parts))


def _measured(findings: Findings) -> Section:
    place = findings.machine
    where = f"CPU (threads: {place['threads']})" if place["device"] == "cpu" else place["device"]
    numbers = ", ".join(f"{name} {number}" for name, number in findings.versions.items())
    body = (
        f"<pre>{escape(findings.command)}</pre>"
        f"<p>{escape(findings.date)}, {escape(where)}, {escape(place['platform'])}; "
        f"{escape(numbers)}. All numbers are in <code>results.json</code> beside this page, those "
        "of a figure in the CSV file of its name.</p>"
    )
    return Section("measured", "How it was measured", body)


def _soft(text: str) -> str:
    return f"<p class='soft'>{escape(text)}</p>"
