"""All experts active is the dense model; a saved checkpoint loads with plain transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import moefy
from moefy.errors import OutputError, UsageError


@pytest.mark.parametrize("experts", [1, 4, 12])
def test_all_experts_active_equals_dense(tiny_llama: Path, tmp_path: Path, experts: int) -> None:
    out = tmp_path / "moe"
    moefy.convert(tiny_llama, out, experts=experts, active=experts, rescale="none")
    ids = torch.randint(0, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        dense = AutoModelForCausalLM.from_pretrained(tiny_llama)(ids).logits
        split = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    assert (dense - split).abs().max() < 1e-4


def test_same_seed_same_bytes(tiny_llama: Path, tmp_path: Path) -> None:
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        moefy.convert(tiny_llama, tmp_path / name, experts=4, active=2, seed=seed)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b != c


@pytest.mark.parametrize(("experts", "active"), [(7, 2), (4, 5), (4, 0)])
def test_impossible_split_writes_nothing(
    tiny_llama: Path, tmp_path: Path, experts: int, active: int
) -> None:
    with pytest.raises(UsageError):
        moefy.convert(tiny_llama, tmp_path / "moe", experts=experts, active=active)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


def test_output_in_the_way_is_kept(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "moe"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    for overwrite in (False, True):
        with pytest.raises(OutputError):
            moefy.convert(tiny_llama, out, experts=4, active=2, overwrite=overwrite)
    assert (out / "mine.txt").read_text() == "keep"
