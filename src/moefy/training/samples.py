"""The samples of a step: windows of a corpus for `train`, conversations for `tune`.

Both are a function of the seed and of the steps before, and cut a step into as many passes on every
process, so that a resumed run and a run of several processes see the same samples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moefy.data.corpus import Corpus
from moefy.data.mixture import Mixture, MixtureState, Sample, WeightUpdate
from moefy.data.template import IGNORED, Example
from moefy.evaluation.heldout import Heldout, heldout_losses
from moefy.training.processes import Processes
from moefy.training.recipe import TrainRecipe, TuneRecipe

CONVERSATIONS = "conversations"
Windows = Mapping[str, Int[np.ndarray, "_windows sequence"]]  # held-out token ids by domain


@dataclass(frozen=True)
class Rows:
    """The rows of one pass of one process."""

    tokens: Int[Tensor, "rows length"]  # padded on the right
    labels: Int[Tensor, "rows length"]  # the token itself where it is learned, else IGNORED
    domains: tuple[str, ...]  # of the rows
    is_real: Bool[Tensor, "rows length"] | None = None  # False for padding; None without any

    def to(self, place: torch.device) -> Rows:
        """Return the same on a device."""
        moved: dict[str, Any] = {
            name: value.to(place) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class StepSamples:
    """The samples of one step."""

    passes: Iterator[Rows]  # of this process, made when they are asked for
    num_passes: int  # the same on all processes
    num_labels: int  # of all processes
    num_tokens: int  # of all processes
    domains: list[str]  # of all processes, sorted
    names: list[str]  # of all samples, for an error
    notes: dict[str, Any]  # for the step's line of the log


class WindowSamples:
    """Windows of several domains, drawn by a mixture whose weights may follow the losses."""

    def __init__(
        self, corpus: Corpus, mixture: Mixture, recipe: TrainRecipe, processes: Processes
    ) -> None:
        self._corpus, self.mixture = corpus, mixture
        self._recipe, self._processes = recipe, processes
        self._heldout: Windows = {}
        self._reference: Mapping[str, float] = {}

    def follow(self, heldout: Windows, reference: Mapping[str, float]) -> None:
        """Renew the weights of `heldout`'s domains by their losses above `reference` (nats)."""
        self._heldout, self._reference = heldout, reference

    @property
    def tokens(self) -> int:
        """Tokens of the steps so far, of all processes."""
        return self.mixture.step * self._recipe.global_batch_size * self._recipe.sequence_length

    def next_step(self, network: Any) -> StepSamples:
        """Renew the weights where that is due, and draw a step."""
        mixture, recipe = self.mixture, self._recipe
        update = None
        if mixture.step == 0:
            update = WeightUpdate(0, mixture.weights, {}, {})
        elif self._heldout and mixture.update_due(recipe.mixture_interval_steps):
            losses = losses_of(network, self._heldout, recipe, self._processes).loss
            # the first process's, to the last bit: all must draw the same samples
            update = self._processes.of_first(lambda: mixture.reweight(losses, self._reference))
            mixture.set_weights(update.weights)
        batch, own = mixture.next_batch(), self._processes
        at_once, count = recipe.micro_batch_size, len(batch)
        mine = batch[count // own.num_data * own.data_idx :][: count // own.num_data]
        notes: dict[str, Any] = {"mixture": asdict(update)} if update else {}
        if epochs := {name: epoch for name, _, epoch in batch if epoch}:
            notes["epochs"] = epochs  # of a domain that ran out, how often so far
        return StepSamples(
            passes=(self._rows(mine[i : i + at_once]) for i in range(0, len(mine), at_once)),
            num_passes=len(mine) // at_once,
            num_labels=count * (recipe.sequence_length - 1),
            num_tokens=count * recipe.sequence_length,
            domains=sorted({sample.domain for sample in batch}),
            names=[f"{name}[{idx}]" for name, idx, _ in batch],
            notes=notes,
        )

    def state(self) -> dict[str, Any]:
        """Return the mixture's state."""
        return asdict(self.mixture.state())

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a mixture's state."""
        self.mixture.restore(MixtureState(**state))

    def _rows(self, samples: Sequence[Sample]) -> Rows:
        windows = np.stack([self._corpus.train[name][idx] for name, idx, _ in samples])
        tokens = torch.from_numpy(windows.astype(np.int64))
        return Rows(tokens, tokens, tuple(name for name, _, _ in samples))


def losses_of(
    network: Any,
    windows: Windows,
    recipe: TrainRecipe,
    processes: Processes,
    labels: Windows | None = None,
    teacher: Any | None = None,
) -> Heldout:
    """Return a model's held-out losses by domain, computed by all processes."""
    return heldout_losses(
        network,
        windows,
        labels,
        teacher=teacher,
        precision=recipe.precision,
        micro_batch_size=recipe.micro_batch_size,
        data_idx=processes.data_idx,
        num_data=processes.num_data,
        total=processes.total,
    )


class ConversationSamples:
    """Conversations, each once an epoch; the last step of an epoch may be smaller."""

    def __init__(self, examples: list[Example], recipe: TuneRecipe, processes: Processes) -> None:
        self._rows = examples
        self._recipe, self._processes = recipe, processes
        self._steps_per_epoch = -(-len(self._rows) // recipe.global_batch_size)
        self.num_steps = recipe.epochs * self._steps_per_epoch
        self.tokens = self._step = 0  # so far

    def next_step(self, _network: Any) -> StepSamples:
        """Take the next rows in the epoch's order."""
        epoch, place = divmod(self._step, self._steps_per_epoch)
        # the order of transformers' Trainer, so that runs can be compared with its runs
        generator = torch.Generator().manual_seed((self._recipe.seed + epoch) % 2**63)
        order = torch.randperm(len(self._rows), generator=generator).tolist()
        size = self._recipe.global_batch_size
        chosen = order[place * size :][:size]
        examples = [self._rows[idx] for idx in chosen]
        num_tokens = sum(len(example.ids) for example in examples)
        self._step += 1
        self.tokens += num_tokens
        passes = list(self._passes(examples))
        return StepSamples(
            passes=iter(passes),
            num_passes=len(passes),
            num_labels=num_labels(examples),
            num_tokens=num_tokens,
            domains=[CONVERSATIONS],
            names=[f"row {idx}" for idx in chosen],
            notes={"epoch": epoch + (place * size + len(chosen)) / len(self._rows)},
        )

    def state(self) -> dict[str, Any]:
        """Return the steps and tokens so far; the order follows from the seed."""
        return {"step": self._step, "tokens": self.tokens}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._step, self.tokens = state["step"], state["tokens"]

    def _passes(self, rows: list[Example]) -> Iterator[Rows]:
        """Cut a step's rows into this process's passes, as many and as large as the others'."""
        own, at_once = self._processes, self._recipe.micro_batch_size
        share = -(-len(rows) // own.num_data)
        for first in range(0, share, at_once):
            parts = [
                rows[idx * share : (idx + 1) * share][first : first + at_once]
                for idx in range(own.num_data)
            ]
            length = max(len(row.ids) for part in parts for row in part)
            # a process without rows computes padding: the others wait for it in every layer
            yield padded_rows(parts[own.data_idx], height=max(map(len, parts)), length=length)


Samples = WindowSamples | ConversationSamples


def padded_rows(rows: list[Example], *, height: int, length: int) -> Rows:
    """Return at most `height` conversations, filled up with padding to `length`."""
    # padding on the right needs no attention mask: no token looks forward
    tokens = torch.zeros(height, length, dtype=torch.long)
    labels = torch.full_like(tokens, IGNORED)
    is_real = torch.zeros_like(tokens, dtype=torch.bool)
    for row, example in enumerate(rows):
        end = len(example.ids)
        tokens[row, :end] = torch.tensor(example.ids)
        labels[row, :end] = torch.tensor(example.labels)
        is_real[row, :end] = True
    return Rows(tokens, labels, (CONVERSATIONS,) * height, is_real)


def num_labels(examples: Sequence[Example]) -> int:
    """Return the number of labels; the first token of a conversation has none."""
    return sum(label != IGNORED for example in examples for label in example.labels[1:])
