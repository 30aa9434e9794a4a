"""Adapters, Mistral's own layout and damaged `.bin` files: what is read is what others read."""

from __future__ import annotations

import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tests.conftest import logits, write_tiny_model
from transformers import AutoModelForCausalLM

import moefy
from moefy.checkpoint.reader import DenseCheckpoint
from moefy.checkpoint.source import origin, resolve
from moefy.checkpoint.tensor_file import open_tensors
from moefy.errors import ArchitectureError, CheckpointError
from moefy.recipe import LLAMA_MOE

EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none", "experts": 8, "active": 8, "shared": 2}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFY_CACHE", str(tmp_path / "cache"))


def write_adapter(folder: Path, base: Path, **settings: Any) -> dict[str, torch.Tensor]:
    """Write an adapter whose halves are both random; return the merged model's tensors."""
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(target_modules=["q_proj", "down_proj", "embed_tokens"], **settings),
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(folder, save_embedding_layers=False)
    return dict(model.merge_and_unload().state_dict())


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 12},
        {"r": 4, "use_rslora": True},
        {"r": 4, "rank_pattern": {"down_proj": 2}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_an_adapter_is_merged_as_peft_merges_it(tmp_path: Path, settings: dict[str, Any]) -> None:
    base = write_tiny_model(tmp_path / "base", "llama", tie_word_embeddings=False)
    expected = write_adapter(tmp_path / "adapter", base, **settings)
    said: list[str] = []
    found = DenseCheckpoint(resolve(tmp_path / "adapter", report=lambda p: said.append(p.stage)))
    plain = load_file(base / "model.safetensors")
    changed = [name for name in plain if not torch.equal(plain[name], expected[name])]
    assert len(changed) == 5
    for name in plain:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-6)
    assert set(said) == {f"merge {base} with adapter"}
    assert origin(tmp_path / "adapter", found.folder) == {"base_model": "adapter"}
    assert (found.folder / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("key", "value", "kind", "message"),
    [
        ("use_dora", True, ArchitectureError, "has use_dora = True; moefy merges plain LoRA"),
        ("modules_to_save", ["lm_head"], ArchitectureError, "modules_to_save = "),
        ("bias", "all", ArchitectureError, "bias = 'all'"),
        ("peft_type", "IA3", ArchitectureError, "peft_type = 'IA3'"),
        ("alpha_pattern", {"(a+)+": 1}, ArchitectureError, "reads names of modules"),
        ("alpha_pattern", [1], ArchitectureError, "reads names of modules|no number"),
        ("lora_alpha", "x", CheckpointError, "lora_alpha = 'x', no number"),
        ("base_model_name_or_path", None, CheckpointError, "names no base model"),
        ("base_model_name_or_path", "./none", CheckpointError, "does not exist; a source is"),
        ("base_model_name_or_path", "adapter", ArchitectureError, "an adapter itself"),
    ],
)
def test_an_adapter_that_is_more_is_refused(
    tmp_path: Path, key: str, value: Any, kind: type[Exception], message: str
) -> None:
    base = write_tiny_model(tmp_path / "base", "llama", tie_word_embeddings=False)
    write_adapter(tmp_path / "adapter", base, r=2)
    file = tmp_path / "adapter/adapter_config.json"
    if value == "adapter":
        value = str(tmp_path / "adapter")
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(kind, match=message):
        moefy.convert(tmp_path / "adapter", tmp_path / "moe", **EXACT)
    assert not (tmp_path / "moe").exists()


