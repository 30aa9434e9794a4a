"""Models and generation settings as people hand them in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moefy
from moefy.checkpoint.families import dense_config
from moefy.checkpoint.load import load_model, load_tokenizer, mended_generation
from moefy.errors import ArchitectureError, CheckpointError, UsageError
from moefy.experts.routers import routers_of
from moefy.progress import Progress
from moefy.recipe import LLAMA_MOE

LLAMA_2_CHAT = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "max_length": 512}


def write_generation(folder: Path, content: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(content))


def test_generation_settings_that_transformers_does_not_save_are_mended(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    dense, out, seen = make_llama(), tmp_path / "moe", list[Progress]()
    write_generation(dense, LLAMA_2_CHAT)
    kept, left_out = mended_generation(dense)
    assert (kept, left_out) == ({"do_sample": False, "max_length": 512}, ["temperature", "top_p"])
    network = load_model(dense, dtype=torch.float32)
    network.generation_config.eos_token_id = 7  # a changed one is what transformers is strict with
    network.save_pretrained(tmp_path / "saved")
    moefy.convert(dense, out, experts=4, active=2, report=seen.append, **LLAMA_MOE)
    assert json.loads((out / "generation_config.json").read_text()) == kept
    assert any("without temperature, top_p" in sign.note for sign in seen)


@pytest.mark.parametrize("content", [[], "x", None, {"early_stopping": 3}, {"max_new_tokens": "x"}])
def test_generation_settings_of_no_meaning_are_refused_first(
    make_llama: Callable[..., Path], tmp_path: Path, content: Any
) -> None:
    dense = make_llama()
    write_generation(dense, content)
    with pytest.raises(CheckpointError, match=r"generation_config\.json is"):
        moefy.convert(dense, tmp_path / "moe", experts=4, active=2, **LLAMA_MOE)
    with pytest.raises(CheckpointError, match=r"generation_config\.json is"):
        load_model(dense, dtype=torch.float32)
    assert {path.name for path in tmp_path.iterdir()} == {"dense"}


@pytest.mark.parametrize("change", [{"num_experts_per_tok": n} for n in (-1, 0, 5)])
def test_a_model_that_chooses_experts_it_does_not_have_is_refused(
    make_llama: Callable[..., Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    out = tmp_path / "moe"
    recipe = LLAMA_MOE | {"partition": "random", "router": "random", "repair": "none"}
    moefy.convert(make_llama(), out, experts=4, active=2, **recipe)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match="of 4 experts"):
        load_model(out, dtype=torch.float32)


def test_a_model_type_that_is_no_text_is_refused(make_llama: Callable[..., Path]) -> None:
    dense = make_llama()
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"model_type": {"a": []}}))
    with pytest.raises(UsageError, match="must be the name of an architecture"):
        load_model(dense, dtype=torch.float32)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "granite", "residual_multiplier": 0}, "has residual_multiplier = 0"),
        (
            {"model_type": "qwen2", "num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
            "sliding_window = None and use_sliding_window = False$",
        ),
    ],
)
def test_a_key_that_cannot_be_carried_over_is_named(config: Any, said: str) -> None:
    with pytest.raises(ArchitectureError, match=said):
        dense_config(config, "x")


def test_a_longest_text_that_is_no_number_is_refused(make_llama: Callable[..., Path]) -> None:
    file = make_llama() / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_max_length": []}))
    with pytest.raises(CheckpointError, match="model_max_length is no number"):
        load_tokenizer(file.parent)


def test_a_router_of_sigmoids_chooses_in_bfloat16_as_in_float32(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "moe"
    recipe = LLAMA_MOE | {"partition": "random", "router": "random", "repair": "none"}
    counts = {"experts": 8, "active": 4, "shared": 1, "target": "glm4_moe"}
    moefy.convert(make_llama(), out, **recipe | counts)
    router = routers_of(load_model(out, dtype=torch.float32))[0]
    inputs = torch.randn(64, router.weight.shape[1], generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        _, weights, chosen = router(inputs)
    _, expected, same = router(inputs)
    assert torch.equal(chosen, same)
    assert torch.equal(weights, expected)
