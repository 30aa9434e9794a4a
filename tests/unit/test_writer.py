"""Several shards read back as one checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moefy.checkpoint.writer import ShardWriter


def test_shards_hold_every_tensor_once(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    writer = ShardWriter(tmp_path, shard_bytes=100)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    assert not list(tmp_path.glob("*.safetensors"))
    writer.finish({"model_type": "x"})
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map.keys() == tensors.keys()
    assert len(set(weight_map.values())) == 3
    for name, file in weight_map.items():
        assert torch.equal(load_file(tmp_path / file)[name], tensors[name])


def test_a_name_is_written_once(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path)
    writer.add("t", torch.zeros(1))
    with pytest.raises(ValueError, match="twice"):
        writer.add("t", torch.zeros(1))
