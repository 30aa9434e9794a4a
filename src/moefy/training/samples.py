"""What a step trains on: windows of a corpus for `train`, conversations for `tune`.

Both are a function of the seed and of the steps before, and cut a step into as many passes on every
process, so that a resumed run and a run of several processes see the same samples.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from moefy.data.corpus import Corpus
from moefy.data.examples import IGNORED, Example
from moefy.data.mixture import Mixture, MixtureState, Sample, WeightUpdate
from moefy.training.follow import Follower
from moefy.training.processes import Processes
from moefy.training.recipe import TrainRecipe

CONVERSATIONS = "conversations"


@dataclass(frozen=True)
class Rows:
    """What one process computes in one pass.

    Attributes:
        tokens: ids, padded on the right.
        labels: the token itself where it is learned, else IGNORED.
        domains: of the rows.
        positions: of every token in its own conversation, where a row holds several; None where
            every row is one sequence.
        is_real: False for padding; None without padding.
    """

    tokens: Int[Tensor, "rows length"]
    labels: Int[Tensor, "rows length"]
    domains: tuple[str, ...]
    positions: Int[Tensor, "rows length"] | None = None
    is_real: Bool[Tensor, "rows length"] | None = None

    def to(self, place: torch.device) -> Rows:
        """Return the same on a device."""
        moved: dict[str, Any] = {
            name: value.to(place) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def inputs(self) -> dict[str, Tensor]:
        """Return what a model's forward pass takes beside the tokens.

        transformers lets no token attend across a place where the positions begin again. Padding
        on the right needs no attention mask: no token looks forward.
        """
        return {} if self.positions is None else {"position_ids": self.positions}


@dataclass(frozen=True)
class StepSamples:
    """The samples of one step.

    Attributes:
        passes: of this process, made when they are asked for.
        num_passes: the same on all processes.
        num_labels, num_tokens: of all processes.
        domains: of all processes' rows, sorted.
        names: of all processes' samples, for an error.
        notes: what the step's line of the log says of them.
    """

    passes: Iterator[Rows]
    num_passes: int
    num_labels: int
    num_tokens: int
    domains: list[str]
    names: list[str]
    notes: dict[str, Any]


class WindowSamples:
    """Windows of several domains, drawn by the weights of a mixture that may follow the losses.

    Args:
        corpus: the windows.
        mixture: draws them.
        recipe: the batch sizes.
        processes: of the run.

    Attributes:
        mixture: of the run.
        follower: renews the weights; None where they are fixed.
    """

    def __init__(
        self, corpus: Corpus, mixture: Mixture, recipe: TrainRecipe, processes: Processes
    ) -> None:
        self._corpus, self.mixture = corpus, mixture
        self._recipe, self._processes = recipe, processes
        self.follower: Follower | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the steps so far, of all processes."""
        return self.mixture.step * self._recipe.tokens_per_step

    def next_step(self, network: Any) -> StepSamples:
        """Renew the weights where that is due, and draw a step."""
        mixture, recipe = self.mixture, self._recipe
        update = None
        if mixture.step == 0:
            update = WeightUpdate(0, mixture.weights, {}, {})
        elif self.follower:
            update = self.follower.update(network)
        batch = mixture.next_batch()
        mine = batch.of_worker(self._processes.data_idx, self._processes.num_data)
        at_once, count = recipe.micro_batch_size, len(batch.samples)
        notes: dict[str, Any] = {"mixture": asdict(update)} if update else {}
        return StepSamples(
            passes=(self._rows(mine[i : i + at_once]) for i in range(0, len(mine), at_once)),
            num_passes=len(mine) // at_once,
            num_labels=count * (recipe.sequence_length - 1),
            num_tokens=count * recipe.sequence_length,
            domains=sorted({sample.domain for sample in batch.samples}),
            names=[f"{name}[{idx}]" for name, idx, _ in batch.samples],
            notes=notes | ({"repeats": dict(batch.repeats)} if batch.repeats else {}),
        )

    def state(self) -> dict[str, Any]:
        """Return the mixture's state."""
        return asdict(self.mixture.state())

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a mixture's state."""
        self.mixture.restore(MixtureState(**state))

    def _rows(self, samples: Sequence[Sample]) -> Rows:
        windows = np.stack([self._corpus.sequence(name, idx) for name, idx, _ in samples])
        tokens = torch.from_numpy(windows)
        return Rows(tokens, tokens, tuple(name for name, _, _ in samples))


