"""The sampler: which samples come, in which order, under which weights."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from moefy.data.mixture import Mixture, permuted
from moefy.errors import CorpusError, TrainingError


def mixture(
    num_sequences: dict[str, int], weights: dict[str, float], seed: int = 0, per_step: int = 8
) -> Mixture:
    return Mixture(num_sequences, weights, seed=seed, global_batch_size=per_step)


def draw(found: Mixture, num_steps: int) -> None:
    for _ in range(num_steps):
        found.next_batch()


FIRST_THOUSAND = """
import hashlib
from moefy.data.mixture import Mixture
sizes = {"a": 10, "book": 10**12, "wiki": 77}
found = Mixture(sizes, {"a": 0.2, "book": 0.5, "wiki": 0.3}, seed=7, global_batch_size=50)
samples = [found.next_batch() for _ in range(20)]
print(hashlib.sha256(repr(samples).encode()).hexdigest()[:16], end="")
"""


def test_the_order_is_the_same_in_every_process_and_version() -> None:
    """A run that was begun with another version of moefy or numpy must go on in its own order."""
    for hash_seed in ("1", "2"):
        found = subprocess.run(
            [sys.executable, "-c", FIRST_THOUSAND],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        )
        assert found.stdout == "29fa7719d070b561"


def test_the_order_depends_on_the_seed_alone() -> None:
    sizes, weights = {"a": 1000, "b": 1000}, {"a": 0.5, "b": 0.5}
    one, two = (mixture(sizes, weights, seed=seed, per_step=100) for seed in (1, 2))
    assert one.next_batch() != two.next_batch()
    # the same samples, however they are cut into steps
    small = mixture(sizes, weights, seed=1, per_step=20)
    one = mixture(sizes, weights, seed=1, per_step=100)
    batches = [small.next_batch() for _ in range(5)]
    assert one.next_batch() == sum(batches, ())


def test_another_domain_leaves_a_domains_order_alone() -> None:
    alone = mixture({"wiki": 50}, {"wiki": 1.0}, per_step=150).next_batch()
    both = mixture({"book": 9, "wiki": 50}, {"book": 0.5, "wiki": 0.5}, per_step=400)
    assert [s for s in both.next_batch() if s.domain == "wiki"][:150] == list(alone)


def test_frequencies_follow_weights_that_change_in_flight() -> None:
    sizes, weights = (
        {"a": 100, "b": 7, "c": 10**9, "d": 0},
        {"a": 0.6, "b": 0.1, "c": 0.3, "d": 0.0},
    )
    found = mixture(sizes, weights, per_step=1000)
    reference = {"a": 2.0, "b": 2.0, "c": 2.0}
    for losses in ({}, {"a": 1.0, "b": 4.0, "c": 2.5}, {"a": 4.0, "b": 1.0, "c": 2.0}):
        if losses:
            found.reweight(losses, reference)
        samples = [sample for _ in range(8) for sample in found.next_batch()]
        for name, weight in found.weights.items():
            count = sum(sample.domain == name for sample in samples)
            assert abs(count - 8000 * weight) <= 4 * (8000 * weight * (1 - weight)) ** 0.5


def test_a_domain_that_runs_out_begins_again() -> None:
    found = mixture({"few": 20, "many": 10**6}, {"few": 0.5, "many": 0.5})
    seen: dict[int, list[int]] = {}
    for _ in range(60):
        for sample in found.next_batch():
            if sample.domain == "few":
                seen.setdefault(sample.epoch, []).append(sample.sequence_idx)
        restarted = mixture({"few": 20, "many": 10**6}, {"few": 0.5, "many": 0.5})
        restarted.restore(found.state())
        found = restarted
    last = max(seen)
    assert last >= 8
    assert all(sorted(seen[epoch]) == list(range(20)) for epoch in range(last))
    assert len({tuple(seen[epoch]) for epoch in range(last)}) == last


def test_a_domain_with_weight_needs_a_sequence() -> None:
    with pytest.raises(CorpusError, match="'b' has not enough text"):
        mixture({"a": 1, "b": 0}, {"a": 0.5, "b": 0.5})
    left_out = mixture({"a": 1, "b": 0}, {"a": 1.0, "b": 0.0})
    assert {sample.domain for sample in left_out.next_batch()} == {"a"}


def test_weights_follow_losses_and_are_recorded() -> None:
    found = mixture({"a": 9, "b": 9, "c": 0}, {"a": 0.5, "b": 0.5, "c": 0.0})
    draw(found, 340)
    assert found.update_due(340)
    assert found.update_due(170)
    assert not found.update_due(300)
    losses = {"a": 2.0 + np.log(3), "b": 1.9, "c": 9.0}
    update = found.reweight(losses, {"a": 2.0, "b": 1.9, "c": 1.0})
    assert update.step == 340
    expected = {"a": 0.75 * 0.9999 + 0.5e-4, "b": 0.25 * 0.9999 + 0.5e-4, "c": 0}
    assert update.weights == found.weights == pytest.approx(expected, abs=1e-12)
    assert (update.losses, update.reference) == ({"a": losses["a"], "b": 1.9}, {"a": 2, "b": 1.9})
    again = mixture({"a": 9, "b": 9, "c": 0}, {"a": 0.5, "b": 0.5, "c": 0.0})
    assert not again.update_due(340)  # not before the first step
    again.restore(found.state())
    assert not again.update_due(340)  # nor twice at one step
    draw(found, 340)
    assert found.update_due(340)
    with pytest.raises(TrainingError, match="step 680: the held-out loss of b is not finite"):
        found.reweight({"a": 2.0, "b": np.nan}, {"a": 2.0, "b": 2.0})


def test_a_permutation_of_any_length_is_shuffled_without_being_stored() -> None:
    places = np.random.default_rng(0).integers(0, 10**15, 1000)
    found = permuted(places, 10**15, (1, 2))
    assert len(set(found.tolist())) == len(set(places.tolist()))
    assert 0 <= found.min() < found.max() < 10**15
    assert abs(np.corrcoef(places, found)[0, 1]) < 0.15
    # every order of a short list comes as often as any other
    orders = [tuple(permuted(np.arange(4), 4, (0, epoch)).tolist()) for epoch in range(2400)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24
    assert sum((count - 100) ** 2 / 100 for count in counts) < 50  # chi², 23 degrees: p = 0.001
