"""Which models are compared in speed, and with which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import write_tiny_model
from tests.parity.test_families import CASES, name_of

import moefy
from moefy.checkpoint.cost import SHAPES, cost
from moefy.checkpoint.families import FAMILIES
from moefy.checkpoint.reader import read_config
from moefy.evaluation import speed
from moefy.evaluation.contenders import (
    Contender,
    contender_of,
    dense_of_active_size,
    random_model,
    splits_of,
    with_stand_ins,
)
from moefy.hardware import fastest
from moefy.progress import silent
from moefy.recipe import LLAMA_MOE

PLAIN: dict[str, Any] = LLAMA_MOE | {"repair": "none"}
HIDDEN, LAYERS = 32, 2  # of the tiny model


# the stand-in has attention in every layer
WITH_ATTENTION = [case for case in CASES if not FAMILIES[case[0]].mixers]


@pytest.mark.parametrize(("family", "settings", "shared", "target"), WITH_ATTENTION, ids=name_of)
def test_stand_ins(
    tmp_path: Path, family: str, settings: dict[str, Any], shared: int, target: str
) -> None:
    """The dense stand-in has the MoE's active parameters but the router's."""
    dense = write_tiny_model(tmp_path / "dense", family, **settings)
    moefy.convert(dense, tmp_path / "moe", experts=4, active=3, **PLAIN | {"shared": shared})
    config = read_config(tmp_path / "moe")
    assert config["model_type"] == target
    router = LAYERS * HIDDEN * (4 - shared)
    active = cost(config).active_params - router
    stand_in = dense_of_active_size(config)
    biases = cost(stand_in).total_params - active
    assert abs(biases) <= 2 * LAYERS * HIDDEN  # o_proj has one in some families only
    made = random_model(stand_in, torch.float32)
    assert sum(p.numel() for p in made.parameters()) == cost(stand_in).total_params


def test_a_dense_model_comes_before_each_active_size(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    dense = make_llama()
    splits = {"half": (4, 2), "also-half": (8, 4), "quarter": (4, 1)}
    for name, (experts, active) in splits.items():
        moefy.convert(dense, tmp_path / name, experts=experts, active=active, **PLAIN)
    folders = [dense, *(tmp_path / name for name in splits)]
    names = ["dense", *splits]
    given = [replace(contender_of(f, silent), name=n) for f, n in zip(folders, names, strict=True)]
    found = with_stand_ins(given)
    half, quarter = "dense (same active size, 24 neurons)", "dense (same active size, 12 neurons)"
    assert [c.name for c in found] == ["dense", half, "half", "also-half", quarter, "quarter"]
    assert [c.folder for c in found] == [None, None, *folders[1:3], None, folders[3]]
    assert [c.config["intermediate_size"] for c in found] == [48, 24, 12, 6, 12, 12]
    alone = with_stand_ins(given[:2])
    assert [c.name for c in alone] == ["dense", "dense (same active size)", "half"]


def test_each_model_is_compared_with_its_size(tiny_llama: Path, tmp_path: Path) -> None:
    """The whole dense model is its own counterpart."""
    for name, active in {"half": 2, "quarter": 1}.items():
        moefy.convert(tiny_llama, tmp_path / name, experts=4, active=active, **PLAIN)
    short: dict[str, Any] = {"batches": [1], "prompt_tokens": 4, "new_tokens": 1, "rounds": 1}
    models = [tiny_llama, tmp_path / "half", tmp_path / "quarter"]
    rows = [row for row in moefy.measure_speed(models, **short).speeds if row.phase == "decode"]
    for row, index in zip(rows, [0, 1, 1, 3, 3], strict=True):
        assert row.of_active_size == pytest.approx(row.tokens_per_s / rows[index].tokens_per_s)
        assert row.of_dense == pytest.approx(row.tokens_per_s / rows[0].tokens_per_s)


def test_fewer_layers_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 s and half a second for each layer: a model of 16 layers takes 9 s."""
    shape = Contender("llama-1b", SHAPES["llama-1b"])

    def timed(each: Contender, *_: object) -> dict[tuple[str, int], dict[str, float]]:
        assert each.folder is None
        return {("decode", 1): {"": 1 + 0.5 * each.config["num_hidden_layers"]}}

    monkeypatch.setattr(speed, "_seconds", timed)
    how = ("transformers", "float32", (1,), (8, 2))
    assert speed._scaled_seconds(shape, 4, how, Path())["decode", 1] == {"": 9.0}


def test_random_weights_are_all_different() -> None:
    """A row that came twice would be two experts with the same load."""
    config = splits_of(Contender("x", SHAPES["smollm2-135m"]), ["8/16"])[0].config
    network = random_model({**config, "num_hidden_layers": 1, "vocab_size": 512}, torch.float32)
    for name, matrix in network.named_parameters():
        if matrix.dim() > 1:
            rows = matrix.detach().flatten(0, -2)
            assert 0.01 < rows.std() < 0.03, name
            assert len(rows[:2000].unique(dim=0)) == len(rows[:2000]), name


def test_experts_that_torch_cannot_group(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """Two neurons are 8 bytes, and a grouped product wants multiples of 16."""
    dense, moe = make_llama(intermediate_size=32), tmp_path / "moe"
    moefy.convert(dense, moe, experts=16, active=4, **PLAIN)
    sizes: dict[str, int] = {"prompt_tokens": 8, "new_tokens": 1, "rounds": 1}
    rows = moefy.measure_speed(moe, batches=[1], **sizes).speeds
    assert {row.implementation for row in rows if row.model == str(moe)} <= {
        "eager",
        "lean",
    }


def test_the_fastest_of_short_runs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([[2.0, 5.0], [1.0, 6.0], [3.0, 4.0], [0.0, 0.0]])
    assert fastest(lambda: next(times)) == [1.0, 4.0]
    clock = iter([0.0, 5.0])  # a run that is long
    monkeypatch.setattr("moefy.hardware.time.perf_counter", lambda: next(clock))
    assert fastest(lambda: [7.0]) == [7.0]
