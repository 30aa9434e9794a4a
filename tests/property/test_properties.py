"""What must hold for any input."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.conftest import write_tiny_llama

import moefy
from moefy.construct.partition.random import independent_random
from moefy.construct.repair.rescale import down_proj_factor
from moefy.data.mixture import Mixture, normalised_weights
from moefy.errors import CheckpointError, UsageError
from moefy.recipe import check_split


@given(st.integers(1, 32), st.integers(1, 32), st.integers(0, 2**32), st.integers(0, 100))
def test_a_partition_is_a_permutation_with_equal_sizes(
    num_experts: int, size: int, seed: int, layer_idx: int
) -> None:
    found = independent_random(num_experts * size, num_experts, seed=seed, layer_idx=layer_idx)
    assert found.shape == (num_experts, size)
    assert sorted(found.ravel().tolist()) == list(range(num_experts * size))
    again = independent_random(num_experts * size, num_experts, seed=seed, layer_idx=layer_idx)
    assert np.array_equal(found, again)


@given(st.integers(1, 200), st.integers(-3, 200), st.integers(-3, 200))
def test_a_split_is_possible_or_refused(neurons: int, experts: int, active: int) -> None:
    possible = experts >= 1 and 1 <= active <= experts and neurons % experts == 0
    if possible:
        check_split(neurons, experts, active)
    else:
        with pytest.raises(UsageError):
            check_split(neurons, experts, active)


@given(st.integers(1, 64), st.integers(1, 64))
def test_rescaling_none_gives_each_expert_the_weight_one(experts: int, active: int) -> None:
    active = min(experts, active)
    none = down_proj_factor("none", num_experts=experts, num_active=active)
    paper = down_proj_factor("paper", num_experts=experts, num_active=active)
    assert none / active == 1
    assert paper * active == pytest.approx(experts)


domain_weights = st.dictionaries(
    st.text(min_size=1, max_size=5), st.floats(0, 1e6), min_size=1, max_size=6
).filter(lambda weights: sum(weights.values()) > 1e-3)


@given(domain_weights)
def test_mixture_weights_stay_on_the_simplex(weights: dict[str, float]) -> None:
    found = normalised_weights(sorted(weights), weights)
    assert sum(found.values()) == pytest.approx(1)
    assert all(value >= 0 for value in found.values())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 60), st.integers(0, 2**63 - 1))
def test_a_mixture_is_the_same_after_a_restart(num_before: int, seed: int) -> None:
    windows = {"a": np.arange(7)[:, None], "b": np.arange(3)[:, None]}
    whole, restarted = (Mixture(windows, {"a": 1.0, "b": 2.0}, seed=seed) for _ in range(2))
    for _ in range(num_before):
        whole.sample()
    restarted.skip(num_before)
    assert [whole.sample()[:2] for _ in range(20)] == [restarted.sample()[:2] for _ in range(20)]
    assert whole.epochs() == restarted.epochs()


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_checkpoint_cut_anywhere_is_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dense = write_tiny_llama(Path(folder) / "dense", num_hidden_layers=1)
        weights = dense / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(CheckpointError):
            moefy.convert(dense, Path(folder) / "moe", experts=4, active=2)
        assert {path.name for path in Path(folder).iterdir()} == {"dense"}
