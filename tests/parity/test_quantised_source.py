"""Quantised folders: what is read equals the values that were encoded, by formulas of their own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tests.conftest import logits, tiny_config, write_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import moefy
from moefy.checkpoint.quantised import METHODS
from moefy.checkpoint.reader import DenseCheckpoint
from moefy.checkpoint.source import origin, resolve
from moefy.errors import ArchitectureError, CheckpointError
from moefy.recipe import LLAMA_MOE
from moefy.storage import file_sha256

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


def mxfp8(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
    tensors, _ = float8((1, 32), "weight_scale_inv")(weight)
    exponents = tensors["weight_scale_inv"].log2().ceil().add(127).to(torch.uint8)
    values = Fp8Dequantize(None)._dequantize_one(tensors["weight"], exponents, torch.float32)
    return tensors | {"weight_scale_inv": exponents}, values.double()


def nvfp4(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
    rows, columns = weight.shape
    codes = np.random.default_rng(0).integers(0, 256, (rows, columns // 2), np.uint8)
    scales = torch.rand(rows, columns // 16, generator=torch.Generator().manual_seed(0)) + 0.5
    scales, whole = scales.to(torch.float8_e4m3fn), torch.tensor([37.0])
    book = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    numbers = np.stack([codes & 15, codes >> 4], -1).reshape(rows, columns)
    values = np.where(numbers > 7, -1, 1) * book[numbers & 7]
    found = torch.from_numpy(values) * scales.double().repeat_interleave(16, 1) / 37
    parts = {"weight_packed": torch.from_numpy(codes), "weight_scale": scales}
    return parts | {"weight_global_scale": whole, "input_global_scale": whole.clone()}, found


def int4_of_2024(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
    """Zeros are stored as they are, and not packed."""
    tensors, values = packed_ints(4, signed=False)(weight)
    zero = grouped(weight, 4, np.arange(weight.shape[1]) // GROUP)[2] - 8
    return tensors | {"weight_zero_point": torch.from_numpy(zero.astype(np.int8))}, values


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
    "gptq, second version by another name": (
        {"quant_method": "gptq", "bits": 4, "format": "gptq_v2"},
        gptq(4, 0),
    ),
    "gptq, other bits than the rest": ({"quant_method": "gptq", "bits": 4}, gptq(8, 1)),
    "awq": ({"quant_method": "awq", "bits": 4, "version": "gemm", "zero_point": True}, awq),
    "fp8": ({"quant_method": "fp8", "weight_block_size": [20, 24]}, float8((20, 24))),
    "fp8, one scale": ({"quant_method": "fp8"}, float8((999, 999))),
    "fp8, by row": ({"quant_method": "fbgemm_fp8"}, float8((1, 999), "weight_scale")),
    "compressed int4": ({"quant_method": "compressed-tensors"}, packed_ints(4, signed=True)),
    "compressed int4, zeros": (
        {"quant_method": "compressed-tensors"},
        packed_ints(4, signed=False),
    ),
    "compressed int4, zeros of 2024": ({"quant_method": "compressed-tensors"}, int4_of_2024),
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
    "compressed nvfp4": ({"quant_method": "compressed-tensors"}, nvfp4),
    "compressed float8, blocks": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "attention": {"weights": {"num_bits": 8, "strategy": "channel"}},
                "mlp": {"weights": {"num_bits": 8, "block_structure": [20, 24]}},
            },
        },
        float8((20, 24), "weight_scale"),
    ),
    "mxfp8": ({"quant_method": "mxfp8"}, mxfp8),
    "mxfp4": ({"quant_method": "mxfp4"}, mxfp4),
    "bitsandbytes, 8 bits": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb8),
    "bitsandbytes, 4 bits": ({"quant_method": "bitsandbytes"}, bnb4(nested=False)),
    "bitsandbytes, nested": ({"quant_method": "bitsandbytes"}, bnb4(nested=True)),
}


def without_order(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
    tensors, values = gptq(4, 1)(weight)
    del tensors["g_idx"]
    return tensors, values


def of_turing(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
    tensors, values = bnb8(weight)
    return tensors | {"weight_format": torch.tensor(2, dtype=torch.uint8)}, values


def fake(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
    values = torch.from_numpy(weight)
    return {"weight": values.float(), "weight_scale": torch.full((len(weight), 1), 0.1)}, values


def three_bits(weight: np.ndarray) -> tuple[Tensors, torch.Tensor]:
    """Three words for 32 numbers."""
    tensors, values = gptq(4, 1)(weight)
    tensors["qzeros"] = tensors["qzeros"][:, : len(weight) * 3 // 32].contiguous()
    return tensors, values


REFUSED: dict[str, Encoder] = {
    "gptq, 3 bits": three_bits,
    "gptq, no g_idx": without_order,
    "rounded, not stored so": fake,
    "bitsandbytes, 8 bits of Turing": of_turing,
}


def quantise(folder: Path, form: str, dtype: str = "float32") -> Tensors:
    """Encode a folder's matrices in the layers; return the values by name, float64."""
    settings, encode = FORMS.get(form) or ({}, REFUSED[form])
    tensors, values = load_file(folder / "model.safetensors"), {}
    for name in [name for name in tensors if "_proj.weight" in name]:
        parts, values[name] = encode(tensors.pop(name).double().numpy())
        tensors |= {name.removesuffix("weight") + part: each for part, each in parts.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    changed = {"quantization_config": settings, "dtype": dtype}
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))
    return values


