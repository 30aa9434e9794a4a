"""Which samples come next: a pure function of the seed and of the weights so far.

Nothing here knows what a sequence is or where it lies; a sample is a domain, a number, an epoch.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt64

from moefy.data.strategies import updated_weights
from moefy.errors import CorpusError, TrainingError

# Keeps this generator apart from others that are keyed on the same seed.
_PURPOSE = zlib.crc32(b"mixture")


class Sample(NamedTuple):
    """One training sequence: sequence `sequence_idx` of a domain, in an epoch counted from 0."""

    domain: str
    sequence_idx: int
    epoch: int


@dataclass
class MixtureState:
    """Where a mixture stands; plain values, so that `json` keeps it exactly.

    Earlier weights are not needed: what they did is in the cursors.
    """

    step: int  # batches drawn
    seed: int
    num_sequences: dict[str, int]  # by domain; a state belongs to one corpus
    cursors: dict[str, int]  # by domain, samples drawn
    weights: dict[str, float]
    weights_since_step: int  # the step before which they were set


@dataclass(frozen=True)
class WeightUpdate:
    """One line of the weights' history, by domain."""

    step: int  # batches drawn before; the weights hold from the next one on
    weights: dict[str, float]
    # What led to them, nats per token; empty for the weights that a run starts with.
    losses: dict[str, float]
    reference: dict[str, float]


class Mixture:
    """Draws samples from several domains with weights that may change.

    Sample i, counted over the whole run, comes from the domain that the i-th block of a
    counter-based generator (Philox, keyed on the seed) chooses by the weights of its step. A
    domain's sequences are visited in an order permuted by (seed, domain, epoch); a domain that
    runs out starts again and never ends the run. Every process draws the whole batch and takes its
    part, so the samples do not depend on the number of processes.

    CorpusError says that a domain with weight has no sequence.
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
        sizes = {name: num_sequences[name] for name in self.names}
        self._state = MixtureState(0, seed, sizes, dict.fromkeys(self.names, 0), {}, 0)
        self._philox_key = np.random.SeedSequence([seed, _PURPOSE]).generate_state(2, np.uint64)
        self.set_weights(weights)

    @property
    def step(self) -> int:
        """Batches drawn so far."""
        return self._state.step

    @property
    def weights(self) -> dict[str, float]:
        """The present weights by domain."""
        return dict(self._state.weights)

    def next_batch(self) -> tuple[Sample, ...]:
        """Draw the samples of the next step, of all processes together."""
        state = self._state
        domain_idxs = self._domain_idxs(self.global_batch_size)  # (samples,)
        sequence_idxs, epochs = np.empty_like(domain_idxs), np.empty_like(domain_idxs)
        for domain_idx in np.unique(domain_idxs).tolist():
            name = self.names[domain_idx]
            chosen = domain_idxs == domain_idx
            first, length = state.cursors[name], state.num_sequences[name]
            # A domain counts its own samples, so another domain never moves its order.
            draws = np.arange(first, first + np.count_nonzero(chosen))
            epochs[chosen], places = draws // length, draws % length
            sequence_idxs[chosen] = self._sequence_idxs(name, epochs[chosen], places)
            state.cursors[name] += len(draws)
        state.step += 1
        samples = zip(domain_idxs.tolist(), sequence_idxs.tolist(), epochs.tolist(), strict=True)
        return tuple(Sample(self.names[idx], *rest) for idx, *rest in samples)

    def update_due(self, interval_steps: int) -> bool:
        """Say whether weights that follow the losses must be renewed before the next batch."""
        # A run that was stopped right after an update must not renew them twice.
        return self.step % interval_steps == 0 and self._state.weights_since_step < self.step

    def reweight(self, losses: Mapping[str, float], reference: Mapping[str, float]) -> WeightUpdate:
        """Renew the weights for the next batches. Domains of weight 0 stay left out.

        One process does this and sends the new weights to the others (`set_weights`): they must
        be the same to the last bit, which neither losses nor exponentials are on every processor.

        `losses` are the present model's on held-out text, nats per token by domain, `reference` is
        what they are compared with. TrainingError says that a loss is not finite.
        """
        names = [name for name in self.names if self._state.weights[name] > 0]
        excess = {name: losses[name] - reference[name] for name in names}
        if broken := [name for name in names if not math.isfinite(excess[name])]:
            raise TrainingError(
                f"step {self.step}: the held-out loss of {', '.join(broken)} is not finite, so "
                "the mixture cannot follow it: lower --learning-rate, or look at these documents"
            )
        old = np.array([self._state.weights[name] for name in names])
        new = updated_weights(old, np.array(list(excess.values()), dtype=np.float64))
        self.set_weights(
            dict.fromkeys(self.names, 0.0) | dict(zip(names, new.tolist(), strict=True))
        )
        return WeightUpdate(
            self.step,
            self.weights,
            {name: float(losses[name]) for name in names},
            {name: float(reference[name]) for name in names},
        )

    def set_weights(self, weights: Mapping[str, float]) -> None:
        """Draw the next batches by these weights; CorpusError names a domain without text."""
        for name, weight in weights.items():
            if weight > 0 and not self._state.num_sequences[name]:
                raise CorpusError(
                    f"the domain {name!r} has not enough text for one sequence: add documents, "
                    "lower --sequence-length, or give it the weight 0"
                )
        self._state.weights = {name: weights[name] for name in self.names}
        self._state.weights_since_step = self.step
        cumulative = np.cumsum(list(self._state.weights.values()))
        self._cumulative = cumulative / cumulative[-1]  # ends at exactly 1, above every draw

    def state(self) -> MixtureState:
        """Return where this mixture stands."""
        return deepcopy(self._state)

    def restore(self, state: MixtureState) -> None:
        """Go on where another mixture of the same seed and corpus stood."""
        self.set_weights(state.weights)
        self._state = deepcopy(state)

    def _domain_idxs(self, num_samples: int) -> Int[np.ndarray, " samples"]:
        """Return the domains of the next samples; sample i reads block i of the generator."""
        drawn = sum(self._state.cursors.values())
        counter = np.array([drawn, 0, 0, 0], dtype=np.uint64)
        philox = np.random.Philox(key=self._philox_key, counter=counter)
        raw = philox.random_raw(4 * num_samples)[::4]  # a block is four numbers
        uniform = (raw >> np.uint64(11)) * 2.0**-53  # the 53 bits that a double holds, in [0, 1)
        return np.searchsorted(self._cumulative, uniform, side="right")

    def _sequence_idxs(
        self, name: str, epochs: Int[np.ndarray, " draws"], places: Int[np.ndarray, " draws"]
    ) -> Int[np.ndarray, " draws"]:
        """Return which sequences stand at these places of these epochs' orders."""
        found = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            # crc32, because Python's own hash of a text differs from process to process
            key = (self._state.seed, zlib.crc32(name.encode("utf-8", "surrogatepass")), epoch)
            found[here] = permuted(places[here], self._state.num_sequences[name], key)
        return found


