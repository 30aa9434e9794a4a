"""What a pass must do, against what transformers' models do; what bounds it, by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import write_tiny_model
from tests.parity.test_families import CASES, name_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

import moefy
from moefy.checkpoint.cost import cost
from moefy.checkpoint.inspect import SHAPES
from moefy.checkpoint.reader import read_config
from moefy.evaluation.contenders import (
    contenders_of,
    dense_of_active_size,
    narrow,
    random_model,
)
from moefy.evaluation.roofline import Machine, Work, bound, work
from moefy.recipe import LLAMA_MOE

PLAIN: dict[str, Any] = LLAMA_MOE | {"repair": "none"}
HIDDEN, LAYERS, VOCAB, EXPERT_SIZE = 32, 2, 257, 12  # of the tiny model in four experts


@pytest.fixture(params=[None, 2], ids=["dense", "moe"])
def folder(request: pytest.FixtureRequest, tiny_llama: Path, tmp_path: Path) -> Path:
    if request.param is None:
        return tiny_llama
    moefy.convert(tiny_llama, tmp_path / "moe", experts=4, active=request.param, **PLAIN)
    return tmp_path / "moe"


@pytest.mark.parametrize(("batch", "new", "cached"), [(1, 1, 20), (3, 1, 20), (2, 16, 0)])
def test_bytes_and_flops(folder: Path, batch: int, new: int, cached: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="eager", attn_implementation="eager"
    )
    config = read_config(folder)
    counted = work(config, batch=batch, new_tokens=new, cached_tokens=cached, itemsize=4)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (batch, cached + new), generator=generator)
    with torch.no_grad():
        cache = model(ids[:, :cached]).past_key_values if cached else None
        with FlopCounterMode(display=False) as counter:
            out = model(ids[:, cached:], past_key_values=cache, use_cache=True, logits_to_keep=1)
    attention = 4 * LAYERS * HIDDEN * batch  # per pair of positions
    expected = counter.get_total_flops()
    if not cached:  # PyTorch counts all pairs, we count the causal half
        expected -= attention * new * (new - 1) // 2
    assert counted.flops == expected

    kept = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
    weights = sum(p.numel() for p in model.parameters())
    if not config["tie_word_embeddings"]:
        weights -= VOCAB * HIDDEN
    if folder.name == "moe":  # all but (1 - 2/4)^tokens of the experts
        unmet = 4 * (1 - 2 / 4) ** (batch * new)
        weights -= round(LAYERS * 3 * HIDDEN * EXPERT_SIZE * unmet)
    assert counted.num_bytes == 4 * (weights + sum(t.numel() for t in kept))


def test_llama_2_7b_in_bfloat16_reads_13_gigabytes_a_token() -> None:
    counted = work(SHAPES["llama-2-7b"], batch=1, new_tokens=1, cached_tokens=0, itemsize=2)
    assert f"{counted.num_bytes / 1e9:.1f}" == "13.2"
    assert f"{counted.flops / 1e9:.1f}" == "13.2"


def test_bound_by_hand() -> None:
    machine = Machine("cpu", 2, "float32", bytes_per_s=10e9, flops_per_s=100e9)
    done = Work(num_bytes=int(4e9), flops=int(10e9))  # 0.4 s of reading, 0.1 s of multiplying
    found = bound(0.5, done, machine, None)
    assert found.shares == pytest.approx({"memory": 0.8, "arithmetic": 0.2})
    assert found.by == "memory"
    found = bound(2.0, done, machine, 1.5)
    expected = {"memory": 0.2, "arithmetic": 0.05, "small operations": 0.75}
    assert found.shares == pytest.approx(expected)
    assert found.by == "small operations"
    assert bound(1.0, Work(0, int(90e9)), machine, 0.1).by == "arithmetic"


@pytest.mark.parametrize(("family", "settings", "shared", "target"), CASES, ids=name_of)
def test_stand_ins(
    tmp_path: Path, family: str, settings: dict[str, Any], shared: int, target: str
) -> None:
    """The dense stand-in has the MoE's active parameters but the router's; both run narrowed."""
    dense = write_tiny_model(tmp_path / "dense", family, **settings)
    moefy.convert(dense, tmp_path / "moe", experts=4, active=3, **PLAIN | {"shared": shared})
    config = read_config(tmp_path / "moe")
    assert config["model_type"] == target
    router = LAYERS * HIDDEN * (4 - shared)
    active = cost(config).active_params - router
    given = dense_of_active_size(config, [read_config(dense)])
    assert given["model_type"] == family
    for stand_in in (given, dense_of_active_size(config, [])):
        tied = stand_in["tie_word_embeddings"] and not config["tie_word_embeddings"]
        copied = VOCAB * HIDDEN if tied else 0  # glm4_moe has an output matrix of its own
        biases = cost(stand_in).total_params + copied - active
        assert abs(biases) <= 2 * LAYERS * HIDDEN  # o_proj has one in some families only
        made = random_model(stand_in, torch.float32)
        assert sum(p.numel() for p in made.parameters()) == cost(stand_in).total_params
    for original in (config, read_config(dense), stand_in):
        small = random_model(narrow(original), torch.float32)
        assert small.config.num_hidden_layers == LAYERS
        assert max(max(p.shape) for p in small.parameters()) <= 256
        with torch.no_grad():
            assert small(torch.arange(9)[None]).logits.shape == (1, 9, 256)


def test_a_dense_model_comes_before_each_active_size(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    dense = make_llama()
    splits = {"half": (4, 2), "also-half": (8, 4), "quarter": (4, 1)}
    for name, (experts, active) in splits.items():
        moefy.convert(dense, tmp_path / name, experts=experts, active=active, **PLAIN)
    folders = [dense, *(tmp_path / name for name in splits)]
    names = ["dense", *splits]
    found = contenders_of(folders, names)
    half, quarter = "dense of the active size (24 neurons)", "dense of the active size (12 neurons)"
    assert [(c.name, c.same_size) for c in found] == [
        ("dense", None),
        (half, 1),
        ("half", 1),
        ("also-half", 1),
        (quarter, 4),
        ("quarter", 4),
    ]
    assert [c.config["intermediate_size"] for c in found] == [48, 24, 12, 6, 12, 12]
    alone = contenders_of(folders[:2], names[:2])
    assert [(c.name, c.same_size) for c in alone] == [
        ("dense", 1),
        ("dense of the active size", 1),
        ("half", 1),
    ]


def test_a_narrowed_model_keeps_any_number_of_heads() -> None:
    """SmolLM2 has nine; transformers refuses a hidden size that they do not divide."""
    for heads in (9, 14, 32):
        config = SHAPES["smollm2-135m"] | {"num_attention_heads": heads, "num_hidden_layers": 1}
        config |= {"hidden_size": 64 * heads, "num_key_value_heads": 1}
        small = random_model(narrow(config), torch.float32)
        assert small.config.num_attention_heads == heads
        with torch.no_grad():
            assert small(torch.arange(9)[None]).logits.shape == (1, 9, 256)