class ConversationSamples:
    """Rows of conversations, every row once an epoch; the last step of an epoch may be smaller.

    Args:
        rows: a row's conversations, which stand behind each other.
        epochs: how often every row is seen.
        seed: of the order.
        global_batch_size: rows of a step.
        micro_batch_size: rows of a pass.
        processes: of the run.

    Attributes:
        steps_per_epoch, num_steps: of the optimizer.
        tokens: of the steps so far.
    """

    def __init__(
        self,
        rows: list[list[Example]],
        *,
        epochs: int,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        processes: Processes,
    ) -> None:
        self._rows, self._seed, self._processes = rows, seed, processes
        self._global_batch_size, self._micro_batch_size = global_batch_size, micro_batch_size
        self.steps_per_epoch = -(-len(rows) // global_batch_size)
        self.num_steps = epochs * self.steps_per_epoch
        self.tokens = self._step = 0

    def next_step(self, _network: Any) -> StepSamples:
        """Take the next rows in the epoch's order."""
        epoch, place = divmod(self._step, self.steps_per_epoch)
        # the order of transformers' Trainer, so that runs can be compared with its runs
        generator = torch.Generator().manual_seed((self._seed + epoch) % 2**63)
        order = torch.randperm(len(self._rows), generator=generator).tolist()
        chosen = order[place * self._global_batch_size :][: self._global_batch_size]
        examples = [example for idx in chosen for example in self._rows[idx]]
        num_tokens = sum(len(example.ids) for example in examples)
        self._step += 1
        self.tokens += num_tokens
        passes = list(self._passes([self._rows[idx] for idx in chosen]))
        return StepSamples(
            passes=iter(passes),
            num_passes=len(passes),
            num_labels=num_labels(examples),
            num_tokens=num_tokens,
            domains=[CONVERSATIONS],
            names=[f"row {idx}" for idx in chosen],
            notes={
                "epoch": epoch + (place * self._global_batch_size + len(chosen)) / len(self._rows)
            },
        )

    def state(self) -> dict[str, Any]:
        """Return the steps and tokens so far; the order follows from the seed."""
        return {"step": self._step, "tokens": self.tokens}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        self._step, self.tokens = state["step"], state["tokens"]

    def _passes(self, rows: list[list[Example]]) -> Iterator[Rows]:
        """Cut a step's rows into this process's passes, as many and as large as the others'."""
        own, at_once = self._processes, self._micro_batch_size
        share = -(-len(rows) // own.num_data)
        for first in range(0, share, at_once):
            parts = [
                rows[idx * share : (idx + 1) * share][first : first + at_once]
                for idx in range(own.num_data)
            ]
            length = max(sum(len(e.ids) for e in row) for part in parts for row in part)
            # a process without rows computes padding: the others wait for it in every layer
            yield padded_rows(parts[own.data_idx], height=max(map(len, parts)), length=length)


Samples = WindowSamples | ConversationSamples


def padded_rows(rows: list[list[Example]], *, height: int, length: int) -> Rows:
    """Return rows of conversations, filled up with padding.

    Args:
        rows: at most `height`.
        height: rows.
        length: tokens of a row.
    """
    tokens = torch.zeros(height, length, dtype=torch.long)
    labels = torch.full_like(tokens, IGNORED)
    is_real = torch.zeros_like(tokens, dtype=torch.bool)
    positions = torch.arange(length).repeat(height, 1)
    for row, examples in enumerate(rows):
        start = 0
        for example in examples:
            end = start + len(example.ids)
            tokens[row, start:end] = torch.tensor(example.ids)
            # the first token of a conversation is not to be predicted from the one before it
            labels[row, start + 1 : end] = torch.tensor(example.labels[1:])
            positions[row, start:] = torch.arange(length - start)
            start = end
        is_real[row, :start] = True
    is_packed = any(len(examples) > 1 for examples in rows)
    domains = (CONVERSATIONS,) * height
    return Rows(tokens, labels, domains, positions if is_packed else None, is_real)


def num_labels(examples: Sequence[Example]) -> int:
    """Return how many tokens are learned; the first of a conversation is not."""
    return sum(label != IGNORED for example in examples for label in example.labels[1:])


def best_fit(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Group conversations into rows: the longest first, each into the fullest row that has room.

    Best fit decreasing, as TRL packs (its `bfd`); conversations of one length keep their order.

    Args:
        examples: none longer than a row.
        length: tokens of a row.
    """
    rows: list[list[Example]] = []
    by_space: defaultdict[int, deque[list[Example]]] = defaultdict(deque)
    row: list[Example]
    spaces: list[int] = []  # those of which there is a row, ascending
    for example in sorted(examples, key=lambda example: -len(example.ids)):
        place = bisect_left(spaces, len(example.ids))
        if place == len(spaces):
            space, row = length, []
            rows.append(row)
        else:
            space = spaces[place]
            row = by_space[space].popleft()
            if not by_space[space]:
                del spaces[place]
        row.append(example)
        space -= len(example.ids)
        if not by_space[space]:
            insort(spaces, space)
        by_space[space].append(row)
    return rows
