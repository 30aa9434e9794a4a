"""A split that is undone gives the source's weights back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.conftest import write_tiny_model
from tests.parity.test_construct import TOKENS
from transformers import AutoModelForCausalLM

import moefy
from moefy.errors import ArchitectureError, CheckpointError, OutputError, UsageError
from moefy.recipe import LLAMA_MOE

EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none"}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0] * 4,
    "long_factor": [2.0] * 4,
    "factor": 4.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ROUTERS = ("mlp.gate.weight", "router.layer.weight", "router.weight")
MODELS: dict[str, dict[str, Any]] = {
    "phi3-partial": {"partial_rotary_factor": 0.5},  # glm4_moe
    "mistral": {"sliding_window": 16},  # granitemoe_swa
}


@pytest.mark.parametrize(
    ("family", "choices"),
    [
        ("llama", {"shared": 0}),
        ("llama", {"shared": 0, "repair": "paper"}),
        ("llama", {"shared": 0, "repair": "unscaled"}),
        ("llama", {"shared": 2, "partition": "clustering-up"}),
        ("qwen2", {"shared": 2}),
        ("qwen3", {"shared": 0}),
        ("qwen3", {"shared": 2}),
        ("granite", {"shared": 0, "active": 4}),
        ("phi3", {"shared": 0}),
        ("phi3-partial", {"shared": 2}),
        ("mistral", {"shared": 2}),
        ("smollm3", {"shared": 0}),
        ("hunyuan_v1_dense", {"shared": 1}),
        ("ernie4_5", {"shared": 2}),
        ("lfm2", {"shared": 0, "active": 4}),
        ("cohere2", {"shared": 2}),
        ("qwen3_5_text", {"shared": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_merged_experts_are_the_dense_weights(
    tmp_path: Path, family: str, choices: dict[str, Any], dtype: torch.dtype
) -> None:
    dense, moe, back = (tmp_path / name for name in ("dense", "moe", "back"))
    write_tiny_model(dense, family.partition("-")[0], **MODELS.get(family, {}))
    AutoModelForCausalLM.from_pretrained(dense).to(dtype).save_pretrained(dense)
    settings = EXACT | {"experts": 8, "active": 2 + choices["shared"]} | choices
    moefy.convert(dense, moe, **settings)
    moefy.export_dense(moe, back)
    found, source = (AutoModelForCausalLM.from_pretrained(f).state_dict() for f in (back, dense))
    assert found.keys() == source.keys()
    for name, tensor in source.items():
        assert tensor.dtype == found[name].dtype
        assert torch.equal(tensor, found[name]), name
    ids = torch.arange(50)[None]
    with torch.inference_mode():
        found, source = (AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (back, dense))
    assert torch.equal(found, source)


def test_factors_that_are_no_powers_of_two_cost_one_rounding(tmp_path: Path) -> None:
    dense, moe, back = (tmp_path / name for name in ("dense", "moe", "back"))
    write_tiny_model(dense, "llama")
    moefy.convert(dense, moe, experts=8, active=3, **EXACT)
    moefy.export_dense(moe, back)
    found, source = (load_file(f / "model.safetensors") for f in (back, dense))
    for name, tensor in source.items():
        tolerance = 2e-7 if "down_proj" in name else 0
        assert torch.allclose(tensor, found[name], rtol=tolerance, atol=0), name


def test_what_does_not_add_up_is_refused(
    make_llama: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    dense, out = make_llama(), tmp_path / "back"
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "refit": ({"shared": 2}, "fitted its weights to the routing.*use the dense source"),
        "scale": (EXACT | {"repair": "scale"}, "--repair scale"),
        "overlap": (
            EXACT | {"partition": "sharing-inner", "calibration_length": 256},
            "does not hold every neuron once",
        ),
    }
    for name, (choices, message) in cases.items():
        settings = TOKENS | {"experts": 8, "active": 4} | choices
        moefy.convert(dense, tmp_path / name, data=corpus, **settings)
        with pytest.raises(ArchitectureError, match=message):
            moefy.export_dense(tmp_path / name, out)
    moefy.convert(dense, tmp_path / "plain", experts=8, active=4, **EXACT)
    moefy.train(
        tmp_path / "plain", tmp_path / "trained", data=corpus, tokens=64, sequence_length=64
    )
    with pytest.raises(ArchitectureError, match="trained after its conversion"):
        moefy.export_dense(tmp_path / "trained", out)
    with pytest.raises(ArchitectureError, match="a 'llama' model and no split one"):
        moefy.export_dense(dense, out)
    record = tmp_path / "plain" / "moefy.json"
    stored = record.read_text()
    for damage in ('"hidden_size"', '"num_attention_heads"', '"attention_bias": false'):
        changed = '"attention_bias": true' if "false" in damage else f'"x{damage[1:]}'
        assert damage in stored
        record.write_text(stored.replace(damage, changed))
        with pytest.raises(UsageError, match=r"moe|plain"):
            moefy.export_dense(tmp_path / "plain", out)
    record.write_text(stored)
    (tmp_path / "plain" / "partition.npy").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match=r"partition\.npy cannot be read"):
        moefy.export_dense(tmp_path / "plain", out)
    (tmp_path / "plain" / "moefy.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no moefy\.json"):
        moefy.export_dense(tmp_path / "plain", out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("family", "choices"),
    [
        ("llama", {"shared": 0, "target": "granitemoe"}),
        ("qwen3", {"shared": 0}),
        ("qwen3", {"shared": 2}),
        ("mistral", {"shared": 2}),
    ],
    ids=["granitemoe", "qwen3_moe", "glm4_moe", "granitemoe_swa"],
)
def test_every_target_trains(
    tmp_path: Path, corpus: Path, family: str, choices: dict[str, Any]
) -> None:
    """The routers are found, balanced and changed, and the form on disk stays."""
    dense, moe, out = (tmp_path / name for name in ("dense", "moe", "out"))
    write_tiny_model(dense, family, **MODELS.get(family, {}))
    moefy.convert(dense, moe, experts=8, active=4, **EXACT | choices)
    moefy.train(moe, out, data=corpus, tokens=256, sequence_length=64)
    last = json.loads((out / "log.jsonl").read_text().splitlines()[-1])
    assert [len(row) for row in last["expert_load"]] == [8 - choices["shared"]] * 2
    assert last["balance_loss"] > 0.9
    before, after = (load_file(f / "model.safetensors") for f in (moe, out))
    assert before.keys() == after.keys()
    router = next(name for name in before if name.endswith(ROUTERS))
    assert not torch.equal(before[router], after[router])
    with torch.inference_mode():
        AutoModelForCausalLM.from_pretrained(out)(torch.zeros(1, 4, dtype=torch.long))


def test_what_llama_cpp_computes_differently_is_no_gguf_file(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    """Both were decoded in llama.cpp, which gave another text."""
    lfm2 = write_tiny_model(tmp_path / "lfm2", "lfm2")
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "mscale": 1.0}
    scaled = make_llama(rope_parameters=yarn | {"original_max_position_embeddings": 64})
    for dense, message in ((lfm2, "is a lfm2_moe"), (scaled, "mscale = 1.0")):
        moe = tmp_path / f"{dense.name}-moe"
        moefy.convert(dense, moe, experts=8, active=4, **EXACT)
        with pytest.raises(ArchitectureError, match=message):
            moefy.export_gguf(moe, tmp_path / "moe.gguf")


def test_gguf_refusals(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    window = write_tiny_model(tmp_path / "window", "mistral", sliding_window=16)
    moefy.convert(window, tmp_path / "moe", experts=8, active=4, **EXACT)
    with pytest.raises(ArchitectureError, match="sliding window of 16 tokens"):
        moefy.export_gguf(tmp_path / "moe", tmp_path / "moe.gguf")
    with pytest.raises(ArchitectureError, match="does not apply to mistral"):
        moefy.export_gguf(window, tmp_path / "moe.gguf")
    for rope, target in ((LONGROPE, "granitemoeshared"), (LLAMA3, "glm4_moe")):
        dense, moe = make_llama(target, rope_parameters=rope), tmp_path / f"{target}-moe"
        moefy.convert(dense, moe, experts=8, active=4, **EXACT | {"shared": 2, "target": target})
        with pytest.raises(ArchitectureError, match=f"{rope['rope_type']}'.* not to {target}"):
            moefy.export_gguf(moe, tmp_path / "moe.gguf")
    dense = make_llama()
    (tmp_path / "there.gguf").write_text("mine")
    with pytest.raises(OutputError, match=r"there.gguf exists: .*--overwrite"):
        moefy.export_gguf(dense, tmp_path / "there.gguf")
    with pytest.raises(CheckpointError, match=r"converter refused .*: .*pre-tokenizer"):
        moefy.export_gguf(dense, tmp_path / "there.gguf", overwrite=True)  # bytes as tokens
    assert (tmp_path / "there.gguf").read_text() == "mine"
    assert not list(tmp_path.glob(".*partial*"))
