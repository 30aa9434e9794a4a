"""A dense model with text, on which one way to build experts after another is measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from moefy.calibrate.importance import SegmentImportance, window_importance
from moefy.calibrate.replay import ModelReplay, weights_alone
from moefy.calibrate.sample import FfnSample
from moefy.calibrate.walk import CalibrationWalk
from moefy.checkpoint.reader import DenseCheckpoint
from moefy.construct.ffn import SplitFfn
from moefy.construct.partition.sharing import importance_by_cluster
from moefy.construct.pipeline import split_ffn
from moefy.construct.router.energy import expert_energies
from moefy.construct.static import flap
from moefy.evaluation.heldout import Quality, window_means
from moefy.evaluation.output_loss import LogitsInput
from moefy.hardware import peak_rss_bytes, reset_peak_rss
from moefy.progress import Progress, ProgressFn, silent
from moefy.recipe import ConvertRecipe
from moefy.split import Split
from moefy.studies.methods import Method
from moefy.studies.scores import Score

Domains = Mapping[str, Int[np.ndarray, "_windows sequence"]]
Ffn = Callable[[FfnSample], Float[Tensor, "tokens hidden"]]


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
        self._reference: LogitsInput | None = None
        self._importance: tuple[SegmentImportance, float] | None = None
        self._sampled: tuple[Int[np.ndarray, "_windows sequence"], float] | None = None
        self.dense_score = self._score("dense", None, None, silent)

    def score(self, method: Method, recipe: ConvertRecipe, report: ProgressFn = silent) -> Score:
        """Measure one method."""
        return self._score(method.name, method, recipe, report)

    @torch.no_grad()
    def _score(
        self, name: str, method: Method | None, recipe: ConvertRecipe | None, report: ProgressFn
    ) -> Score:
        reset_peak_rss()
        replay = self._replay
        importance, construct_s = None, 0.0
        if recipe and recipe.needs_gradients:
            importance, construct_s = self._importance_for(recipe)
        hidden = replay.embed(self._ids)
        walk = None
        if method and recipe and (method.flap or recipe.calibrated):
            follow = recipe.follows_dense and not method.flap
            windows = self._calibration
            if method.own_text:
                windows, construct_s = self._windows_sampled()
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
                if walk is None and isinstance(ffn, SplitFfn):  # was made on the CPU
                    ffn = ffn.to(hidden.device)
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
        split = recipe.split if recipe else Split(1, 1)
        quality = self._quality(hidden)
        return Score(
            method=name,
            experts=split.experts,
            active=split.active,
            shared=split.shared,
            loss=quality.loss,
            nats_above_dense=quality.loss - self.dense_score.loss if method else 0.0,
            domain_loss=quality.domain_loss,
            kl_to_dense=quality.kl_to_reference or 0.0,
            ffn_error=errors,
            router_gap_closed=float(np.mean(gaps)) if gaps else None,
            load_imbalance=float(np.mean(imbalances)) if imbalances else None,
            construct_s=construct_s,
            peak_rss_bytes=peak_rss_bytes(),
            recipe=recipe.model_dump(mode="json") if recipe else None,
        )

    def _importance_for(
        self, recipe: ConvertRecipe
    ) -> tuple[Float[Tensor, "layers clusters neurons"], float]:
        """Return the neurons' importance and the seconds it takes; measured once."""
        clusters = recipe.split.routed
        if self._importance is None:
            started = time.perf_counter()
            segments = window_importance(self._replay, self._calibration, clusters)
            self._importance = segments, time.perf_counter() - started
        segments, seconds = self._importance
        return importance_by_cluster(segments, clusters, seed=self._seed), seconds

    def _windows_sampled(self) -> tuple[Int[np.ndarray, "_windows sequence"], float]:
        """Return the model's own text and the seconds it takes; sampled once."""
        if self._sampled is None:
            assert self._own_text is not None
            started = time.perf_counter()
            windows = self._own_text()
            self._sampled = windows, time.perf_counter() - started
        return self._sampled

    def _quality(self, hidden: Float[Tensor, "windows sequence hidden"]) -> Quality:
        """Return the losses and the divergence from the dense model, which is measured first."""
        states = LogitsInput(self._head.states(hidden), self._head.matrix)
        self._reference = self._reference or states
        quality = Quality()
        for window, domain in enumerate(self._domains):
            one = slice(window, window + 1)
            model, dense = (LogitsInput(s.hidden[one], s.weight) for s in (states, self._reference))
            quality.add(domain, window_means(model, self._ids[one].to(hidden.device), dense))
        return quality


def _build(method: Method, recipe: ConvertRecipe, sample: FfnSample, layer_idx: int) -> Ffn:
    if method.flap:
        split = recipe.split
        return flap(sample, sample.num_neurons * split.shared // split.experts)
    return split_ffn(sample, recipe, layer_idx, oracle=method.oracle)


def _routing_quality(ffn: SplitFfn, sample: FfnSample) -> tuple[float, float]:
    energies = expert_energies(sample, ffn.partition).double()
    chosen = ffn.routing.chosen(sample.inputs) > 0
    kept = energies[chosen].sum()
    best = energies.topk(ffn.routing.active, dim=1).values.sum()
    blind = energies.sum() * ffn.routing.active / energies.shape[1]
    load = chosen.double().sum(0)
    return float((kept - blind) / (best - blind)), float(load.max() / load.mean())
