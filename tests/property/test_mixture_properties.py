"""What must hold for any mixture."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moefy.data.mixture import Mixture, MixtureState, WeightUpdate, permuted
from moefy.data.strategies import updated_weights


@st.composite
def weights_and_excess(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    num_domains = draw(st.integers(1, 8))
    sizes = draw(st.lists(st.floats(1e-5, 1), min_size=num_domains, max_size=num_domains))
    excess = draw(st.lists(st.floats(-20, 20), min_size=num_domains, max_size=num_domains))
    return np.array(sizes) / sum(sizes), np.array(excess)


@given(weights_and_excess())
def test_weights_stay_on_the_simplex(given: tuple[np.ndarray, np.ndarray]) -> None:
    found = updated_weights(*given)
    assert found.dtype == np.float64
    assert found.sum() == pytest.approx(1, abs=1e-12)
    assert (found >= 1e-4 / len(found)).all()


@given(weights_and_excess())
def test_a_larger_excess_grows_more(given: tuple[np.ndarray, np.ndarray]) -> None:
    weights, excess = given
    found = updated_weights(weights, excess)
    slack = 1e-4 + 1e-12  # the floor moves 1e-4 of them all
    assert found[excess.argmax()] >= weights[excess.argmax()] - slack
    assert found[excess.argmin()] <= weights[excess.argmin()] + slack
    growth = (found - 1e-4 / len(found)) / weights
    order = np.argsort(excess)
    assert (np.diff(growth[order]) >= -1e-9 * growth.max()).all()


@given(weights_and_excess(), st.floats(-20, 20))
def test_equal_excesses_change_nothing_but_the_floor(
    given: tuple[np.ndarray, np.ndarray], excess: float
) -> None:
    weights, _ = given
    expected = 0.9999 * weights + 1e-4 / len(weights)
    assert updated_weights(weights, np.full(len(weights), excess)) == pytest.approx(
        expected, abs=1e-14
    )


@given(st.integers(1, 3000), st.lists(st.integers(0, 2**63), min_size=1, max_size=3), st.data())
def test_a_permutation_is_one(length: int, key: list[int], data: st.DataObject) -> None:
    whole = permuted(np.arange(length), length, key)
    assert np.array_equal(np.sort(whole), np.arange(length))
    places = np.array(data.draw(st.lists(st.integers(0, length - 1))), dtype=np.int64)
    assert np.array_equal(permuted(places, length, key), whole[places])


mixtures = st.fixed_dictionaries(
    {
        # by domain, sequences and weight: from one sequence to more than memory could hold
        "domains": st.lists(
            st.tuples(st.sampled_from([1, 2, 5, 30, 10**12]), st.floats(0.01, 1) | st.just(0.0)),
            min_size=1,
            max_size=4,
        ).filter(lambda domains: any(weight for _, weight in domains)),
        "seed": st.integers(0, 2**70),
        "per_step": st.sampled_from([4, 8, 16]),
    }
)


def make(drawn: dict[str, Any]) -> Mixture:
    sizes = {f"domain {place}": size for place, (size, _) in enumerate(drawn["domains"])}
    parts = {f"domain {place}": weight for place, (_, weight) in enumerate(drawn["domains"])}
    weights = {name: part / sum(parts.values()) for name, part in parts.items()}
    return Mixture(sizes, weights, seed=drawn["seed"], global_batch_size=drawn["per_step"])


def change_weights(mixture: Mixture) -> list[WeightUpdate]:
    """As a trainer does; the losses are some function of the step and the domain."""
    if not mixture.update_due(3):
        return []
    losses = {name: 2 + np.sin(mixture.step + ord(name[-1])) for name in mixture.names}
    return [mixture.reweight(losses, dict.fromkeys(mixture.names, 2.0))]


@settings(max_examples=15)
@given(mixtures, st.integers(0, 20), st.booleans())
def test_a_restart_at_any_step_changes_nothing(
    drawn: dict[str, Any], stop: int, after_update: bool
) -> None:
    whole, restarted, replayed = (make(drawn) for _ in range(3))
    expected, history = [], []
    kept = json.dumps(asdict(whole.state()))
    for step in range(25):
        if step == stop and not after_update:
            kept = json.dumps(asdict(whole.state()))
        history += change_weights(whole)
        if step == stop and after_update:
            kept = json.dumps(asdict(whole.state()))
        expected.append(whole.next_batch())
    restarted.restore(MixtureState(**json.loads(kept)))
    for batch in expected[stop:]:
        change_weights(restarted)
        assert restarted.next_batch() == batch
    assert restarted.state() == whole.state()
    for update in history:  # the log alone is enough too
        while replayed.step < update.step:
            replayed.next_batch()
        replayed.set_weights(update.weights)
    while replayed.step < whole.step:
        replayed.next_batch()
    assert replayed.state() == whole.state()


@settings(max_examples=15)
@given(mixtures)
def test_an_epoch_shows_every_sequence_once(drawn: dict[str, Any]) -> None:
    mixture = make(drawn)
    seen: dict[tuple[str, int], list[int]] = {}
    for _ in range(30):
        for name, sequence_idx, epoch in mixture.next_batch():
            seen.setdefault((name, epoch), []).append(sequence_idx)
    state = mixture.state()
    for (name, epoch), found in seen.items():
        length = state.num_sequences[name]
        assert len(set(found)) == len(found)
        assert 0 <= min(found) <= max(found) < length
        assert len(found) == min(length, state.cursors[name] - epoch * length)
