"""Sources that are unusual, or not what they seem: what is read is what transformers reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import logits, write_tiny_model
from tests.fuzz.model_folders import Evil
from tests.toys import byte_tokenizer

import moefy
from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.errors import ArchitectureError, CheckpointError
from moefy.recipe import LLAMA_MOE

EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none", "experts": 8, "active": 8, "shared": 0}
Tensors = dict[str, torch.Tensor]


def change(folder: Path, edit: Callable[[Tensors], object], **settings: Any) -> None:
    """Edit a folder's tensors and the settings in its config.json."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def own_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = torch.randn_like(tensors["model.embed_tokens.weight"])


def same_head(tensors: Tensors) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def buffers(tensors: Tensors) -> None:
    """What older versions of transformers stored, in a dtype that no weight has."""
    for name in ("model", "model.layers.0.self_attn"):
        tensors[f"{name}.rotary_emb.inv_freq"] = torch.zeros(4, dtype=torch.float64)


def mixed(tensors: Tensors) -> None:
    for name in tensors:
        if "down_proj" in name or "layers.1.mlp" in name:
            tensors[name] = tensors[name].bfloat16()


@pytest.mark.parametrize("edit", [own_head, same_head, buffers, mixed])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_unusual_tensors_mean_what_transformers_reads(
    tmp_path: Path, family: str, edit: Callable[[Tensors], object]
) -> None:
    dense, out = write_tiny_model(tmp_path / "dense", family), tmp_path / "moe"
    change(dense, edit)
    moefy.convert(dense, out, **EXACT)
    assert (logits(dense) - logits(out)).abs().max() < 1e-4
    config = json.loads((out / "config.json").read_text())
    assert config["tie_word_embeddings"] is (edit is not own_head)


@pytest.mark.parametrize("rope", [None, {"type": "yarn", "factor": 4.0}])
def test_the_rotary_settings_that_transformers_reads_are_those_of_the_split(
    tmp_path: Path, rope: dict[str, Any] | None
) -> None:
    """Where `rope_scaling` stands beside `rope_parameters`, transformers takes the former."""
    dense, out = write_tiny_model(tmp_path / "dense", "llama"), tmp_path / "moe"
    change(dense, lambda _: None, rope_scaling=rope, rope_theta=500.0, max_position_embeddings=128)
    moefy.convert(dense, out, **EXACT)
    found = json.loads((out / "config.json").read_text())["rope_parameters"]
    assert found["rope_type"] == ("yarn" if rope else "default")
    assert (logits(dense) - logits(out)).abs().max() < 1e-4


