"""GGUF files: what is read equals the model that they were written from, the rest is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tests.conftest import write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import moefy
from moefy.checkpoint import gguf as checkpoint_gguf
from moefy.checkpoint.gguf import read_header
from moefy.errors import ArchitectureError, CheckpointError
from moefy.recipe import LLAMA_MOE

EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none", "experts": 8, "active": 8, "shared": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 128},  # transformers reads no other from GGUF
}
Change = Callable[[gguf.GGUFWriter, str], None]


def write_gguf(file: Path, family: str, change: Change = lambda *_: None) -> Path:
    """Write a tiny random model as a GGUF file and as a folder beside it; return the folder."""
    dense = write_tiny_model(file.parent / "dense", family, **SETTINGS.get(family, {}))
    model = AutoModelForCausalLM.from_pretrained(dense)
    config = model.config
    writer = gguf.GGUFWriter(file, family)
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
            writer.add_tensor(found, rows.reshape(tensor.shape).contiguous().numpy())
    change(writer, family)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFY_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_what_is_read_equals_the_model_it_came_from(tmp_path: Path, family: str) -> None:
    dense, out = write_gguf(tmp_path / "model.gguf", family), tmp_path / "moe"
    moefy.convert(tmp_path / "model.gguf", out, **EXACT)
    ids = torch.randint(0, 257, (2, 100), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected, found = (
            AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (dense, out)
        )
    assert (expected - found).abs().max() < 1e-4
    assert expected.std() > 0.01


def rope_scaling(writer: gguf.GGUFWriter, family: str) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


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
        ("llama", rope_scaling, ArchitectureError, "rotary scaling 'yarn', which transformers"),
        ("phi3", half_rotation, ArchitectureError, "rotary embedding in 4 of 8 dimensions"),
        ("qwen2", window, ArchitectureError, "a sliding window of 16 tokens"),
        ("llama", foreign_factors, ArchitectureError, "not those of a Llama 3"),
        ("qwen2", output_bias, ArchitectureError, r"holds blk.0.attn_output.bias, which no rule"),
        ("llama", many_layers, CheckpointError, "says 1073741824 layers and holds fewer"),
        ("qwen3", wide, CheckpointError, r"ffn_\w+.weight has shape .* the header says"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_transformers_would_leave_out_is_refused(
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
