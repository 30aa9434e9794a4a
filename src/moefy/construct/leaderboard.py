"""Ways to build experts, measured side by side on the same tokens."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefy.calibrate.importance import SegmentImportance, window_importance
from moefy.calibrate.replay import ModelReplay, weights_alone
from moefy.calibrate.sample import FfnSample
from moefy.calibrate.text import calibration_windows, self_windows
from moefy.calibrate.walk import CalibrationWalk
from moefy.checkpoint.load import load_tokenizer
from moefy.checkpoint.reader import DenseCheckpoint, fingerprint
from moefy.checkpoint.source import resolve
from moefy.construct.pipeline import shape_of, split_ffn
from moefy.construct.router.energy import expert_energies
from moefy.construct.split import Shape, SplitFfn
from moefy.construct.static import flap
from moefy.data.domains import open_domains
from moefy.errors import OutputError, UsageError
from moefy.evaluation.compare import evaluation_windows, token_divergences, token_losses
from moefy.progress import Progress, ProgressFn, silent
from moefy.recipe import LLAMA_MOE, ConvertRecipe
from moefy.storage import replace_file

Domains = Mapping[str, Int[np.ndarray, "_windows sequence"]]
Ffn = Callable[[FfnSample], Float[Tensor, "tokens hidden"]]


@dataclass(frozen=True)
class Method:
    """One way to build experts.

    Attributes:
        name: as the table shows it.
        choices: of `ConvertRecipe`, on top of its defaults.
        shared: share of the active slices that always run; 1 means no routing.
        experts: slices of the FFN, if not those of the other methods.
        every_expert: all slices run, whatever share the others get.
        oracle: choose experts by their true energies; a ceiling, not a model.
        flap: static pruning with mean compensation instead of a split.
        own_text: calibrate on text that the dense model samples.
    """

    name: str
    choices: dict[str, Any] = field(default_factory=dict)
    shared: float = 0.5
    experts: int | None = None
    every_expert: bool = False
    oracle: bool = False
    flap: bool = False
    own_text: bool = False

    def recipe(self, experts: int, fraction: float, seed: int) -> ConvertRecipe:
        """Return the recipe of this method where a fraction of the FFN runs.

        Raises:
            UsageError: that fraction of the experts is no whole number.
        """
        experts = self.experts or experts
        active = experts if self.every_expert else round(fraction * experts)
        if not 0 < fraction < 1 or not (
            self.every_expert or math.isclose(active, fraction * experts, abs_tol=1e-6)
        ):
            raise UsageError(
                f"{fraction} of {experts} experts is no whole number between 1 and {experts - 1}"
            )
        shared = int(self.shared * active)
        counts = {"experts": experts, "active": active, "shared": shared, "seed": seed}
        return ConvertRecipe.build(**self.choices | counts)


def _published(
    name: str, partition: str, router: str, repair: str, shared: float = 0.0, **more: Any
) -> Method:
    choices = {"partition": partition, "router": router, "repair": repair, "aim": "ffn", **more}
    return Method(name, choices, shared)


def _variant(what: str, shared: float = 0.5, *, experts: int | None = None, **more: Any) -> Method:
    return Method(f"moefy: {what}", more, shared, experts)


METHODS = (
    Method("moefy"),
    Method("FLAP (static)", shared=1.0, flap=True),
    _published("static + refit", "coactivation", "random", "refit", 1.0, refit_ridge=0.01),
    Method("moefy: oracle router", oracle=True),
    Method("all experts (k = E)", LLAMA_MOE | {"repair": "none"}, 0.0, every_expert=True),
    _published("random", "random", "random", "none"),
    _published("random + paper's rescale", "random", "random", "paper"),
    _published("clustering (up)", "clustering-up", "random", "paper"),
    _published("clustering (gate)", "clustering-gate", "random", "paper"),
    _published("CMoE carve", "carve", "representative", "none", 0.5),
    _published("CMoE carve: all shared", "carve", "random", "none", 1.0),
    _published("ExpertWeaver's router", "clustering-gate", "mean-gate", "none"),
    _published("sharing-inner", "sharing-inner", "random", "paper"),
    _published("sharing-inter", "sharing-inter", "random", "paper", 0.5),
    _published("gradient + mean gate", "gradient", "mean-gate", "none", 0.5),
    _variant("no repair", repair="none"),
    _variant("scale only", repair="scale"),
    _variant("aim at the FFN", aim="ffn"),
    _variant("router without ascent", router="ridge-log"),
    _variant("router on plain energies", router="ridge"),
    _variant("none shared", 0.0),
    _variant("quarter shared", 0.25),
    _variant("three quarters shared", 0.75),
    _variant("16 slices", experts=16),
    _variant("32 slices", experts=32),
    _variant("random partition", partition="random"),
    _variant("clustering (gate)", partition="clustering-gate"),
    _variant("co-activation", partition="coactivation"),
    _variant("CMoE carve", partition="carve"),
    _variant("gradient", partition="gradient"),
    Method("static + refit like moefy", {"partition": "coactivation"}, 1.0),
    Method("moefy: the model's own text", own_text=True),
)
"""moefy's default and the baselines; the published ways; the default with one choice changed.

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


