"""Tensors out of weight files equal what safetensors itself reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moefy.checkpoint.tensor_file import SafetensorsFile
from moefy.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_and_rows_are_what_safetensors_reads(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    save_file(
        {
            "matrix": torch.randn(301, 77).to(dtype),
            "vector": torch.randn(5).to(dtype),
            "scalar": torch.tensor(3.0).to(dtype),
            "none": torch.zeros(0, 7).to(dtype),
        },
        path,
    )
    file = SafetensorsFile(path)
    for name, tensor in load_file(path).items():
        assert torch.equal(file.read(name), tensor)
        if tensor.dim():
            assert torch.equal(file.read(name, slice(2, 200)), tensor[2:200])


def test_data_that_is_not_aligned(tmp_path: Path) -> None:
    header = json.dumps({"t": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    header = header.ljust(len(header) // 8 * 8 + 9)
    values = np.array([1.0, 2.0, 3.0], dtype="<f4")
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + values.tobytes())
    assert SafetensorsFile(path).read("t").tolist() == [1.0, 2.0, 3.0]


def test_what_is_read_can_be_changed_without_touching_the_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.ones(2000)}, path)
    file = SafetensorsFile(path)
    file.read("t").zero_()
    assert file.read("t").sum() == 2000


def test_a_file_cut_off_after_it_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"t": torch.ones(2000)}, path)
    file = SafetensorsFile(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="ends inside t"):
        file.read("t")