BY_LIBRARIES = Path(__file__).parent / "quantised_libraries.safetensors"
with safe_open(BY_LIBRARIES, "pt") as opened:
    SETTINGS: dict[str, dict[str, Any]] = json.loads(opened.metadata()["settings"])


@pytest.mark.parametrize("form", SETTINGS)
def test_a_weight_is_what_the_library_makes_of_it(form: str) -> None:
    """`benchmarks/quantised_libraries.py` wrote the file with the libraries themselves."""
    tensors = load_file(BY_LIBRARIES)
    parts = {k.partition("|")[2]: v for k, v in tensors.items() if k.startswith(f"{form}|")}
    expected = parts.pop("expected")
    made = METHODS[SETTINGS[form]["quant_method"]](parts, SETTINGS[form])
    assert made is not None
    assert not parts
    found = made.values(torch.float32)
    assert expected.float().std() > 0.01
    rounding = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(found, expected.float(), rtol=2 * rounding, atol=1e-7)


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
    record = json.loads((tmp_path / "moe/moefy.json").read_text())
    names = ("config.json", "model.safetensors")  # of the user's folder, not of the copy
    assert record["source"]["sha256"] == {name: file_sha256(quantised / name) for name in names}
    expected, found = logits(dense), logits(tmp_path / "moe")
    assert expected.std() > 0.01
    assert (expected - found).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("form", "settings", "kind", "message"),
    [
        ("gptq", {"quant_method": "hqq"}, ArchitectureError, r"quantised \(hqq\); moefy dequan"),
        ("gptq, 3 bits", {"quant_method": "gptq"}, ArchitectureError, "bits = 3; allowed are"),
        (
            "gptq",
            {"quant_method": "gptq", "format": "gptq_p"},
            ArchitectureError,
            "format = 'gptq_p'; allowed are",
        ),
        (
            "gptq",
            {"quant_method": "gptq", "is_marlin_format": True},
            ArchitectureError,
            "format = 'marlin'",
        ),
        (
            "gptq",
            {"quant_method": "gptq", "format": "gptq", "checkpoint_format": "gptq_v2"},
            ArchitectureError,
            "format = 'gptq and gptq_v2'",
        ),
        (
            "gptq, no g_idx",
            {"quant_method": "gptq", "desc_act": True},
            CheckpointError,
            "desc_act without g_idx",
        ),
        ("awq", {"quant_method": "awq", "format": "gemv"}, ArchitectureError, "format = 'gemv'"),
        ("awq", {"quant_method": "awq", "backend": "llm-awq"}, ArchitectureError, "'llm-awq'"),
        ("awq", {"quant_method": "awq", "zero_point": False}, ArchitectureError, "zero_point = F"),
        (
            "compressed int4",
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"num_bits": 6}}},
            },
            ArchitectureError,
            "num_bits = 6; allowed are",
        ),
        (
            "rounded, not stored so",
            {"quant_method": "compressed-tensors", "quantization_status": "frozen"},
            CheckpointError,
            "stored as torch.float32 has a scale",
        ),
        (
            "fp8",  # whose blocks stick out
            {"quant_method": "fp8"},
            CheckpointError,
            "scales of shape",
        ),
        (
            "bitsandbytes, 8 bits of Turing",
            {"quant_method": "bitsandbytes"},
            ArchitectureError,
            "weight_format = 2; allowed are",
        ),
        ("awq", {"quant_method": "awq", "version": "gemv"}, ArchitectureError, "format = 'gemv'"),
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


def test_the_text_of_a_quantised_vision_language_model(tmp_path: Path) -> None:
    """As Ministral 3 is published: FP8 with one scale, in a wrapper that stays in bfloat16."""
    folder, sizes = tmp_path / "dense", {"hidden_size": 64, "intermediate_size": 96}
    text = tiny_config("ministral3", **sizes) | {"tie_word_embeddings": False}
    vision = sizes | {"image_size": 28, "patch_size": 14, "num_hidden_layers": 1}
    config = AutoConfig.for_model(
        "mistral3",
        text_config=text,
        vision_config=vision | {"num_attention_heads": 4},
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(config)
    whole.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    values = whole.state_dict()
    for name in [name for name in tensors if "language_model.model.layers" in name]:
        if name.endswith("_proj.weight"):
            parts, value = float8((999, 999))(tensors.pop(name).double().numpy())
            parts["activation_scale"] = parts.pop("input_scale")
            tensors |= {name.removesuffix("weight") + part: each for part, each in parts.items()}
            values[name.replace("language_model.model", "model.language_model", 1)] = value.float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"}
    config_file = folder / "config.json"
    written = json.loads(config_file.read_text()) | {"quantization_config": settings}
    config_file.write_text(json.dumps(written))
    whole.load_state_dict(values)
    moefy.convert(folder, tmp_path / "moe", part="text", **EXACT)
    ids = torch.randint(0, 257, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = whole(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")(ids).logits
    assert (expected - found).abs().max() < 1e-4
