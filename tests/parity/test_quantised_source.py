"""Quantised folders: what is read equals the values that were encoded, by formulas of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import logits, write_tiny_model
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import moefy
from moefy.checkpoint.reader import DenseCheckpoint
from moefy.checkpoint.source import origin, resolve
from moefy.errors import ArchitectureError, CheckpointError
from moefy.recipe import LLAMA_MOE

EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none", "experts": 8, "active": 8, "shared": 2}
GROUP = 16
NF4 = [-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0]
NF4 += [0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0]
Tensors = dict[str, torch.Tensor]
Encoder = Callable[[np.ndarray], tuple[Tensors, torch.Tensor]]


def grouped(
    weight: np.ndarray, bits: int, group: np.ndarray, *, signed: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, torch.Tensor]:
    """Return numbers, scales and zeros [rows, groups], and float64 values that they stand for."""
    groups, most = group.max() + 1, 2**bits - 1
    scale, zero = np.zeros((2, len(weight), groups))
    for each in range(groups):
        part = weight[:, group == each]
        low, high = part.min(1), part.max(1)
        scale[:, each] = np.float16((high - low) / most)
        zero[:, each] = np.clip(np.round(-low / scale[:, each]), 1, most)
    if signed:
        zero[:] = 2 ** (bits - 1)
    numbers = np.clip(np.round(weight / scale[:, group]) + zero[:, group], 0, most)
    values = (numbers - zero[:, group]) * scale[:, group]
    return numbers.astype(np.int64), scale, zero.astype(np.int64), torch.from_numpy(values)


def packed(numbers: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Pack along the last dimension, the `order`-th number in the i-th place of 32 bits."""
    per_word = 32 // bits
    order = order or tuple(range(per_word))
    padding = -numbers.shape[-1] % per_word
    words = np.pad(numbers, ((0, 0), (0, padding))).reshape(len(numbers), -1, per_word)
    found = np.zeros(words.shape[:2], np.uint32)
    for place, number in enumerate(order):
        found |= words[:, :, number].astype(np.uint32) << np.uint32(bits * place)
    return torch.from_numpy(found.view(np.int32).copy())


