"""Ways to build experts, measured side by side on the same tokens."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefy.calibrate.importance import neuron_importance
from moefy.calibrate.replay import ModelReplay, weights_alone
from moefy.calibrate.sample import FfnSample
from moefy.calibrate.text import calibration_windows
from moefy.checkpoint.load import load_tokenizer
from moefy.checkpoint.reader import DenseCheckpoint, fingerprint
from moefy.checkpoint.source import resolve
from moefy.construct.pipeline import split_ffn
from moefy.construct.router.energy import expert_energies
from moefy.construct.split import SplitFfn
from moefy.construct.static import flap
from moefy.data.domains import open_domains
from moefy.errors import OutputError, UsageError
from moefy.evaluation.compare import evaluation_windows, token_divergences, token_losses
from moefy.progress import Progress, ProgressFn, silent
from moefy.recipe import ConvertRecipe, check_split
from moefy.storage import replace_file

Domains = Mapping[str, Int[np.ndarray, "_windows sequence"]]
Ffn = Callable[[Float[Tensor, "tokens hidden"]], Float[Tensor, "tokens hidden"]]


@dataclass(frozen=True)
class Method:
    """One row: how the experts are built.

    Attributes:
        name: as the table shows it.
        shared: how many of the active slices always run: "none", "half" or "all" (no routing).
        choices: of `ConvertRecipe`.
        oracle: choose experts by their true energies; a ceiling, not a model.
        flap: static pruning with mean compensation instead of a split.
    """

    name: str
    shared: str = "half"
    choices: Mapping[str, Any] = field(default_factory=dict)
    oracle: bool = False
    flap: bool = False

    def recipe(self, experts: int, active: int, seed: int) -> ConvertRecipe:
        """Return the recipe of this method at k of E."""
        shared = {"none": 0, "half": active // 2, "all": active}[self.shared]
        counts = {"experts": experts, "active": active, "shared": shared, "seed": seed}
        return ConvertRecipe.build(**counts, **self.choices)


def _method(
    name: str,
    partition: str,
    router: str,
    repair: str,
    shared: str = "half",
    *,
    oracle: bool = False,
    **more: Any,
) -> Method:
    choices = {"partition": partition, "router": router, "repair": repair, **more}
    return Method(name, shared, choices, oracle)


METHODS = (
    _method("random", "random", "random", "none", "none"),
    _method("random, paper's rescale", "random", "random", "paper", "none"),
    _method("clustering (up)", "clustering-up", "random", "paper", "none"),
    _method("clustering (gate)", "clustering-gate", "random", "paper", "none"),
    _method("sharing-inner", "sharing-inner", "random", "paper", "none"),
    _method("sharing-inter", "sharing-inter", "random", "paper"),
    _method("gradient, mean gate", "gradient", "mean-gate", "none"),
    _method("CMoE carve", "carve", "representative", "none"),
    _method("CMoE carve, all shared", "carve", "random", "none", "all"),
    Method("FLAP (static)", "all", flap=True),
    _method("static + refit", "coactivation", "random", "refit", "all", refit_ridge=0.01),
    _method("gradient, ridge + refit", "gradient", "ridge-log", "refit"),
    _method("CMoE carve, ridge + refit", "carve", "ridge-log", "refit"),
    _method("co-activation, mean gate", "coactivation", "mean-gate", "none"),
    _method("co-activation, ridge", "coactivation", "ridge", "none"),
    _method("co-activation, ridge + scale", "coactivation", "ridge", "scale"),
    _method("co-activation, ridge + refit", "coactivation", "ridge", "refit"),
    _method("co-activation, log-ridge + refit", "coactivation", "ridge-log", "refit"),
    _method("alternating, log-ridge", "alternating", "ridge-log", "none"),
    _method("alternating, log-ridge + refit", "alternating", "ridge-log", "refit"),
    _method("alternating, oracle + refit", "alternating", "ridge-log", "refit", oracle=True),
)
"""The published ways, the baselines, and moefy's own.