class Bench:
    """A dense model with calibration and evaluation windows; scores one method after another.

    Args:
        dense: the source.
        calibration: token ids.
        evaluation: token ids by domain, all of the same length.
        seed: of every method.
        own_text: samples calibration windows from the model, for the methods that want them.
    """

    def __init__(
        self,
        dense: DenseCheckpoint,
        calibration: Int[np.ndarray, "_windows sequence"],
        evaluation: Domains,
        *,
        seed: int = 0,
        own_text: Callable[[], Int[np.ndarray, "_windows sequence"]] | None = None,
    ) -> None:
        self._dense, self._seed, self._own_text = dense, seed, own_text
        self._replay = ModelReplay(dense)
        self._head = self._replay.head()
        self._calibration = calibration
        self._domains = [name for name, rows in evaluation.items() for _ in rows]
        self._ids = torch.from_numpy(np.concatenate(list(evaluation.values())))
        self._reference: Tensor | None = None
        self._importance: tuple[SegmentImportance, float] | None = None
        self.dense_score = self._score("dense", None, None, silent)

    def score(self, method: Method, recipe: ConvertRecipe, report: ProgressFn = silent) -> Score:
        """Measure one method."""
        return self._score(method.name, method, recipe, report)

    @torch.no_grad()
    def _score(
        self, name: str, method: Method | None, recipe: ConvertRecipe | None, report: ProgressFn
    ) -> Score:
        _reset_peak()
        replay = self._replay
        importance, construct_s = None, 0.0
        if recipe and recipe.needs_gradients:
            importance, construct_s = self._importance_for(recipe)
        hidden = replay.embed(self._ids)
        walk = None
        if method and recipe and (method.flap or recipe.calibrated):
            follow = recipe.follows_dense and not method.flap
            started = time.perf_counter()
            own = method.own_text and self._own_text
            windows = own() if own else self._calibration
            construct_s += time.perf_counter() - started
            walk = CalibrationWalk(replay, windows, follow_dense=follow)
        errors, gaps, imbalances = [], [], []
        for layer_idx in range(replay.num_layers):
            layer = replay.layer(layer_idx)
            started = time.perf_counter()
            ffn: Ffn = FfnSample.outputs
            if method and recipe:
                sample = walk.enter(layer) if walk else weights_alone(self._dense, layer_idx)
                if importance is not None:
                    sample.importance = importance[layer_idx]
                ffn = _build(method, recipe, sample, layer_idx)
                if walk:
                    walk.leave(sample, ffn)
                del sample
            construct_s += time.perf_counter() - started
            hidden = layer.attend(hidden)
            test = layer.sample(hidden)
            expected, outputs = test.outputs(), ffn(test)
            weight = test.token_weights[:, None]
            error = (weight * (outputs - expected).square()).sum()
            errors.append(float(error / (weight * expected.square()).sum()))
            if isinstance(ffn, SplitFfn) and 0 < ffn.routing.active < len(ffn.routing.router):
                gap, imbalance = _routing_quality(ffn, test)
                gaps.append(gap)
                imbalances.append(imbalance)
            hidden += outputs.view_as(hidden)
            report(Progress(name, layer_idx + 1, replay.num_layers))
        shape = shape_of(recipe) if recipe else Shape(shared=0, routed=1, active=1)
        losses, divergence = self._losses(hidden)
        loss = float(np.mean([value for values in losses.values() for value in values]))
        return Score(
            method=name,
            experts=shape.slices,
            active=shape.running,
            shared=shape.shared,
            loss=loss,
            nats_above_dense=loss - self.dense_score.loss if method else 0.0,
            domain_loss={domain: float(np.mean(values)) for domain, values in losses.items()},
            kl_to_dense=divergence,
            ffn_error=errors,
            router_gap_closed=float(np.mean(gaps)) if gaps else None,
            load_imbalance=float(np.mean(imbalances)) if imbalances else None,
            construct_s=construct_s,
            peak_rss_bytes=_peak_rss_bytes(),
            recipe=recipe.model_dump(mode="json") if recipe else None,
        )

    def _importance_for(
        self, recipe: ConvertRecipe
    ) -> tuple[Float[Tensor, "layers clusters neurons"], float]:
        """Return the neurons' importance and the seconds it takes; measured once."""
        clusters = shape_of(recipe).routed
        if self._importance is None:
            started = time.perf_counter()
            segments = window_importance(self._replay, self._calibration, clusters)
            self._importance = segments, time.perf_counter() - started
        return self._importance[0].clustered(clusters, seed=self._seed), self._importance[1]

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
        shape = shape_of(recipe)
        return flap(sample, sample.num_neurons * shape.shared // shape.slices)
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
    an interrupted run and measures only what is missing. The table shows every row in the folder.

    Args:
        source: anything `convert` takes.
        out: folder for `scores.jsonl`, `leaderboard.csv`, `leaderboard.md` and `leaderboard.png`.
        data: a folder of `<domain>.jsonl(.gz)` files, or `demo`. Calibration reads the training
            documents, evaluation the held-out ones.
        experts: slices of every FFN.
        fractions: of the FFN that run per token.
        methods: names of rows, or parts of names; none means all.
        calibration_tokens: for the methods that need them.
        windows: evaluation windows per domain.
        sequence_length: tokens per window.
        seed: of every method.
        report: told about progress.

    Raises:
        UsageError: a fraction, method, model or text that is not usable.
        OutputError: `out` holds something else.
    """
    chosen = [m for m in METHODS if not methods or any(_names(part, m) for part in methods)]
    if not chosen:
        names = "; ".join(method.name for method in METHODS)
        raise UsageError(f"no method matches {', '.join(methods)}; there are {names}")
    dense = DenseCheckpoint(resolve(source, report=report))
    inner = dense.config["intermediate_size"]
    wanted = [
        (method, method.recipe(experts, fraction, seed).for_model(inner, static=method.shared == 1))
        for fraction in fractions
        for method in chosen
    ]
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
    own_text = partial(
        self_windows,
        dense.folder,
        tokens=calibration_tokens,
        sequence_length=sequence_length,
        seed=seed,
        report=report,
    )
    bench = None
    for method, recipe in wanted:
        shape = shape_of(recipe)
        score = known.get((method.name, shape.slices, shape.running))
        if score is None or score.recipe != recipe.model_dump(mode="json"):
            bench = bench or Bench(dense, calibration, evaluation, seed=seed, own_text=own_text)
            score = bench.score(method, recipe, report)
            known = {key_of(s): s for s in (bench.dense_score, *known.values(), score)}
            write_scores(out, key, known.values())
    scores = list(known.values())
    write_leaderboard(out, scores)
    return scores


def _names(part: str, method: Method) -> bool:
    """Say whether a part of a name means a method: a whole name means that one alone."""
    if part in {m.name for m in METHODS}:
        return part == method.name
    return part in method.name


def write_leaderboard(out: Path, scores: list[Score]) -> None:
    """Write `leaderboard.csv`, `leaderboard.md` and `leaderboard.png`."""
    from moefy.report.figures import leaderboard_figure
    from moefy.report.tables import leaderboard_rows, markdown

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
        known[key_of(score)] = score
    return known


def write_scores(out: Path, key: str, scores: Iterable[Score]) -> None:
    """Write `scores.jsonl`, whole."""
    out.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"conditions": key, **asdict(score)}) + "\n" for score in scores]
    replace_file(out / "scores.jsonl", "".join(lines))