def gptq(bits: int, offset: int, *, shuffled: bool = False) -> Encoder:
    def encode(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
        group = np.arange(weight.shape[1]) // GROUP
        if shuffled:
            group = np.random.default_rng(0).permutation(group)
        numbers, scale, zero, values = grouped(weight, bits, group)
        tensors = {
            "qweight": packed(numbers, bits).T.contiguous(),
            "qzeros": packed((zero - offset).T, bits),
            "scales": torch.from_numpy(scale.T.copy()).half(),
            "g_idx": torch.from_numpy(group.astype(np.int32)),
        }
        return tensors, values

    return encode


def awq(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
    numbers, scale, zero, values = grouped(weight, 4, np.arange(weight.shape[1]) // GROUP)
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    tensors = {
        "qweight": packed(numbers.T, 4, order),
        "qzeros": packed(zero.T, 4, order),
        "scales": torch.from_numpy(scale.T.copy()).half(),
    }
    return tensors, values


def float8(block: tuple[int, int], name: str = "weight_scale_inv") -> Encoder:
    """Scales of blocks, which may stick out of the weight."""

    def encode(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
        rows, columns = (min(size, most) for size, most in zip(block, weight.shape, strict=True))
        padding = (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows)
        dense = torch.nn.functional.pad(torch.from_numpy(weight).float(), padding)
        blocks = dense.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
        scale = blocks.abs().amax((1, 3)) / 448
        whole = (blocks / scale[:, None, :, None]).view(dense.shape).to(torch.float8_e4m3fn)
        values = Fp8Dequantize(None)._dequantize_one(whole, scale, torch.float32)
        numbers, values = (each[: len(weight), : weight.shape[1]] for each in (whole, values))
        tensors = {"weight": numbers.contiguous(), name: scale, "input_scale": torch.ones(1)}
        return tensors, values.double()

    return encode


def packed_ints(bits: int, *, signed: bool) -> Encoder:
    def encode(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
        group = np.arange(weight.shape[1]) // GROUP
        numbers, scale, zero, values = grouped(weight, bits, group, signed=signed)
        tensors = {
            "weight_packed": packed(numbers, bits),
            "weight_scale": torch.from_numpy(scale).half(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not signed:
            tensors["weight_zero_point"] = packed(zero.T, bits).T.contiguous()
        return tensors, values

    return encode


def int8(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
    scale = torch.from_numpy(np.abs(weight).max(1, keepdims=True) / 127).bfloat16()
    numbers = (torch.from_numpy(weight) / scale.double()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": numbers, "weight_scale": scale}, numbers.double() * scale.double()


def mxfp4(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
    rows, columns = weight.shape
    codes = np.random.default_rng(0).integers(0, 256, (1, rows, columns // 32, 16), np.uint8)
    scales = np.random.default_rng(1).integers(120, 124, (1, rows, columns // 32), np.uint8)
    blocks, exponents = torch.from_numpy(codes), torch.from_numpy(scales)
    values = convert_moe_packed_tensors(blocks, exponents, dtype=torch.float32)[0].T
    return {"weight_blocks": blocks[0], "weight_scales": exponents[0]}, values.double()


def mxfp4_packed(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
    tensors, values = mxfp4(weight)
    return {
        "weight_packed": tensors["weight_blocks"].flatten(1),
        "weight_scale": tensors["weight_scales"],
    }, values


def bnb8(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
    most = torch.from_numpy(np.abs(weight).max(1)).float()
    numbers = (torch.from_numpy(weight) * 127 / most.double()[:, None]).round().to(torch.int8)
    tensors = {"weight": numbers, "SCB": most, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, numbers.double() * most.double()[:, None] / 127


def bnb4(*, nested: bool) -> Encoder:
    def encode(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
        blocks = weight.reshape(-1, 64)
        most = np.abs(blocks).max(1)
        state: dict[str, Any] = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16"}
        state["shape"] = list(weight.shape)
        tensors: Tensors = {"weight.quant_map": torch.tensor(NF4)}
        if nested:
            book = np.linspace(-1, 1, 256)
            state |= {"nested_blocksize": 4, "nested_offset": float(np.float32(most.mean()))}
            rest = np.pad(most - state["nested_offset"], (0, -len(most) % 4)).reshape(-1, 4)
            scales = np.float32(np.abs(rest).max(1))
            codes = np.abs(rest[..., None] / scales[:, None, None] - book).argmin(-1)
            most = (book[codes] * scales[:, None]).reshape(-1)[: len(most)] + state["nested_offset"]
            tensors["weight.absmax"] = torch.from_numpy(
                codes.reshape(-1)[: len(most)].astype(np.uint8)
            )
            tensors["weight.nested_absmax"] = torch.from_numpy(scales)
            tensors["weight.nested_quant_map"] = torch.from_numpy(book).float()
        else:
            most = np.float32(most)
            tensors["weight.absmax"] = torch.from_numpy(most)
        codes = np.abs(blocks[..., None] / most[:, None, None] - np.array(NF4)).argmin(-1)
        values = np.array(NF4, np.float32).astype(float)[codes] * most[:, None]
        codes = codes.reshape(-1, 2).astype(np.uint8)
        tensors["weight"] = torch.from_numpy(codes[:, :1] << 4 | codes[:, 1:])
        text = json.dumps(state).encode()
        tensors["weight.quant_state.bitsandbytes__nf4"] = torch.tensor([*text], dtype=torch.uint8)
        return tensors, torch.from_numpy(values).view(*weight.shape)

    return encode


FORMS: dict[str, tuple[dict[str, Any], Encoder]] = {
    "gptq": ({"quant_method": "gptq", "bits": 4}, gptq(4, 1)),
    "gptq, order of activations": ({"quant_method": "gptq", "bits": 4}, gptq(4, 1, shuffled=True)),
    "gptq, 8 bits": ({"quant_method": "gptq", "bits": 8}, gptq(8, 1)),
    "gptq, 2 bits": ({"quant_method": "gptq", "bits": 2}, gptq(2, 1)),
    "gptq, second version": (
        {"quant_method": "gptq", "bits": 4, "checkpoint_format": "gptq_v2"},
        gptq(4, 0),
    ),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}, awq),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [20, 24]}, float8((20, 24))),
    "fp8, one scale": ({"quant_method": "fp8"}, float8((999, 999))),
    "fp8, by row": ({"quant_method": "fbgemm_fp8"}, float8((1, 999), "weight_scale")),
    "compressed int4": ({"quant_method": "compressed-tensors"}, packed_ints(4, signed=True)),
    "compressed int4, zeros": (
        {"quant_method": "compressed-tensors"},
        packed_ints(4, signed=False),
    ),
    "compressed int8, packed": (
        {"quant_method": "compressed-tensors"},
        packed_ints(8, signed=True),
    ),
    "compressed int8": ({"quant_method": "compressed-tensors"}, int8),
    "compressed float8": (
        {"quant_method": "compressed-tensors"},
        float8((1, 999), "weight_scale"),
    ),
    "compressed mxfp4": ({"quant_method": "compressed-tensors"}, mxfp4_packed),
    "mxfp4": ({"quant_method": "mxfp4"}, mxfp4),
    "bitsandbytes, 8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb8),
    "bitsandbytes, 4 bits": ({"quant_method": "bitsandbytes"}, bnb4(nested=False)),
    "bitsandbytes, nested": ({"quant_method": "bitsandbytes"}, bnb4(nested=True)),
}


def quantise(folder: Path, form: str, dtype: str = "float32") -> Tensors:
    """Encode a folder's matrices in the layers; return the values by name, float64."""
    settings, encode = FORMS[form]
    tensors, values = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj.weight" in name]:
        parts, values[name] = encode(tensors.pop(name).double().numpy())
        tensors |= {name.removesuffix("weight") + part: each for part, each in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    changed = {"quantization_config": settings, "dtype": dtype}
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return values


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFY_CACHE", str(tmp_path / "cache"))


def tiny(folder: Path) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 2}
    return write_tiny_model(folder, "llama", attention_bias=True, **sizes)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_values_that_it_stands_for(tmp_path: Path, form: str) -> None:
    dense = tiny(tmp_path / "dense")
    values = quantise(dense, form)
    said: list[str] = []
    found = DenseCheckpoint(resolve(dense, report=lambda progress: said.append(progress.stage)))
    for name, expected in values.items():
        assert expected.std() > 0.001
        torch.testing.assert_close(found[name].double(), expected, rtol=1e-6, atol=1e-9)
    assert set(said) == {f"dequantise ({FORMS[form][0]['quant_method']}) dense"}
    rounded = tiny(tmp_path / "rounded")
    values = quantise(rounded, form, dtype="bfloat16")
    found = DenseCheckpoint(resolve(rounded))
    name = "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(found[name], values[name].float().bfloat16())


def test_a_changed_tokenizer_is_not_taken_from_the_cache(tmp_path: Path) -> None:
    dense = tiny(tmp_path / "dense")
    quantise(dense, "gptq")
    (dense / "README.md").write_text("---\nlicense: mit\n---\n")
    assert moefy.inspect(dense)  # which reads config.json alone
    first = resolve(dense)
    assert resolve(dense) == first
    assert origin(dense, first) == {"base_model": "dense", "license": "mit"}
    (dense / "chat_template.jinja").write_text("{{ messages }}")
    assert (resolve(dense) / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize("form", ["gptq, order of activations", "bitsandbytes, nested"])
def test_a_split_has_the_logits_of_the_dequantised_model(tmp_path: Path, form: str) -> None:
    dense, quantised = tiny(tmp_path / "dense"), tiny(tmp_path / "quantised")
    values = quantise(quantised, form)
    plain = load_file(dense / "model.safetensors")
    plain |= {name: value.float() for name, value in values.items()}
    save_file(plain, dense / "model.safetensors", metadata={"format": "pt"})
    moefy.convert(quantised, tmp_path / "moe", **EXACT)
    expected, found = logits(dense), logits(tmp_path / "moe")
    assert expected.std() > 0.01
    assert (expected - found).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("form", "settings", "kind", "message"),
    [
        ("gptq", {"quant_method": "hqq"}, ArchitectureError, r"quantised \(hqq\); moefy dequan"),
        ("gptq", {"quant_method": "gptq", "bits": 3}, ArchitectureError, "bits = 3; allowed are"),
        ("awq", {"quant_method": "awq", "version": "gemv"}, ArchitectureError, "version = 'gemv'"),
        (
            "compressed int4",
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"a": 1}}},
            ArchitectureError,
            "a transform_config",
        ),
        ("fp8", {"quant_method": "gptq"}, CheckpointError, "does not explain weight, stored as"),
        ("gptq", ["gptq"], ArchitectureError, r"is quantised \(None\)"),
        ("gptq", {"quant_method": ["gptq"]}, ArchitectureError, "moefy dequantises awq, bits"),
    ],
)
def test_what_is_not_read_is_refused(
    tmp_path: Path, form: str, settings: Any, kind: type[Exception], message: str
) -> None:
    dense = tiny(tmp_path / "dense")
    quantise(dense, form)
    file = dense / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    with pytest.raises(kind, match=message):
        moefy.convert(dense, tmp_path / "moe", **EXACT)
    assert not (tmp_path / "moe").exists()


def test_plain_weights_under_the_name_of_a_method(tmp_path: Path) -> None:
    dense = tiny(tmp_path / "dense")
    file = dense / "config.json"
    settings = {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(CheckpointError, match=r"quantised \(gptq\) by its config.json, but none"):
        moefy.convert(dense, tmp_path / "moe", **EXACT)
