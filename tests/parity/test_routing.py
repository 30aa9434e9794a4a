"""What routers do, against transformers' own router logits; what another k computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import byte_tokenizer, write_tiny_model
from tests.parity.test_objective import TARGETS, native
from torch import Tensor
from transformers import AutoModelForCausalLM

import moefy
from moefy.data.records import open_domains
from moefy.data.tokenise import pack
from moefy.errors import UsageError
from moefy.evaluation.routing import RoutingResult
from moefy.experts.routers import routers_of
from moefy.recipe import LLAMA_MOE

EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none"}
WINDOWS, LENGTH = 3, 32


def write_native(folder: Path, model_type: str) -> Path:
    native(model_type).float().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def measure(models: list[Path], corpus: Path, **settings: Any) -> RoutingResult:
    return moefy.measure_routing(
        models, data=corpus, windows=WINDOWS, sequence_length=LENGTH, **settings
    )


def windows_of(corpus: Path) -> dict[str, Tensor]:
    tokenizer, size = byte_tokenizer(), {"sequence_length": LENGTH, "max_windows": WINDOWS}
    return {
        domain.name: torch.from_numpy(pack(domain.documents("heldout"), tokenizer, **size))
        for domain in open_domains(corpus)
    }


@pytest.mark.parametrize("model_type", TARGETS)
def test_choices_are_those_of_transformers_router_logits(
    model_type: str, tmp_path: Path, corpus: Path
) -> None:
    folder = write_native(tmp_path / "moe", model_type)
    (found,) = measure([folder], corpus).models
    assert (found.experts, found.active) == (6, 2)

    model = AutoModelForCausalLM.from_pretrained(folder)
    chosen: dict[str, list[list[set[int]]]] = {}  # by domain and layer, of every token
    for domain, ids in windows_of(corpus).items():
        with torch.inference_mode():
            out = model(ids, output_router_logits=True)
        chosen[domain] = []
        for router, logits in zip(routers_of(model), out.router_logits, strict=True):
            by = logits
            if model_type == "glm4_moe":
                by = logits.sigmoid() + router.e_score_correction_bias
            top = by.argsort(dim=-1, descending=True)[:, :2]
            chosen[domain].append([set(row) for row in top.tolist()])
        for layer_idx, tokens in enumerate(chosen[domain]):
            shares = [sum(e in token for token in tokens) / (2 * len(tokens)) for e in range(6)]
            assert found.load[domain][layer_idx] == pytest.approx(shares, abs=1e-12)
    for layer_idx in range(2):
        tokens = [token for layers in chosen.values() for token in layers[layer_idx]]
        counts = [sum(e in token for token in tokens) for e in range(6)]
        shares = [count / sum(counts) for count in counts]
        nats = -sum(share * math.log(share) for share in shares if share)
        assert found.entropy[layer_idx] == pytest.approx(nats / math.log(6))
        assert found.dead[layer_idx] == [e for e in range(6) if not counts[e]]
        assert found.max_over_mean[layer_idx] == pytest.approx(6 * max(shares))


def test_domains_of_different_letters_are_told_apart(tmp_path: Path, corpus: Path) -> None:
    """A router that looks at the letters does, one that chooses every expert cannot."""
    (found,) = measure([write_native(tmp_path / "moe", "mixtral")], corpus).models
    assert min(found.domain_distance) > 0.01
    moefy.convert(
        write_tiny_model(tmp_path / "dense", "llama"),
        tmp_path / "all",
        experts=4,
        active=4,
        **EXACT,
    )
    (found,) = measure([tmp_path / "all"], corpus).models
    assert found.domain_distance == [0, 0]
    assert found.entropy == [1, 1]


def test_without_experts_there_is_nothing_to_watch(
    make_llama: Callable[..., Path], corpus: Path
) -> None:
    with pytest.raises(UsageError, match="no model has experts to choose from"):
        measure([make_llama("a"), make_llama("b")], corpus)
