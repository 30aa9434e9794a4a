"""A plan follows from measured speeds, and says what is possible when something is not."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

import moefy
from moefy.checkpoint.cost import SHAPES, cost, split_config
from moefy.errors import UsageError
from moefy.split import Split
from moefy.studies import plan as module
from moefy.studies.plan import MeasuredSplit, measured_splits, plan_rows


def row(active: int, experts: int, shared: int, decode: float, **other: Any) -> MeasuredSplit:
    values = {"shape": "llama-1b", "prefill": decode / 2, "measured": "m", "nats": None}
    counts = {"experts": experts, "active": active, "shared": shared}
    return MeasuredSplit(**{**values, **counts, "decode": decode, **other})


ROWS = [
    row(8, 16, 8, 3.0),  # pruned: never a candidate
    row(8, 16, 0, 1.5, nats=0.5),
    row(8, 16, 4, 1.399),  # which the table shows as 1.40
    row(4, 16, 0, 1.8),
    row(32, 64, 16, 1.3),
    row(8, 16, 0, 1.1, shape="smollm2-135m"),
]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "measured_splits", lambda: ROWS)


def test_the_speeds_that_come_with_moefy() -> None:
    found = moefy.plan("llama-1b", speedup=1.4)
    known = {Split(r.experts, r.active, r.shared): r for r in measured_splits()}
    for each in found.candidates:
        assert (each.prefill, each.decode) == (known[each.split].prefill, known[each.split].decode)
    assert round(known[found.recommended.split].decode, 2) >= 1.4


def test_the_largest_share_at_a_speed(rows: None) -> None:
    found = moefy.plan("llama-1b", speedup=1.4)
    assert [each.split for each in found.candidates] == [
        *(Split(64, 32, 16), Split(16, 8, 0), Split(16, 8, 4), Split(16, 4, 0))
    ]
    assert [each.fits for each in found.candidates] == [False, True, True, True]
    assert found.recommended.split == Split(16, 8, 0)
    assert found.recommended.nats == 0.5
    config = split_config(SHAPES["llama-1b"], experts=16, active=8, shared=0)
    assert found.recommended.cost == cost(config, context=4096)
    assert found.command == "moefy convert MODEL out/moe --experts 16 --active 8 --shared 0"
    assert [line[-1] for line in plan_rows(found)[1:]] == ["", "recommended", "yes", "yes"]
    json.dumps(asdict(found))
    assert moefy.plan("llama-1b", speedup=0.8, phase="prefill").recommended.split.active == 4
    smaller = moefy.plan("smollm2-135m", active_params=100_000_000)
    assert smaller.command.startswith("moefy convert smollm2-135m out/moe ")


def test_between_shapes_and_counts(rows: None, tmp_path: Path) -> None:
    """Halfway by the logarithms of parameters, and of slices: 32 lie between 16 and 64."""
    by_shape = {each.split: each for each in moefy.plan("smollm2-135m", speedup=0.1).candidates}
    assert by_shape[Split(16, 8, 0)].decode == pytest.approx(1.1)
    assert by_shape[Split(16, 8, 0)].source == "8/16+0 of smollm2-135m"
    assert moefy.plan("llama-7b", speedup=1.4).recommended.decode == pytest.approx(1.5)
    between = SHAPES["llama-1b"] | {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(between))
    (found,) = [
        each
        for each in moefy.plan(tmp_path / "config.json", speedup=0.1).candidates
        if each.split == Split(16, 8, 0)
    ]
    assert 1.1 < found.decode < 1.5
    assert found.source == "8/16+0 of llama-1b, 8/16+0 of smollm2-135m"


def test_presets(rows: None) -> None:
    """Of d_ff 11008 no 64 slices are a multiple of 128, and 43 are; 8 stays, with 1376 each."""
    quality = moefy.plan("llama-7b", preset="quality")
    assert quality.recommended.split == Split(43, 22, 0)
    # between 16 and 64 slices
    assert 1.3 < quality.recommended.decode < 1.5
    assert quality.recommended.source == "32/64+16 of llama-1b, 8/16+0 of llama-1b"
    assert moefy.plan("llama-7b", preset="speed").recommended.split == Split(8, 4, 2)
    # a family without such a target has no shared slice, or one
    assert moefy.plan("qwen3-4b", preset="quality").recommended.split == Split(38, 19, 0)
    faster = moefy.plan("llama-7b", preset="speed", speedup=1.6)
    assert faster.recommended.split.active < 4


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ({}, "say what you want: --speedup, --active-params or --for"),
        ({"speedup": 1.0, "phase": "sleep"}, "allowed are prefill and decode"),
        ({"preset": "best"}, "speed, quality"),
        ({"active_params": 50_000_000}, "active ones, since embeddings and attention always run"),
        ({"speedup": 3.0}, r"up to 1.10 times as fast in decode: ask for less"),
    ],
)
def test_what_cannot_be_had(rows: None, choices: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        moefy.plan("smollm2-135m", **choices)


def test_a_model_that_allows_no_split(rows: None, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(SHAPES["smollm2-135m"] | {"intermediate_size": 41})
    )
    with pytest.raises(UsageError, match="41 cannot be split into"):
        moefy.plan(tmp_path / "config.json", speedup=0.1)
