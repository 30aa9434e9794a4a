"""The smallest active share that keeps a loss: converts and measures one after another."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Unpack

import torch

from moefy.calibrate.text import SELF
from moefy.checkpoint.load import load_model
from moefy.checkpoint.reader import DenseCheckpoint, fingerprint, read_config
from moefy.checkpoint.source import resolve
from moefy.construct.convert import Conversion, convert, read_conversion
from moefy.errors import UsageError
from moefy.evaluation.contenders import Contender
from moefy.evaluation.heldout import Windows, evaluation_windows, heldout_losses
from moefy.evaluation.paired import Interval, paired_difference
from moefy.evaluation.speed import relative_speeds
from moefy.hardware import device
from moefy.progress import Progress, ProgressFn, silent
from moefy.recipe import ConvertRecipe, ConvertSettings
from moefy.report.tables import Columns, Rows, table, with_interval
from moefy.run_folder import MARKER, RunFolder, read_marker
from moefy.split import Split
from moefy.storage import digest, read_records, write_records

CURVE = "curve.jsonl"
_PROBES = "probes"
_WINDOWS = 8  # per domain, as many as `evaluate` reads
_SPEED = {"prompt_tokens": 256, "new_tokens": 16, "rounds": 3}
"""A busy moment spoils one round of three, and the median stays."""


@dataclass(frozen=True)
class Probe:
    """One number of active slices that was tried."""

    active: int
    share: float  # of every FFN that runs for a token
    excess_loss: Interval  # nats above dense, with its 95 % interval over windows
    # tokens per second over the dense model's, one sequence, measured beside it
    prefill_speed: float
    decode_speed: float


@dataclass(frozen=True)
class Search:
    """What `search` did."""

    conversion: Conversion  # the model in OUT
    curve: list[Probe]  # by active slices


def search(
    source: str | Path,
    out: str | Path,
    *,
    max_loss: float,
    data: str | Path = "demo",
    recipe: ConvertRecipe | str | Path | None = None,
    overwrite: bool = False,
    report: ProgressFn = silent,
    **settings: Unpack[ConvertSettings],
) -> Search:
    """Convert with the smallest number of active slices whose held-out loss is low enough.

    The numbers between `shared` and `experts` are bisected: log2(experts) conversions, each a whole
    one with the recipe that was asked for, and measured on the documents that calibration leaves
    out. Of `shared`, a given number stays, and the default is half of the active slices each time.
    All slices active is the dense model again and is not tried. Bisection takes for granted that
    the loss falls as `active` grows, which holds only roughly: where two neighbours differ by less
    than their intervals, a smaller number that was not tried may keep the loss too.

    Args:
        source: the dense model, as for `convert`.
        out: folder to write: the model, and `curve.jsonl` with what was measured. The same call
            goes on with the conversions that a stopped one has finished.
        max_loss: nats per token above the dense model.
        data: calibration text as for `convert`, with held-out documents (not `self`).
        recipe: a `ConvertRecipe` or a YAML file with its keys; `active` is not set.
        overwrite: replace an existing model in `out`.
        report: told about progress.
        **settings: single `ConvertRecipe` keys; they override the recipe.

    Raises:
        UsageError: no number of slices keeps the loss, or something is not usable; nothing was
            written.
        StorageError: the disk is full.
    """
    asked = ConvertRecipe.build(recipe, **settings)
    with RunFolder(
        out, "model", overwrite=overwrite, sources=[source], resumes=True, scratch=[_PROBES]
    ) as run:
        dense = resolve(source, report=report)
        inner = DenseCheckpoint(dense, asked.part).config["intermediate_size"]
        low, experts = _bounds(asked, max_loss, data, inner)
        remedy = "add text, or shorten the windows with --set calibration_length=N"
        length = asked.calibration_length
        text = evaluation_windows(data, dense, _WINDOWS, length, remedy=remedy, report=report)
        identity = {
            "source": str(source),
            "data": str(data),
            "inputs": digest([fingerprint(dense), {k: v.tolist() for k, v in text.items()}]),
            "recipe": asked.model_dump(mode="json"),
            "max_loss": max_loss,
        }
        run.begin(identity)
        if not run.was_finished:
            prober = _Prober(source, dense, data, asked, experts, text, run.work, report)
            try:
                best = prober.smallest(low, max_loss)
            finally:  # a refusal leaves nothing; what was measured stays for the next call
                if [file.name for file in run.work.iterdir()] == [MARKER]:
                    shutil.rmtree(run.work)
            if best.is_dir():  # else a call that was killed has published it
                (best / MARKER).unlink(missing_ok=True)
                run.publish(best)
        run.finish()
    curve = sorted(read_records(run.out / CURVE, Probe), key=lambda probe: probe.active)
    return Search(read_conversion(run.out), curve)


def curve_rows(found: Search) -> Rows:
    """Return header and rows of the curve: what each number of active slices costs and gains."""
    written = found.conversion.recipe.active
    columns: Columns[Probe] = [
        ("active", lambda probe: str(probe.active)),
        ("of the FFN", lambda probe: f"{probe.share:.0%}"),
        ("nats above dense", lambda probe: with_interval(probe.excess_loss, ".3f")),
        ("prefill", lambda probe: f"× {probe.prefill_speed:.2f}"),
        ("decode", lambda probe: f"× {probe.decode_speed:.2f}"),
        ("", lambda probe: "written" * (probe.active == written)),
    ]
    return table(found.curve, columns)


def _bounds(
    asked: ConvertRecipe, max_loss: float, data: str | Path, intermediate_size: int
) -> tuple[int, int]:
    """Return the fewest active slices to try, and all slices; a UsageError if that is no search."""
    experts = Split.of(intermediate_size, asked.experts, shared=0).experts
    shared = asked.shared or 0
    wrong = None
    if asked.active is not None:
        wrong = f"finds --active, and that is {asked.active} already: leave one of them out"
    elif not 0 <= max_loss < math.inf:
        wrong = f"is {max_loss}: give nats per token, 0 or more, as in 0.1"
    elif str(data) == SELF:
        wrong = f"needs held-out documents, and --data {SELF} has none: give text, or leave it out"
    elif shared >= experts - 1:
        wrong = f"finds no --active between {shared} shared and all {experts}: change the counts"
    if wrong:
        raise UsageError(f"--max-loss {wrong}")
    return shared + 1, experts


@dataclass(frozen=True)
class _Prober:
    """Converts and measures, one number of active slices after another."""

    source: str | Path
    dense: Path  # what `source` resolves to
    data: str | Path
    asked: ConvertRecipe
    experts: int
    text: Windows
    work: Path
    report: ProgressFn

    @cached_property
    def dense_losses(self) -> list[list[float]]:
        """By domain and window."""
        return self._losses(self.dense)

    def smallest(self, low: int, max_loss: float) -> Path:
        """Return the folder of the model with the fewest active slices that keeps the loss.

        Raises:
            UsageError: no number from `low` on keeps it.
        """
        file, high, best, done, note = self.work / CURVE, self.experts, None, 0, ""
        curve = {probe.active: probe for probe in read_records(file, Probe)}
        known = len(curve)
        while low < high:
            left, active = (high - low).bit_length(), (low + high) // 2
            folder, is_new = self.work / _PROBES / str(active), active not in curve
            if is_new:
                if done == known:
                    self.report(Progress("plan the search", 1, 1, f"at most {left} conversions"))
                self.report(Progress("search", done, done + left, note))
                curve[active] = self._probe(folder, active)
                write_records(file, map(asdict, curve.values()))
            loss, done = curve[active].excess_loss.value, done + 1
            note = f"{active} of {self.experts} slices: {loss:.3f} nats above dense"
            if loss <= max_loss:
                high, best, worse = active, folder, best
            else:
                low, worse = active + 1, folder
            if is_new and worse:  # two models at most lie on the disk
                shutil.rmtree(worse)
        self.report(Progress("search", done, done, note))
        if best:
            return best
        file.unlink()
        shutil.rmtree(self.work / _PROBES)
        raise UsageError(
            f"{self.experts - 1} active slices of {self.experts}, the most that can be tried, "
            f"stand {curve[self.experts - 1].excess_loss.value:.3f} nats above the dense model on "
            f"held-out text, and --max-loss allows {max_loss:g}: raise it, or --effort"
        )

    def _probe(self, folder: Path, active: int) -> Probe:
        marker = read_marker(folder)
        if marker is None or marker.state != "finished":
            recipe = ConvertRecipe.build(self.asked, active=active)
            convert(self.source, folder, data=self.data, recipe=recipe, report=self.report)
        above = paired_difference(self.dense_losses, self._losses(folder))
        models = {"dense": self.dense, folder.name: folder}
        contenders = [Contender(name, read_config(model), model) for name, model in models.items()]
        _, speed = relative_speeds(contenders, **_SPEED, report=self.report)
        return Probe(active, active / self.experts, above, speed["prefill"], speed["decode"])

    def _losses(self, model: Path) -> list[list[float]]:
        """Return a model's mean loss of every window, by domain."""
        network = load_model(model, dtype=torch.float32).to(device())
        losses = []
        for done, (domain, rows) in enumerate(self.text.items(), start=1):
            single = {str(idx): row[None] for idx, row in enumerate(rows)}
            found = heldout_losses(network, single, micro_batch_size=_WINDOWS, precision="float32")
            losses.append([*found.loss.values()])
            self.report(Progress("evaluate", done, len(self.text), domain))
        return losses