Static pruning gets the smaller ridge because it is better with it: docs/experiments.md, section 3.
"""


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


class Bench:
    """A dense model with calibration and evaluation windows; scores one method after another.

    Args:
        dense: the source.
        calibration: token ids.
        evaluation: token ids by domain, all of the same length.
        seed: of every method.
    """

    def __init__(
        self,
        dense: DenseCheckpoint,
        calibration: Int[np.ndarray, "_windows sequence"],
        evaluation: Domains,
        *,
        seed: int = 0,
    ) -> None:
        self._dense, self._seed = dense, seed
        self._replay = ModelReplay(dense)
        self._head = self._replay.head()
        self._calibration = calibration
        self._domains = [name for name, rows in evaluation.items() for _ in rows]
        self._ids = torch.from_numpy(np.concatenate(list(evaluation.values())))
        self._reference: Tensor | None = None
        self.dense_score = self._score("dense", None, 1, 1, silent)

    def score(
        self, method: Method, experts: int, active: int, report: ProgressFn = silent
    ) -> Score:
        """Measure one method at k of E."""
        return self._score(method.name, method, experts, active, report)

    @torch.no_grad()
    def _score(
        self, name: str, method: Method | None, experts: int, active: int, report: ProgressFn
    ) -> Score:
        _reset_peak()
        recipe = method.recipe(experts, active, self._seed) if method else None
        replay = self._replay
        importance = None
        construct_s = 0.0
        if recipe and recipe.needs_gradients:
            started = time.perf_counter()
            clusters = recipe.experts - recipe.shared
            importance = neuron_importance(replay, self._calibration, clusters, seed=self._seed)
            construct_s += time.perf_counter() - started
        hidden = replay.embed(self._ids)
        calibration = None
        if method and (method.flap or (recipe and recipe.calibrated)):
            calibration = replay.embed(torch.from_numpy(self._calibration))
        errors, gaps, imbalances = [], [], []
        for layer_idx in range(replay.num_layers):
            layer = replay.layer(layer_idx)
            started = time.perf_counter()
            ffn: Ffn | None = None
            if method and recipe:
                sample = weights_alone(self._dense, layer_idx)
                if calibration is not None:
                    calibration = layer.attend(calibration)
                    sample = layer.sample(calibration)
                if importance is not None:
                    sample.importance = importance[layer_idx]
                ffn = _build(method, recipe, sample, layer_idx)
                if calibration is not None:
                    calibration += ffn(sample.inputs).view_as(calibration)
                del sample
            construct_s += time.perf_counter() - started
            hidden = layer.attend(hidden)
            test = layer.sample(hidden)
            expected = test.outputs()
            outputs = expected if ffn is None else ffn(test.inputs)
            weight = test.token_weights[:, None]
            error = (weight * (outputs - expected).square()).sum()
            errors.append(float(error / (weight * expected.square()).sum()))
            if isinstance(ffn, SplitFfn) and 0 < ffn.routing.active < len(ffn.routing.router):
                gap, imbalance = _routing_quality(ffn, test)
                gaps.append(gap)
                imbalances.append(imbalance)
            hidden += outputs.view_as(hidden)
            report(Progress(name, layer_idx + 1, replay.num_layers))
        losses, divergence = self._losses(hidden)
        loss = float(np.mean([value for values in losses.values() for value in values]))
        return Score(
            method=name,
            experts=experts,
            active=active,
            shared=recipe.shared if recipe else 0,
            loss=loss,
            nats_above_dense=loss - self.dense_score.loss if method else 0.0,
            domain_loss={domain: float(np.mean(values)) for domain, values in losses.items()},
            kl_to_dense=divergence,
            ffn_error=errors,
            router_gap_closed=float(np.mean(gaps)) if gaps else None,
            load_imbalance=float(np.mean(imbalances)) if imbalances else None,
            construct_s=construct_s,
            peak_rss_bytes=_peak_rss_bytes(),
        )

    def _losses(
        self, hidden: Float[Tensor, "windows sequence hidden"]
    ) -> tuple[dict[str, list[float]], float]:
        """Return the losses by domain and the mean divergence from the dense model."""
        if self._reference is None:
            self._reference = hidden
        losses: dict[str, list[float]] = {}
        divergences = []
        for domain, ids, ours, dense in zip(
            self._domains, self._ids, hidden, self._reference, strict=True
        ):
            logits = self._head.logits(ours)
            losses.setdefault(domain, []).extend(token_losses(logits, ids).tolist())
            divergence = token_divergences(self._head.logits(dense), logits)
            divergences.append(float(divergence.mean()))
        return losses, float(np.mean(divergences))


def _build(method: Method, recipe: ConvertRecipe, sample: FfnSample, layer_idx: int) -> Ffn:
    if method.flap:
        return flap(sample, sample.num_neurons * recipe.active // recipe.experts)
    return split_ffn(sample, recipe, layer_idx, oracle=method.oracle)


def _routing_quality(ffn: SplitFfn, sample: FfnSample) -> tuple[float, float]:
    energies = expert_energies(sample, ffn.partition).double()
    chosen = ffn.routing.weights(sample.inputs) > 0
    kept = energies[chosen].sum()
    best = energies.topk(ffn.routing.active, dim=1).values.sum()
    blind = energies.sum() * ffn.routing.active / energies.shape[1]
    load = chosen.double().sum(0)
    return float((kept - blind) / (best - blind)), float(load.max() / load.mean())


def _reset_peak() -> None:
    """Forget the highest memory so far (Linux)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_rss_bytes() -> int | None:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def leaderboard(
    source: str | Path,
    out: str | Path,
    *,
    data: str | Path = "demo",
    experts: int = 64,
    fractions: Sequence[float] = (0.75, 0.5, 0.25),
    methods: Sequence[str] = (),
    calibration_tokens: int = 28_672,
    windows: int = 8,
    sequence_length: int = 512,
    seed: int = 0,
    report: ProgressFn = silent,
) -> list[Score]:
    """Measure ways to build experts on the same tokens; write table, CSV and figure.

    Every row is kept in `out/scores.jsonl` as soon as it is measured; the same command continues
    an interrupted run and measures only what is missing.

    Args:
        source: anything `convert` takes.
        out: folder for `scores.jsonl`, `leaderboard.csv`, `leaderboard.md` and `leaderboard.png`.
        data: a folder of `<domain>.jsonl(.gz)` files, or `demo`. Calibration reads the training
            documents, evaluation the held-out ones.
        experts: slices of every FFN.
        fractions: of the FFN that run per token.
        methods: names of rows, or parts of them; none means all.
        calibration_tokens: for the methods that need them.
        windows: evaluation windows per domain.
        sequence_length: tokens per window.
        seed: of every method.
        report: told about progress.

    Raises:
        UsageError: a fraction, method, model or text that is not usable.
        OutputError: `out` holds something else.
    """
    chosen = [m for m in METHODS if not methods or any(part in m.name for part in methods)]
    if not chosen:
        names = "; ".join(method.name for method in METHODS)
        raise UsageError(f"no method matches {', '.join(methods)}; there are {names}")
    counts = []
    for fraction in fractions:
        active = round(fraction * experts)
        if not 0 < fraction < 1 or not math.isclose(active, fraction * experts, abs_tol=1e-6):
            raise UsageError(
                f"{fraction} of {experts} experts is no whole number between 1 and {experts - 1}"
            )
        counts.append(active)
    dense = DenseCheckpoint(resolve(source, report=report))
    inner = dense.config["intermediate_size"]
    for active in counts:
        check_split(inner, experts, active)
    out = Path(out).expanduser()
    conditions = {
        "source": fingerprint(dense.folder),
        "data": str(data),
        "calibration_tokens": calibration_tokens,
        "windows": windows,
        "sequence_length": sequence_length,
        "seed": seed,
    }
    key = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:12]
    known = read_scores(out, key)
    tokenizer = load_tokenizer(dense.folder)
    calibration = calibration_windows(
        data,
        dense.folder,
        tokens=calibration_tokens,
        sequence_length=sequence_length,
        needed_tokens=inner,
        report=report,
    )
    evaluation = evaluation_windows(
        open_domains(data, report=report),
        "heldout",
        tokenizer,
        windows=windows,
        sequence_length=sequence_length,
        report=report,
    )
    wanted = [(method, active) for active in counts for method in chosen]
    bench = None
    scores = []
    for method, active in wanted:
        name = method.name, experts, active
        if name not in known:
            bench = bench or Bench(dense, calibration, evaluation, seed=seed)
            known.setdefault(("dense", 1, 1), bench.dense_score)
            known[name] = bench.score(method, experts, active, report)
            write_scores(out, key, known)
        scores.append(known[name])
    everything = [known["dense", 1, 1], *scores]
    write_leaderboard(out, everything)
    return everything


