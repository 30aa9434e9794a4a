"""Which samples come next: a pure function of the seed and of the weights so far.

Nothing here knows what a sequence is or where it lies; a sample is a domain, a number, an epoch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from moefy.data.permutation import permuted
from moefy.data.strategies import UpdateRule
from moefy.errors import CorpusError, OutputError, TrainingError, UsageError
from moefy.storage import changed_settings

_SKIPPED_AT_ONCE = 1 << 16
_PURPOSE = zlib.crc32(b"mixture")


class Sample(NamedTuple):
    """One training sequence.

    Attributes:
        domain: its name.
        sequence_idx: which of the domain's sequences.
        epoch: how often all of the domain's sequences had been seen before, from 0.
    """

    domain: str
    sequence_idx: int
    epoch: int


@dataclass(frozen=True)
class Batch:
    """The samples of one step, of all workers together.

    Attributes:
        samples: in order.
        repeats: the domains that begin again in this step, with the epoch that begins (1 is the
            first repetition). A domain stands here once an epoch, also after a restart.
    """

    samples: tuple[Sample, ...]
    repeats: Mapping[str, int]

    def of_worker(self, worker_idx: int, num_workers: int) -> tuple[Sample, ...]:
        """Return one worker's part; the parts of all workers, in order, are the batch.

        Raises:
            UsageError: the batch cannot be divided equally.
        """
        size, rest = divmod(len(self.samples), num_workers)
        if rest:
            raise UsageError(
                f"{len(self.samples)} sequences a step cannot be divided among {num_workers} "
                "processes: make global_batch_size a multiple of their number"
            )
        return self.samples[worker_idx * size : (worker_idx + 1) * size]


@dataclass(frozen=True)
class MixtureState:
    """Where a mixture stands; plain values, so that `json` keeps it exactly.

    The weights before the present ones are not needed: what they did is in the cursors.

    Attributes:
        step: batches drawn.
        seed: of the run.
        num_sequences: by domain; a state belongs to one corpus.
        cursors: by domain, samples drawn.
        weights: by domain.
        weights_since_step: the step before which they were set.
    """

    step: int
    seed: int
    num_sequences: dict[str, int]
    cursors: dict[str, int]
    weights: dict[str, float]
    weights_since_step: int


@dataclass(frozen=True)
class WeightUpdate:
    """One line of the weights' history.

    Attributes:
        step: batches drawn before; the weights hold from the next one on.
        weights: by domain.
        losses, reference: what led to them, nats per token; empty for the weights a run starts
            with.
    """

    step: int
    weights: dict[str, float]
    losses: dict[str, float]
    reference: dict[str, float]


class Mixture:
    """Draws samples from several domains with weights that may change.

    Sample i, counted over the whole run, comes from the domain that the i-th block of a
    counter-based generator (Philox, keyed on the seed) chooses by the weights of its step. A
    domain's sequences are visited in an order permuted by (seed, domain, epoch); a domain that
    runs out starts again and never ends the run. Every worker draws the whole batch and takes its
    part, so the samples do not depend on the number of workers.

    Args:
        num_sequences: by domain.
        weights: by domain, of the same names (see `strategies.initial_weights`).
        seed: of the run.
        global_batch_size: samples in a batch.

    Raises:
        CorpusError: a domain with weight has no sequence.
    """

    def __init__(
        self,
        num_sequences: Mapping[str, int],
        weights: Mapping[str, float],
        *,
        seed: int,
        global_batch_size: int,
    ) -> None:
        self.names = sorted(num_sequences)
        self.global_batch_size = global_batch_size
        self._seed = seed
        self._num_sequences = {name: num_sequences[name] for name in self.names}
        self._cursors = dict.fromkeys(self.names, 0)
        self._step = 0
        self._philox_key = np.random.SeedSequence([seed, _PURPOSE]).generate_state(2, np.uint64)
        self.set_weights(weights)

    @property
    def step(self) -> int:
        """Batches drawn so far."""
        return self._step

    @property
    def weights(self) -> dict[str, float]:
        """The present weights by domain."""
        return dict(self._weights)

    def next_batch(self) -> Batch:
        """Draw the samples of the next step."""
        domain_idxs = self._domain_idxs(self.global_batch_size)
        sequence_idxs, epochs = np.empty_like(domain_idxs), np.empty_like(domain_idxs)
        repeats = {}
        for domain_idx in np.unique(domain_idxs).tolist():
            name = self.names[domain_idx]
            chosen = domain_idxs == domain_idx
            first, length = self._cursors[name], self._num_sequences[name]
            draws = np.arange(first, first + np.count_nonzero(chosen))
            epochs[chosen], places = draws // length, draws % length
            sequence_idxs[chosen] = self._sequence_idxs(name, epochs[chosen], places)
            self._cursors[name] += len(draws)
            last_epoch = int(draws[-1]) // length
            if last_epoch > max(0, (first - 1) // length):
                repeats[name] = last_epoch
        self._step += 1
        samples = zip(domain_idxs.tolist(), sequence_idxs.tolist(), epochs.tolist(), strict=True)
        return Batch(tuple(Sample(self.names[idx], *rest) for idx, *rest in samples), repeats)

    def skip(self, num_steps: int) -> None:
        """Move past batches without saying what is in them, under the present weights."""
        left = num_steps * self.global_batch_size
        while left:
            counts = np.bincount(
                self._domain_idxs(min(left, _SKIPPED_AT_ONCE)), minlength=len(self.names)
            )
            for name, count in zip(self.names, counts.tolist(), strict=True):
                self._cursors[name] += count
            left -= int(counts.sum())
        self._step += num_steps

    def epochs(self) -> dict[str, float]:
        """Return, by domain, how often its sequences have been seen on average."""
        return {
            name: self._cursors[name] / max(self._num_sequences[name], 1) for name in self.names
        }

    def update_due(self, interval_steps: int) -> bool:
        """Say whether weights that follow the losses must be renewed before the next batch."""
        return self._step % interval_steps == 0 and self._weights_since_step < self._step

    def reweight(
        self, losses: Mapping[str, float], reference: Mapping[str, float], rule: UpdateRule
    ) -> WeightUpdate:
        """Renew the weights for the next batches. Domains of weight 0 stay left out.

        One process does this and sends the new weights to the others (`set_weights`): they must
        be the same to the last bit, which neither losses nor exponentials are on every processor.

        Args:
            losses: held-out loss of the present model by domain, nats per token.
            reference: by domain (see `data.reference`).
            rule: one of `strategies.UPDATE_RULES`.

        Returns:
            What to write into the log.

        Raises:
            TrainingError: a loss is not finite.
        """
        names = [name for name in self.names if self._weights[name] > 0]
        excess = np.array([losses[name] - reference[name] for name in names], dtype=np.float64)
        if not np.isfinite(excess).all():
            broken = [name for name in names if not math.isfinite(losses[name] - reference[name])]
            raise TrainingError(
                f"step {self._step}: the held-out loss of {', '.join(broken)} is not finite, so "
                "the mixture cannot follow it: lower --learning-rate, or look at these documents"
            )
        weights = rule(np.array([self._weights[name] for name in names]), excess)
        renewed = dict(zip(names, weights.tolist(), strict=True))
        self.set_weights({name: renewed.get(name, 0.0) for name in self.names})
        return WeightUpdate(
            self._step,
            self.weights,
            {name: float(losses[name]) for name in names},
            {name: float(reference[name]) for name in names},
        )

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Draw the next batches by these weights.

        Raises:
            CorpusError: a domain with weight has no sequence.
        """
        for name, weight in weights.items():
            if weight > 0 and not self._num_sequences[name]:
                raise CorpusError(
                    f"the domain {name!r} has not enough text for one sequence: add documents, "
                    "lower --sequence-length, or give it the weight 0"
                )
        self._weights = {name: weights[name] for name in self.names}
        cumulative = np.cumsum(list(self._weights.values()))
        self._cumulative = cumulative / cumulative[-1]  # ends at exactly 1, above every draw
        self._weights_since_step = self._step

    def state(self) -> MixtureState:
        """Return where this mixture stands."""
        return MixtureState(
            self._step,
            self._seed,
            dict(self._num_sequences),
            dict(self._cursors),
            self.weights,
            self._weights_since_step,
        )

    def restore(self, state: MixtureState) -> None:
        """Go on where another mixture of the same seed and corpus stood.

        Raises:
            OutputError: the state is of another seed or corpus.
        """
        mine = {"seed": self._seed} | _lengths(self._num_sequences)
        found = {"seed": state.seed} | _lengths(state.num_sequences)
        if changed := changed_settings(found, mine):
            raise OutputError(
                f"the checkpoint's data order is of another seed or corpus ({'; '.join(changed)}): "
                "give the same ones to continue it, or start again"
            )
        self.set_weights(state.weights)
        self._step, self._cursors = state.step, dict(state.cursors)
        self._weights_since_step = state.weights_since_step

    def _domain_idxs(self, num_samples: int) -> Int[np.ndarray, " samples"]:
        """Return the domains of the next samples; sample i reads block i of the generator."""
        drawn = sum(self._cursors.values())
        counter = np.array([drawn, 0, 0, 0], dtype=np.uint64)
        philox = np.random.Philox(key=self._philox_key, counter=counter)
        raw = philox.random_raw(4 * num_samples)[::4]  # a block is four numbers
        uniform = (raw >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(self._cumulative, uniform, side="right")

    def _sequence_idxs(
        self, name: str, epochs: Int[np.ndarray, " draws"], places: Int[np.ndarray, " draws"]
    ) -> Int[np.ndarray, " draws"]:
        """Return which sequences stand at these places of these epochs' orders."""
        found = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            key = (self._seed, zlib.crc32(name.encode("utf-8", "surrogatepass")), epoch)
            found[here] = permuted(places[here], self._num_sequences[name], key)
        return found


def _lengths(num_sequences: Mapping[str, int]) -> dict[str, int]:
    return {f"sequences of {name!r}": count for name, count in num_sequences.items()}
