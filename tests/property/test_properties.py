"""What must hold for any input."""

from __future__ import annotations

import json
import tempfile
from math import prod
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from tests.conftest import write_tiny_llama
from tests.parity.test_gguf_source import write_gguf

import moefy
from moefy.checkpoint.gguf import open_gguf, read_header
from moefy.checkpoint.reader import indexed_files
from moefy.checkpoint.tensor_file import open_tensors
from moefy.construct.ffn import stream
from moefy.construct.partition.balanced import balanced_assignment
from moefy.construct.partition.random import independent_random
from moefy.errors import ArchitectureError, CheckpointError, UsageError
from moefy.recipe import LLAMA_MOE
from moefy.split import Split


@given(st.integers(1, 32), st.integers(1, 32), st.integers(0, 2**32), st.integers(0, 100))
def test_a_partition_is_a_permutation_with_equal_sizes(
    num_experts: int, size: int, seed: int, layer_idx: int
) -> None:
    split = Split(num_experts, num_experts, shared=num_experts // 3)
    found = independent_random(num_experts * size, split, stream(seed, "partition", layer_idx))
    assert found.routed.shape == (split.routed, size)
    assert sorted(found.slots.tolist()) == list(range(num_experts * size))
    again = independent_random(num_experts * size, split, stream(seed, "partition", layer_idx))
    assert np.array_equal(found.slots, again.slots)


@given(st.integers(1, 200), st.integers(-3, 200), st.integers(-3, 200))
def test_a_split_is_possible_or_refused(neurons: int, experts: int, active: int) -> None:
    possible = experts >= 1 and 1 <= active <= experts and neurons % experts == 0
    if possible:
        Split(experts, active).check(neurons)
    else:
        with pytest.raises(UsageError):
            Split(experts, active).check(neurons)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 2**32))
def test_balanced_assignment_is_nearly_the_exact_optimum(
    num_clusters: int, size: int, seed: int
) -> None:
    value = np.random.default_rng(seed).random((num_clusters * size, num_clusters))
    found = balanced_assignment(value, np.full(num_clusters, size))
    assert (np.bincount(found, minlength=num_clusters) == size).all()
    repeated = np.repeat(value, size, axis=1)
    best = repeated[linear_sum_assignment(repeated, maximize=True)].sum()
    total = value[np.arange(len(value)), found].sum()
    assert best - total <= len(value) * 1e-4 + 1e-9


@settings(max_examples=40)
@given(st.data())
def test_a_checkpoint_cut_anywhere_is_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        dense = write_tiny_llama(Path(folder) / "dense", num_hidden_layers=1)
        weights = dense / "model.safetensors"
        whole = weights.read_bytes()
        weights.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
        with pytest.raises(CheckpointError):
            moefy.convert(dense, Path(folder) / "moe", experts=4, active=2, **LLAMA_MOE)
        assert {path.name for path in Path(folder).iterdir()} == {"dense"}


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def weight_file(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    dense = write_tiny_llama(folder / "dense", num_hidden_layers=1)
    file = dense / "model.safetensors"
    if request.param == "bin":
        state = load_file(file)
        file.unlink()
        file = dense / "pytorch_model.bin"
        torch.save(state, file)
    return file


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("gguf") / "model.gguf"
    write_gguf(file, "qwen2")
    return file


@settings(max_examples=300)
@given(st.data())
def test_damaged_gguf_headers_end_in_our_error(gguf_file: Path, data: st.DataObject) -> None:
    """Bytes flipped or numbers made huge: what passes is within the file, and gguf can read it."""
    damaged = bytearray(gguf_file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 24) | st.integers(0, 9000))
        if data.draw(st.booleans()):
            damaged[place] ^= data.draw(st.integers(1, 255))
        else:
            damaged[place : place + 8] = data.draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    copy = gguf_file.with_name("damaged.gguf")
    copy.write_bytes(damaged)
    try:
        open_gguf(copy)
    except (CheckpointError, ArchitectureError):
        return
    # A flipped byte may name another type of numbers, which is legal: elements are compared.
    tensors = GGUFReader(copy).tensors
    elements = sum(prod(map(int, tensor.shape)) for tensor in read_header(copy)[1].values())
    assert sum(int(tensor.n_elements) for tensor in tensors) == elements
    assert sum(int(tensor.n_bytes) for tensor in tensors) <= len(damaged)


@settings(max_examples=50)
@given(st.data())
def test_a_gguf_file_cut_anywhere_is_refused(gguf_file: Path, data: st.DataObject) -> None:
    whole = gguf_file.read_bytes()
    copy = gguf_file.with_name("cut.gguf")
    copy.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 32))])  # it ends in padding
    with pytest.raises(CheckpointError, match="no readable GGUF file"):
        open_gguf(copy)


json_values = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@settings(max_examples=100)
@given(st.binary(max_size=40) | json_values.map(lambda v: json.dumps({"weight_map": v}).encode()))
def test_damaged_indexes_end_in_our_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    index = tmp_path_factory.getbasetemp() / "pytorch_model.bin.index.json"
    index.write_bytes(content)
    try:
        names = indexed_files(index)
    except CheckpointError:
        return
    assert all(Path(name).name == name for name in names)


@settings(max_examples=150)
@given(st.data())
def test_damaged_headers_end_in_our_error_or_in_a_model(
    weight_file: Path, data: st.DataObject
) -> None:
    """Bytes of the header flipped, or the file cut: no crash, no allocation beyond the file."""
    whole = weight_file.read_bytes()
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        end = data.draw(st.booleans())  # a .bin file has its directory at the end
        place = data.draw(st.integers(0, 3000))
        damaged[-1 - place if end else place] ^= data.draw(st.integers(1, 255))
    if data.draw(st.booleans()):
        del damaged[data.draw(st.integers(0, len(whole))) :]
    copy = weight_file.with_name(f"damaged{weight_file.suffix}")
    copy.write_bytes(damaged)
    try:
        file = open_tensors(copy)
        for name in file.headers:
            assert file.read(name).nbytes <= len(whole)
    except CheckpointError:
        pass
