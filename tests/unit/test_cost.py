"""Counts against transformers' own parameters and PyTorch's own FLOP counter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.conftest import write_tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import moefy
from moefy.checkpoint.cost import SHAPES, cost
from moefy.checkpoint.families import dense_config
from moefy.checkpoint.reader import read_config
from moefy.checkpoint.targets import TARGETS, target_config
from moefy.errors import ArchitectureError
from moefy.recipe import LLAMA_MOE
from moefy.split import Split


def test_llama_2_7b_counts_are_the_papers() -> None:
    costs = moefy.inspect("llama-2-7b").costs
    assert f"{costs['dense'].total_params / 1e9:.2f}" == "6.74"
    active = {name: f"{cost.active_params / 1e9:.2f}" for name, cost in costs.items()}
    assert active == {
        "dense": "6.74",
        "2/16": "2.95",
        "4/16": "3.49",
        "2/8": "3.49",
        "8/16": "4.58",
        "16/32": "4.58",
    }
    dense = costs["dense"].flops_per_token
    assert all(
        cost.flops_per_token < 0.56 * dense
        for k, cost in costs.items()
        if k in ("2/16", "4/16", "2/8")
    )


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("experts", [0, 16])
def test_total_parameters_are_those_of_the_real_architecture(name: str, experts: int) -> None:
    config = SHAPES[name]
    if experts:
        config = target_config(
            TARGETS["mixtral"], dense_config(config, name), Split(experts, 2), dtype="float32"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    assert cost(config).total_params == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("context", [16, 64])
@pytest.mark.parametrize("active", [None, 1, 3])
def test_flops_are_those_pytorch_counts(
    make_llama: Callable[..., Path], tmp_path: Path, active: int | None, context: int
) -> None:
    folder = make_llama()
    if active is not None:
        moefy.convert(folder, tmp_path / "moe", experts=4, active=active, **LLAMA_MOE)
        folder = tmp_path / "moe"
    model = AutoModelForCausalLM.from_pretrained(
        folder, experts_implementation="eager", attn_implementation="eager"
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, context, dtype=torch.long), use_cache=False)
    attention = 4 * 2 * 32  # per query and key: two products, 2 layers, hidden 32
    counted = cost(read_config(folder), context=context).flops_per_token
    # PyTorch counts all context² pairs of attention, we count the causal half
    expected = counter.get_total_flops() - attention * context**2
    assert context * counted - attention * context * (context + 1) // 2 == pytest.approx(
        expected, rel=1e-3
    )


def test_a_model_without_a_plain_target_is_counted_with_a_shared_slice(tmp_path: Path) -> None:
    dense = write_tiny_model(tmp_path / "dense", "phi3", partial_rotary_factor=0.5)
    settings = {"experts": 8, "active": 4, "shared": 1}
    moefy.convert(dense, tmp_path / "moe", **LLAMA_MOE | settings)
    counted = moefy.inspect(dense, experts=8, active=4).costs["4/8"]
    assert counted == cost(read_config(tmp_path / "moe"), context=counted.context)
    with pytest.raises(ArchitectureError, match="rotates whole heads"):
        moefy.inspect(dense, experts=8, active=1)


def test_unknown_architecture_is_refused() -> None:
    with pytest.raises(ArchitectureError, match="gpt2"):
        cost({"model_type": "gpt2"})


def test_a_split_with_one_count_has_the_usual_other_one() -> None:
    assert list(moefy.inspect("llama-2-7b", experts=16).costs) == ["dense", "8/16"]
    assert list(moefy.inspect("smollm2-135m", active=8).costs) == ["dense", "8/64"]