_NUM_ROUNDS = 12  # with 8, orders of 5 to 16 places are measurably uneven


def permuted(
    places: Int[np.ndarray, " places"], length: int, key: Sequence[int]
) -> Int[np.ndarray, " places"]:
    """Return what stands at some places of a pseudo-random permutation of 0 … length - 1.

    A Feistel network permutes the smallest 4^b >= length numbers: a number is two halves (L, R) of
    b bits, and each of twelve rounds maps them to (R, L xor hash(R xor round key)). A result
    outside the range is put through again until it is inside ("cycle walking", Black and Rogaway
    2002), which keeps it a permutation and takes less than four turns on average.

    Args:
        places: each from 0 to length - 1, in any order, repeated or not.
        length: length of the permutation, 1 to 2^62.
        key: non-negative integers that choose the permutation.
    """
    half_bits = max(1, -(-(length - 1).bit_length() // 2))
    round_keys = np.random.SeedSequence(list(key)).generate_state(_NUM_ROUNDS, np.uint64)
    values = _feistel(places.astype(np.uint64), half_bits, round_keys)
    while (outside := np.flatnonzero(values >= length)).size:
        values[outside] = _feistel(values[outside], half_bits, round_keys)
    return values.astype(np.int64)


def _feistel(
    values: UInt64[np.ndarray, " values"],
    half_bits: int,
    round_keys: UInt64[np.ndarray, " rounds"],
) -> UInt64[np.ndarray, " values"]:
    bits = np.uint64(half_bits)
    mask = np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for round_key in round_keys:
        mixed = right ^ round_key
        # MurmurHash3's 64-bit finaliser spreads every bit over all of the others
        for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
            mixed = (mixed ^ (mixed >> np.uint64(33))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(33)
        left, right = right, left ^ (mixed & mask)
    return (left << bits) | right
