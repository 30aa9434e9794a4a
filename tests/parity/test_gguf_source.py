"""GGUF files: what is read equals the model that they were written from, the rest is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.conftest import logits, write_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.integrations.gguf import dequant as gguf_dequant
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

import moefy
from moefy.checkpoint import gguf as checkpoint_gguf
from moefy.checkpoint.gguf import open_gguf, read_header
from moefy.errors import ArchitectureError, CheckpointError
from moefy.recipe import LLAMA_MOE

EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none", "experts": 8, "active": 8, "shared": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 64},  # of which transformers reads 128 alone
}
Change = Callable[[gguf.GGUFWriter, str], None]


def write_gguf(
    file: Path,
    family: str,
    change: Change = lambda *_: None,
    part_tensors: int = 0,
    kind: gguf.GGMLQuantizationType | None = None,
    **settings: Any,
) -> Path:
    """Write a tiny random model as a GGUF file and as a folder beside it; return the folder.

    Matrices of a `kind` are random blocks, of which the folder knows nothing.
    """
    settings = SETTINGS.get(family, {}) | settings
    dense = write_tiny_model(file.parent / "dense", family, **settings)
    model = AutoModelForCausalLM.from_pretrained(dense)
    config = model.config
    writer = gguf.GGUFWriter(file, family, split_max_tensors=part_tensors)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    ids = range(config.vocab_size)
    tokens = AutoTokenizer.from_pretrained(dense).convert_ids_to_tokens(ids)
    tokens[1] = "ab"  # transformers wants a merge
    writer.add_tokenizer_model("llama" if family == "phi3" else "gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.NORMAL for _ in ids])
    writer.add_token_scores([0.0 for _ in ids])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(config.vocab_size - 1)
    writer.add_pad_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        found = names.get_name(name, (".weight", ".bias"))
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            rows = tensor
            if family == "llama" and (
                "q_proj" in name or "k_proj" in name
            ):  # ggml's order of pairs
                rows = tensor.view(-1, 2, head_dim // 2, tensor.shape[1]).transpose(1, 2)
            if kind and tensor.ndim == 2:
                blocks = random_blocks(tuple(tensor.shape), kind)
                writer.add_tensor(found, blocks, raw_dtype=kind)
            else:
                writer.add_tensor(found, rows.reshape(tensor.shape).contiguous().numpy())
    change(writer, family)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


def random_blocks(shape: tuple[int, ...], kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Return a matrix whose float16 scales are finite, every other bit random."""
    size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (*shape, block_bytes), np.uint8)
    blocks = blocks[:, : shape[1] // size].copy()
    scales = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
    for place in scales.get(kind.name, (0, 2) if kind.name in ("Q4_1", "Q5_1") else (0,)):
        blocks[..., place + 1] = blocks[..., place + 1] % 8 + 0x20
    return blocks.reshape(shape[0], -1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFY_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_what_is_read_equals_the_model_it_came_from(tmp_path: Path, family: str) -> None:
    assert_exact(tmp_path, write_gguf(tmp_path / "model.gguf", family))


LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "original_max_position_embeddings": 64}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("family", "rope"),
    [
        ("llama", LLAMA3 | {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}),
        ("llama", LLAMA3 | {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 9.0}),
        ("llama", {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}),
        ("qwen3", YARN | {"factor": 4.0}),
        ("qwen2", YARN | {"factor": 16.0, "beta_fast": 16.0, "beta_slow": 2.0}),
    ],
    ids=lambda value: value if isinstance(value, str) else value["rope_type"],
)
def test_rotary_scalings_are_read(tmp_path: Path, family: str, rope: dict[str, Any]) -> None:
    def scale(writer: gguf.GGUFWriter, _: str) -> None:
        if rope["rope_type"] == "llama3":
            inverse = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")[0]
            plain = 500.0 ** (-torch.arange(0, 64, 2) / 64)
            writer.add_tensor("rope_freqs.weight", (plain / inverse).numpy())
            return
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            if "beta_fast" in rope:
                writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
                writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])

    heads = {"hidden_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    settings = {**heads, "rope_parameters": rope, "max_position_embeddings": 512}
    config = AutoConfig.for_model(family, **settings)
    assert_exact(tmp_path, write_gguf(tmp_path / "model.gguf", family, scale, **settings))


def test_a_file_in_parts_is_read_whole(tmp_path: Path) -> None:
    dense = write_gguf(tmp_path / "model.gguf", "llama", part_tensors=9)
    for number in (1, 3):  # whichever of them is named
        shutil.rmtree(tmp_path / "moe", ignore_errors=True)
        assert_exact(tmp_path, dense, f"model-0000{number}-of-00003.gguf")
    first, second = (tmp_path / f"model-0000{n}-of-00003.gguf" for n in (1, 2))
    second.write_bytes(second.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"00002-of-00003.gguf is no readable GGUF"):
        open_gguf(first)
    shutil.copyfile(first, second)
    with pytest.raises(CheckpointError, match="it says part 0 of 3, counted from 0"):
        open_gguf(first)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"is one of 3 parts, and model-00002-of-0"):
        moefy.convert(first, tmp_path / "other", **EXACT)


