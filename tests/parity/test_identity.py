"""All experts active is the dense model, through a checkpoint that plain transformers loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moefy
from moefy.checkpoint.source import builtin
from moefy.construct.ffn import stream
from moefy.construct.partition.random import independent_random
from moefy.data.records import open_domains
from moefy.recipe import LLAMA_MOE
from moefy.split import Split

EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none"}

ROPE = {
    "default": {"rope_type": "default", "rope_theta": 500_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}


def logits(folder: Path, ids: torch.Tensor, **settings: Any) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder, **settings)(ids).logits


@pytest.mark.parametrize("experts", [1, 4, 8, 12])
def test_all_experts_active_equals_dense(tiny_llama: Path, tmp_path: Path, experts: int) -> None:
    out = tmp_path / "moe"
    moefy.convert(tiny_llama, out, experts=experts, active=experts, **EXACT)
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    assert (logits(tiny_llama, ids) - logits(out, ids)).abs().max() < 1e-4


@pytest.mark.parametrize("rope", ROPE)
def test_rotary_settings_survive(
    make_llama: Callable[..., Path], tmp_path: Path, rope: str
) -> None:
    dense, out = make_llama(rope_parameters=ROPE[rope]), tmp_path / "moe"
    moefy.convert(dense, out, experts=4, active=4, **EXACT)
    ids = torch.randint(0, 97, (1, 300), generator=torch.Generator().manual_seed(1))
    assert (logits(dense, ids) - logits(out, ids)).abs().max() < 1e-4


def test_smollm2_on_real_text_equals_dense(tmp_path: Path) -> None:
    dense, out = builtin(), tmp_path / "moe"
    moefy.convert(dense, out, experts=16, active=16, **EXACT)
    text = "\n\n".join(next(iter(domain.documents()))[:600] for domain in open_domains("demo"))
    ids = AutoTokenizer.from_pretrained(out)(text, return_tensors="pt")["input_ids"]
    assert ids.shape[1] > 256
    exact = {"dtype": torch.float64, "experts_implementation": "eager"}
    dense64, out64 = logits(dense, ids, dtype=torch.float64), logits(out, ids, **exact)
    assert (dense64 - out64).abs().max() < 1e-4
    dense32, out32 = logits(dense, ids), logits(out, ids)
    rounding = (dense32 - dense64).abs().max()  # 1e-4 on some machines
    assert (dense32 - out32).abs().max() < max(1e-4, 2 * rounding)


def test_chosen_experts_enter_with_the_papers_scale(tmp_path: Path, tiny_llama: Path) -> None:
    """One layer's output against the formula, in float64: E/k · Σ softmax-weight · expert."""
    out = tmp_path / "moe"
    moefy.convert(tiny_llama, out, experts=4, active=2, seed=3, **LLAMA_MOE)
    block = AutoModelForCausalLM.from_pretrained(out).double().model.layers[1].mlp
    dense = AutoModelForCausalLM.from_pretrained(tiny_llama).double().model.layers[1].mlp
    partition = torch.from_numpy(
        independent_random(48, Split(4, 2), stream(3, "partition", 1)).routed
    )
    x = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).double()
    with torch.inference_mode():
        measured = block(x[None])[0]
        hidden = dense.act_fn(dense.gate_proj(x)) * dense.up_proj(x)
        top, chosen = (x @ block.gate.weight.T).softmax(-1).topk(2)
        weights = top / top.sum(-1, keepdim=True)
        expected = torch.zeros_like(x)
        for token in range(7):
            for weight, expert in zip(weights[token], chosen[token], strict=True):
                neurons = partition[expert]
                part = hidden[token, neurons] @ dense.down_proj.weight[:, neurons].T
                expected[token] += (4 / 2) * weight * part
    assert (measured - expected).abs().max() < 1e-6  # the router's softmax is float32


def test_same_seed_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        moefy.convert(tiny_llama, tmp_path / name, experts=4, active=2, seed=seed, **LLAMA_MOE)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b != c


def test_weights_keep_their_dtype(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    dense = make_llama()
    AutoModelForCausalLM.from_pretrained(dense).bfloat16().save_pretrained(dense)
    moefy.convert(dense, tmp_path / "moe", experts=4, active=2, **LLAMA_MOE)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "moe").dtype == torch.bfloat16


def test_sharded_source_and_output(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    whole, sharded = make_llama("whole"), tmp_path / "sharded"
    AutoModelForCausalLM.from_pretrained(whole).save_pretrained(sharded, max_shard_size="20KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    moefy.convert(whole, tmp_path / "a", experts=4, active=2, **LLAMA_MOE)
    moefy.convert(sharded, tmp_path / "b", experts=4, active=2, **LLAMA_MOE)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (
        tmp_path / "b/model.safetensors"
    ).read_bytes()
