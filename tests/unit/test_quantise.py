"""GGUF files that llama.cpp's code quantises hold what llama.cpp's own tools would write."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFReader, GGUFWriter
from gguf.quants import dequantize, quantize

from moefy.checkpoint import quantise
from moefy.checkpoint.quantise import rewrite
from moefy.errors import UsageError
from moefy.progress import Progress

NAMES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_down_exps", "ffn_gate_inp")
LAYERS, HIDDEN = 16, 256


def write_gguf(file: Path, experts: int = 16, hidden: int = HIDDEN, layers: int = LAYERS) -> Path:
    random, writer = np.random.default_rng(0), GGUFWriter(file, "llama")
    writer.add_block_count(layers)
    writer.add_expert_count(experts)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.add_file_type(1)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    writer.add_tensor("token_embd.weight", random.standard_normal((64, hidden), np.float32))
    for layer in range(layers):
        for name in NAMES:
            shape = (2, 8, hidden) if "exps" in name else (8, hidden)
            kind = np.float32 if name == "ffn_gate_inp" else np.float16
            matrix = random.standard_normal(shape, np.float32).astype(kind)
            writer.add_tensor(f"blk.{layer}.{name}.weight", matrix)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file):
        write()
    writer.write_tensors_to_file()
    writer.close()
    return file


def types(file: Path) -> dict[str, Type]:
    return {tensor.name: tensor.tensor_type for tensor in GGUFReader(file).tensors}


@pytest.mark.parametrize("kind", ["q8_0", "q4_0"])
def test_bytes_are_those_of_ggufs_own_code(tmp_path: Path, kind: str) -> None:
    source = write_gguf(tmp_path / "source.gguf", layers=2)
    told: list[Progress] = []
    rewrite(source, tmp_path / "out.gguf", kind=kind, report=told.append)
    assert [each.done for each in told] == list(range(1, told[0].total + 1))
    read = GGUFReader(tmp_path / "out.gguf")
    assert read.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert read.fields["general.file_type"].contents() == {"q8_0": 7, "q4_0": 2}[kind]
    for before, after in zip(GGUFReader(source).tensors, read.tensors, strict=True):
        assert before.name == after.name
        if after.tensor_type == Type[kind.upper()]:
            floats = dequantize(before.data, before.tensor_type)
            np.testing.assert_array_equal(after.data, quantize(floats, after.tensor_type))
    kinds = types(tmp_path / "out.gguf")
    assert kinds["blk.1.ffn_gate_inp.weight"] == kinds["output_norm.weight"] == Type.F32
    assert kinds["blk.1.ffn_down_exps.weight"] == Type[kind.upper()]
    # tied embeddings are the output matrix too
    assert kinds["token_embd.weight"] == (Type.Q8_0 if kind == "q8_0" else Type.Q6_K)


def test_the_mixture_of_q4_k_m(tmp_path: Path) -> None:
    """llama-quantize prints these types for a Q4_K_M file of 16 layers."""
    rewrite(write_gguf(tmp_path / "source.gguf"), tmp_path / "out.gguf", kind="q4_k_m")
    found = types(tmp_path / "out.gguf")
    more = {0, 1, 4, 7, 10, 13, 14, 15}
    for layer in range(LAYERS):
        for name in ("attn_v", "ffn_down_exps"):
            expected = Type.Q6_K if layer in more else Type.Q4_K
            assert found[f"blk.{layer}.{name}.weight"] == expected, layer
        assert found[f"blk.{layer}.attn_k.weight"] == Type.Q4_K
    before, after = (GGUFReader(tmp_path / f"{name}.gguf").tensors for name in ("source", "out"))
    for one, other in zip(before, after, strict=True):
        floats, near = (dequantize(each.data, each.tensor_type) for each in (one, other))
        assert np.abs(floats - near).mean() < 0.1, one.name


def test_eight_experts_and_odd_rows(tmp_path: Path) -> None:
    rewrite(write_gguf(tmp_path / "8.gguf", experts=8), tmp_path / "out.gguf", kind="q4_k_m")
    found = types(tmp_path / "out.gguf")
    assert found["blk.2.attn_k.weight"] == found["blk.2.attn_v.weight"] == Type.Q8_0
    assert found["blk.2.attn_output.weight"] == Type.Q5_K
    rewrite(write_gguf(tmp_path / "96.gguf", hidden=96), tmp_path / "o.gguf", kind="q4_k_m")
    found = types(tmp_path / "o.gguf")
    assert found["blk.2.attn_q.weight"] == Type.Q5_0
    assert found["token_embd.weight"] == Type.Q8_0
    rewrite(write_gguf(tmp_path / "40.gguf", hidden=40), tmp_path / "p.gguf", kind="q4_0")
    assert types(tmp_path / "p.gguf")["blk.2.attn_q.weight"] == Type.F16


def test_a_layer_repeated(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "source.gguf", layers=1)
    rewrite(source, tmp_path / "out.gguf", layers=3)
    read = GGUFReader(tmp_path / "out.gguf")
    assert read.fields["llama.block_count"].contents() == 3
    tensors = {tensor.name: tensor.data for tensor in read.tensors}
    assert len(tensors) == len(read.tensors) == 2 + 3 * len(NAMES)
    for name in NAMES:
        first, *others = (tensors[f"blk.{layer}.{name}.weight"] for layer in range(3))
        assert all((first == other).all() for other in others)


def test_without_llama_cpps_code_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_gguf(tmp_path / "model.gguf", layers=1)
    monkeypatch.setattr(quantise, "find_spec", lambda _: None)
    with pytest.raises(UsageError, match=r"pip install 'moefy\[gguf\]'"):
        rewrite(file, tmp_path / "out.gguf", kind="q8_0")
    assert not (tmp_path / "out.gguf").exists()
