"""Several shards read back as one checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moefy.checkpoint import writer as writing
from moefy.checkpoint.writer import ShardWriter


def test_shards_hold_every_tensor_once(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((10,), float(i)) for i in range(5)}
    with ShardWriter(tmp_path, shard_bytes=100) as writer:
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
    with ShardWriter(tmp_path) as writer:
        writer.add("t", torch.zeros(1))
        with pytest.raises(ValueError, match="twice"):
            writer.add("t", torch.zeros(1))


def test_more_tensors_than_the_header_has_room_for_begin_a_new_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, max_tensors=1) as writer:
        for i in range(120):
            writer.add(f"a.rather.long.name.{i}", torch.full((2, 3), float(i)).bfloat16())
        writer.add("empty", torch.zeros(0, 4))
        writer.finish({"model_type": "x"})
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert len(found) == 121
    assert found["empty"].shape == (0, 4)
    for i in range(120):
        assert torch.equal(
            found[f"a.rather.long.name.{i}"], torch.full((2, 3), float(i)).bfloat16()
        )


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("size", [1, 4095, 4096, 8191, 8192, 8193, 3 * 8192, 100_001])
def test_a_stream_holds_its_head_and_every_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, direct: bool
) -> None:
    monkeypatch.setattr(writing, "_BUFFER_BYTES", 8192)
    if not direct:
        monkeypatch.setattr(writing, "_DIRECT", 0)
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    file = writing.FileStream(tmp_path / "file", 4096)
    file.write(data[: size // 3])
    file.write(data[size // 3 :])
    file.close(b"h" * 4096)
    assert (tmp_path / "file").read_bytes() == b"h" * 4096 + data.numpy().tobytes()