def write_leaderboard(out: Path, scores: list[Score]) -> None:
    """Write `leaderboard.csv`, `leaderboard.md` and `leaderboard.png`."""
    from moefy.report.figures import leaderboard_figure
    from moefy.report.tables import leaderboard_rows, markdown

    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "leaderboard.md", markdown(leaderboard_rows(scores)))
    with (out / "leaderboard.csv").open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        domains = list(scores[0].domain_loss)
        plain = [key for key in asdict(scores[0]) if key not in ("domain_loss", "ffn_error")]
        layers = range(len(scores[0].ffn_error))
        table.writerow(
            [*plain, *(f"loss_{d}" for d in domains), *(f"ffn_error_{i}" for i in layers)]
        )
        for score in scores:
            row = asdict(score)
            table.writerow(
                [*(row[k] for k in plain), *score.domain_loss.values(), *score.ffn_error]
            )
    leaderboard_figure(scores).savefig(out / "leaderboard.png", dpi=150)


def read_scores(out: Path, key: str) -> dict[tuple[str, int, int], Score]:
    """Read `scores.jsonl`, by method, E and k.

    Raises:
        OutputError: it was measured under other conditions than `key`.
    """
    file = out / "scores.jsonl"
    if not file.exists():
        return {}
    known = {}
    for line in file.read_text().splitlines():
        record = json.loads(line)
        if record.pop("conditions") != key:
            raise OutputError(
                f"{file} was measured on another model, text or seed: choose another folder"
            )
        score = Score(**record)
        known[score.method, score.experts, score.active] = score
    return known


def write_scores(out: Path, key: str, known: Mapping[tuple[str, int, int], Score]) -> None:
    """Write `scores.jsonl`, whole."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"conditions": key, **asdict(score)}) + "\n" for score in known.values()]
    replace_file(out / "scores.jsonl", "".join(lines))