@pytest.mark.parametrize(
    "kind",
    ["Q4_0", "Q4_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"],
)
def test_every_common_quantisation_is_what_transformers_makes_of_it(
    tmp_path: Path, kind: str
) -> None:
    """transformers has functions of its own for the blocks, in PyTorch."""
    quantised = gguf.GGMLQuantizationType[kind]
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    write_gguf(tmp_path / "model.gguf", "qwen2", kind=quantised, **sizes)
    model = open_gguf(tmp_path / "model.gguf")
    for name, stored in model.tensors.items():
        found = model.read(name)
        if found.ndim == 1:
            continue
        expected = gguf_dequant.dequantize(torch.from_numpy(stored.data.copy()), int(quantised))
        assert found.std() > 0
        torch.testing.assert_close(found, expected.view(found.shape), rtol=1e-6, atol=0)


def assert_exact(tmp_path: Path, dense: Path, name: str = "model.gguf") -> None:
    """Check that a conversion with all experts active gives the logits of the dense model."""
    out = tmp_path / "moe"
    moefy.convert(tmp_path / name, out, **EXACT)
    expected, found = logits(dense), logits(out)
    assert (expected - found).abs().max() < 1e-4
    assert expected.std() > 0.01


def rope_scaling(writer: gguf.GGUFWriter, family: str) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_yarn_attn_factor(1.5)


def wide_heads(writer: gguf.GGUFWriter, family: str) -> None:
    writer.kv_data[0][f"{family}.attention.key_length"].value = 16
    writer.kv_data[0][f"{family}.rope.dimension_count"].value = 16


def no_factor(writer: gguf.GGUFWriter, family: str) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_string(f"{family}.rope.scaling.factor", "x")


def half_rotation(writer: gguf.GGUFWriter, family: str) -> None:
    writer.kv_data[0][f"{family}.rope.dimension_count"].value = 4


def window(writer: gguf.GGUFWriter, family: str) -> None:
    writer.add_sliding_window(16)


def foreign_factors(writer: gguf.GGUFWriter, family: str) -> None:
    writer.add_tensor("rope_freqs.weight", np.linspace(1, 2, 4, dtype=np.float32))


def output_bias(writer: gguf.GGUFWriter, family: str) -> None:
    writer.add_tensor("blk.0.attn_output.bias", np.zeros(32, dtype=np.float32))


def many_layers(writer: gguf.GGUFWriter, family: str) -> None:
    writer.kv_data[0][f"{family}.block_count"].value = 1 << 30


def wide(writer: gguf.GGUFWriter, family: str) -> None:
    writer.kv_data[0][f"{family}.feed_forward_length"].value = 1 << 30


@pytest.mark.parametrize(
    ("family", "change", "kind", "message"),
    [
        ("llama", rope_scaling, ArchitectureError, "rotary scaling 'yarn', yarn_attn_factor"),
        ("llama", no_factor, CheckpointError, "could not convert string to float"),
        ("phi3", wide_heads, ArchitectureError, "heads of 16"),
        ("phi3", half_rotation, ArchitectureError, "rotary embedding in 4 of 8 dimensions"),
        ("qwen2", window, ArchitectureError, "a sliding window of 16 tokens"),
        ("llama", foreign_factors, ArchitectureError, "not those of a Llama 3"),
        ("qwen2", output_bias, ArchitectureError, r"holds blk.0.attn_output.bias, which no rule"),
        ("llama", many_layers, CheckpointError, "says 1073741824 layers and holds fewer"),
        ("qwen3", wide, CheckpointError, r"ffn_\w+.weight has shape .* the header says"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_would_be_left_out_is_refused(
    tmp_path: Path, family: str, change: Change, kind: type[Exception], message: str
) -> None:
    write_gguf(tmp_path / "model.gguf", family, change)
    with pytest.raises(kind, match=message):
        moefy.convert(tmp_path / "model.gguf", tmp_path / "moe", **EXACT)
    assert not (tmp_path / "moe").exists()


def test_a_damaged_count_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """gguf's own reader would count to 2^60, and makes an object for every value there is."""
    file = tmp_path / "model.gguf"
    write_gguf(file, "llama")
    assert read_header(file)[0]["tokenizer.ggml.scores"] == 257
    monkeypatch.setattr(checkpoint_gguf, "_MOST_VALUES", 100)
    with pytest.raises(CheckpointError, match="no readable GGUF file"):
        read_header(file)
    monkeypatch.undo()
    whole = bytearray(file.read_bytes())
    key = b"tokenizer.ggml.scores"
    count = whole.index(key) + len(key) + 8  # behind the types of the value and of its items
    assert int.from_bytes(whole[count : count + 8], "little") == 257
    whole[count : count + 8] = (1 << 60).to_bytes(8, "little")
    file.write_bytes(whole)
    with pytest.raises(CheckpointError, match="no readable GGUF file"):
        read_header(file)