def test_a_config_without_vocab_size(tmp_path: Path) -> None:
    """transformers takes LLaMA's 32,000, which these weights have not."""
    dense = write_tiny_model(tmp_path / "dense", "llama")
    config = json.loads((dense / "config.json").read_text())
    del config["vocab_size"]
    (dense / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight has shape .* says \[32000, 32"):
        moefy.convert(dense, tmp_path / "moe", **EXACT)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_weights_that_are_not_finite_are_not_converted(
    tmp_path: Path, name: str, value: float
) -> None:
    dense = write_tiny_model(tmp_path / "dense", "llama")

    def spoil(tensors: Tensors) -> None:
        tensors[name][3, 5] = value

    change(dense, spoil)
    with pytest.raises(CheckpointError, match="NaN or infinite values"):
        moefy.convert(dense, tmp_path / "moe", **EXACT)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_a_tokenizer_with_more_ids_than_the_embedding_has_rows(tmp_path: Path) -> None:
    dense = write_tiny_model(tmp_path / "dense", "llama")
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<more>"])
    tokenizer.save_pretrained(dense)
    with pytest.raises(CheckpointError, match=r"has the id 257, and its embedding 257 rows"):
        load_tokenizer(dense)
    padded = byte_tokenizer()
    padded.add_special_tokens({"pad_token": "[PAD]"})  # as many published models have it
    padded.save_pretrained(dense)
    assert load_tokenizer(dense).pad_token_id == 257


def drop(tensors: Tensors) -> None:
    del tensors["model.layers.1.mlp.up_proj.weight"]


def add(tensors: Tensors) -> None:
    tensors["model.layers.1.mlp.up_proj.bias"] = torch.zeros(48)


def drop_layer(tensors: Tensors) -> None:
    for name in [name for name in tensors if "layers.1." in name]:
        del tensors[name]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (drop, "missing keys, model.layers.1.mlp.up_proj.weight"),
        (add, "unexpected keys, model.layers.1.mlp.up_proj.bias"),
        (drop_layer, "holds 1 layers, and config.json says num_hidden_layers = 2"),
    ],
)
def test_a_model_whose_tensors_are_not_all_there_is_not_measured(
    tmp_path: Path, edit: Callable[[Tensors], object], message: str
) -> None:
    """transformers would fill what is missing with random numbers, and only warn."""
    dense = write_tiny_model(tmp_path / "dense", "llama")
    change(dense, edit)
    with pytest.raises(CheckpointError, match=message):
        load_model(dense, dtype=torch.float32)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    dense = write_tiny_model(tmp_path / "dense", "llama")
    tensors = load_file(dense / "model.safetensors")
    (dense / "model.safetensors").rename(dense / "a.safetensors")
    save_file({"model.norm.weight": 2 * tensors["model.norm.weight"]}, dense / "b.safetensors")
    weight_map = dict.fromkeys(tensors, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    index = dense / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(CheckpointError, match=r"holds model.norm.weight twice.*b.safetensors"):
        moefy.convert(dense, tmp_path / "moe", **EXACT)


def test_a_link_to_a_file_outside_is_not_copied(tmp_path: Path) -> None:
    dense, secret = write_tiny_model(tmp_path / "dense", "llama"), tmp_path / "secret"
    secret.write_text("a key")
    (dense / "LICENSE").symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"LICENSE is a link to .*secret, outside"):
        moefy.convert(dense, tmp_path / "moe", **EXACT)
    assert not (tmp_path / "moe").exists()


def test_the_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "models--a--b/snapshots/1"
    dense = write_tiny_model(folder, "llama")
    (tmp_path / "models--a--b/blobs").mkdir()
    for file in list(dense.iterdir()):
        blob = file.rename(tmp_path / "models--a--b/blobs" / file.name)
        file.symlink_to(f"../../blobs/{blob.name}")
    moefy.convert(dense, tmp_path / "moe", **EXACT)
    assert (tmp_path / "moe/tokenizer.json").read_bytes() == blob.with_name(
        "tokenizer.json"
    ).read_bytes()


def test_pickled_files_run_nothing_and_hold_plain_tensors(tmp_path: Path) -> None:
    dense = write_tiny_model(tmp_path / "dense", "llama")
    tensors: dict[str, Any] = load_file(dense / "model.safetensors")
    (dense / "model.safetensors").unlink()
    file = dense / "pytorch_model.bin"
    for name, value in {
        "a.sparse": torch.eye(3).to_sparse(),
        "b.code": Evil(),
        "c.number": 3,
    }.items():
        torch.save(tensors | {name: value}, file)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
            moefy.convert(dense, tmp_path / "moe", **EXACT)
        with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read"):
            load_model(dense, dtype=torch.float32)
    assert not (Path.cwd() / "PWNED").exists()


def test_gguf_is_written_of_the_architecture_that_the_model_type_names(tmp_path: Path) -> None:
    """llama.cpp's converter goes by `architectures` alone."""
    dense = write_tiny_model(tmp_path / "dense", "llama")
    change(dense, lambda _: None, architectures=["InternS1ForConditionalGeneration"])
    with pytest.raises(ArchitectureError, match=r"InternS1.*a llama model has .'LlamaForCausalLM'"):
        moefy.export_gguf(dense, tmp_path / "out.gguf")
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}
