"""Which sample comes next: a pure function of the seed and the sample's index."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
from jaxtyping import Int

from moefy.errors import CorpusError


class Mixture:
    """Draws training windows from several domains with fixed weights.

    Sample i comes from the domain d(i) drawn with the weights by a generator keyed on (seed, i);
    inside a domain its windows are visited in an order permuted by (seed, domain, epoch), so a
    domain that runs out starts again and never ends the run. The sequence depends on nothing but
    the seed, the weights and the domains' sizes: it is the same after a restart.

    Args:
        windows: by domain, token ids of shape [windows, sequence].
        weights: by domain; normalised here. Domains with weight 0 are never drawn.
        seed: of the run.

    Raises:
        CorpusError: weights and domains do not match, or a domain with weight has no window.
    """

    def __init__(
        self,
        windows: Mapping[str, Int[np.ndarray, "_windows sequence"]],
        weights: Mapping[str, float] | None,
        *,
        seed: int,
    ) -> None:
        self.names = sorted(windows)
        self.weights = normalised_weights(self.names, weights)
        for name, weight in self.weights.items():
            if weight > 0 and len(windows[name]) == 0:
                raise CorpusError(
                    f"the domain {name!r} has not enough text for one sequence: add documents, "
                    "lower --sequence-length, or give it the weight 0"
                )
        self._windows = windows
        self._seed = seed
        self._cumulative = np.cumsum([self.weights[name] for name in self.names])
        self._drawn = dict.fromkeys(self.names, 0)
        self._next = 0

    def sample(self) -> tuple[str, int, Int[np.ndarray, " sequence"]]:
        """Return the next sample: its domain, the window's index in it, and the tokens."""
        generator = np.random.Generator(np.random.Philox(key=[self._seed, self._next]))
        position = int(np.searchsorted(self._cumulative, generator.random(), side="right"))
        name = self.names[min(position, len(self.names) - 1)]
        epoch, place = divmod(self._drawn[name], len(self._windows[name]))
        window_idx = int(self._order(name, epoch)[place])
        self._drawn[name] += 1
        self._next += 1
        return name, window_idx, self._windows[name][window_idx]

    def skip(self, num_samples: int) -> None:
        """Move past samples, as after a restart."""
        for _ in range(num_samples):
            self.sample()

    def epochs(self) -> dict[str, float]:
        """Return, by domain, how often its windows have been seen on average."""
        return {name: self._drawn[name] / max(len(self._windows[name]), 1) for name in self.names}

    @lru_cache(maxsize=64)  # noqa: B019 - one mixture lives as long as its run
    def _order(self, name: str, epoch: int) -> Int[np.ndarray, " windows"]:
        key = np.random.SeedSequence([self._seed, self.names.index(name), epoch])
        permutation: Int[np.ndarray, " windows"] = np.random.Generator(
            np.random.Philox(key)
        ).permutation(len(self._windows[name]))
        return permutation


def normalised_weights(names: list[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    """Return weights that sum to 1 for the given domains; None means uniform.

    Raises:
        CorpusError: a weight names no domain, or a domain has no weight.
    """
    if weights is None:
        return {name: 1 / len(names) for name in names}
    if set(weights) != set(names):
        raise CorpusError(
            f"the weights name {', '.join(sorted(weights))}; the corpus has {', '.join(names)}: "
            "give every domain a weight (0 leaves it out) and no other"
        )
    total = sum(weights.values())
    return {name: weights[name] / total for name in names}