def test_an_adapter_of_another_base_or_with_other_tensors(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    write_tiny_model(base, "llama", tie_word_embeddings=False)
    write_adapter(adapter, base, r=2)
    write_tiny_model(base, "llama", intermediate_size=64, tie_word_embeddings=False)
    with pytest.raises(CheckpointError, match=r"is for a weight of shape \[32, 48\], model.layers"):
        resolve(adapter)
    weights = adapter / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, first.replace("lora_A", "magnitude"): torch.ones(2)}, weights)
    with pytest.raises(ArchitectureError, match="no half of a LoRA product"):
        resolve(adapter)
    save_file({name.replace("layers.1", "layers.7"): t for name, t in tensors.items()}, weights)
    with pytest.raises(CheckpointError, match=r"is for model.layers.7.*which the base"):
        resolve(adapter)
    shutil.copyfile(base / "model.safetensors", adapter / "model.safetensors")
    with pytest.raises(ArchitectureError, match=r"holds an adapter and model.safetensors"):
        resolve(adapter)


def write_consolidated(folder: Path, dense: Path, **params: Any) -> None:
    """Write a Mistral's folder in the layout in which Mistral publishes it."""
    config = AutoModelForCausalLM.from_pretrained(dense).config
    renamed = {
        **{"embed_tokens": "tok_embeddings", "lm_head": "output", "self_attn": "attention"},
        **{f"{letter}_proj": f"w{letter}" for letter in "qkvo"},
        **{"input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm"},
        **{"mlp": "feed_forward", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"},
    }
    tensors = {}
    for name, tensor in load_file(dense / "model.safetensors").items():
        new = ".".join(renamed.get(part, part) for part in name.removeprefix("model.").split("."))
        if "q_proj" in name or "k_proj" in name:
            halves = tensor.view(-1, 2, config.head_dim // 2, tensor.shape[1])
            tensor = halves.transpose(1, 2).reshape(tensor.shape).contiguous()
        tensors[new] = tensor
    folder.mkdir()
    save_file(tensors, folder / "consolidated.safetensors")
    found = {
        "dim": config.hidden_size,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "n_layers": config.num_hidden_layers,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_parameters["rope_theta"],
        "vocab_size": config.vocab_size,
    }
    (folder / "params.json").write_text(json.dumps(found | params))


def test_mistrals_own_layout(tmp_path: Path) -> None:
    settings = {"tie_word_embeddings": False, "sliding_window": None, "head_dim": 16}
    dense = write_tiny_model(tmp_path / "dense", "mistral", **settings)
    write_consolidated(tmp_path / "own", dense, max_seq_len=512)
    moefy.convert(tmp_path / "own", tmp_path / "moe", **EXACT)
    expected, found = logits(dense), logits(tmp_path / "moe")
    assert expected.std() > 0.01
    assert (expected - found).abs().max() < 1e-5
    write_consolidated(tmp_path / "experts", dense, moe={"num_experts": 8})
    with pytest.raises(ArchitectureError, match=r"params.json has moe = .*no rule maps"):
        resolve(tmp_path / "experts")
    write_consolidated(tmp_path / "short", dense, dim=None)
    with pytest.raises(CheckpointError, match=r"params.json lacks dim"):
        resolve(tmp_path / "short")


class _Large:
    """Unpickling it takes as much memory as the number says; torch's unpickler allows that."""

    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (1 << 40,)


def test_a_bin_file_of_more_than_tensors(tmp_path: Path) -> None:
    file, tensors = (
        tmp_path / "pytorch_model.bin",
        {"a": torch.ones(3), "b": torch.ones(2, 2).half()},
    )
    torch.save({**tensors, "c": torch.nn.Parameter(torch.ones(2))}, file)
    assert open_tensors(file).headers["b"] == ("float16", (2, 2))
    torch.save({"a": _Large()}, file)
    with pytest.raises(CheckpointError, match=r"names \w+ bytearray, which is no part of a"):
        open_tensors(file)
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    with pytest.raises(CheckpointError, match="not a zip file"):
        open_tensors(file)
    torch.save(tensors, file)
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match="its entries are compressed"):
        open_tensors(file)
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            more = pickle.dumps("x" * (33 << 20)) if name.endswith("data.pkl") else content
            archive.writestr(name, more)
    with pytest.raises(CheckpointError, match="its list of tensors has"):
        open_tensors(file)
