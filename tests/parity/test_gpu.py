"""On a GPU: what is calibrated, trained and measured there is what the CPU gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import moefy
from moefy.training.state import read_log

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_every_method_builds_what_it_builds_on_the_cpu(
    make_llama: Callable[..., Path],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = make_llama(intermediate_size=256)
    choices: dict[str, Any] = {"data": corpus, "experts": 8, "active": 4, "seeds": 1, "windows": 3}
    choices |= {"sequence_length": 64, "convert": {"calibration_tokens": 1024}}
    ours = moefy.study(tmp_path / "gpu", model=dense, only=["methods"], **choices)
    on_the_cpu(monkeypatch)
    expected = moefy.study(tmp_path / "cpu", model=dense, only=["methods"], **choices)
    assert [run.arm for run in ours.runs] == [run.arm for run in expected.runs]
    for mine, theirs in zip(ours.runs, expected.runs, strict=True):
        assert mine.loss == pytest.approx(theirs.loss, abs=0.03), mine.arm


def test_the_same_model_is_written_where_nothing_is_chosen_by_rounding(
    make_llama: Callable[..., Path],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dense = make_llama()
    choices: dict[str, Any] = {"experts": 4, "active": 2, "shared": 0, "partition": "random"}
    choices |= {"router": "ridge", "calibration_tokens": 1024, "calibration_length": 64}
    moefy.convert(dense, tmp_path / "gpu", data=corpus, **choices)
    found = moefy.evaluate([dense, tmp_path / "gpu"], data=corpus, sequence_length=64)
    on_the_cpu(monkeypatch)
    moefy.convert(dense, tmp_path / "cpu", data=corpus, **choices)
    expected = moefy.evaluate([dense, tmp_path / "cpu"], data=corpus, sequence_length=64)
    for mine, theirs in zip(found.results, expected.results, strict=True):
        assert mine.perplexity == pytest.approx(theirs.perplexity, rel=2e-3)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 2e-2)])
def test_training_takes_the_same_steps(
    make_llama: Callable[..., Path],
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    tolerance: float,
) -> None:
    dense = make_llama(intermediate_size=64)
    moefy.convert(
        dense, tmp_path / "moe", experts=4, active=2, data=corpus, calibration_tokens=1024
    )
    choices = {"data": corpus, "tokens": 64 * 4 * 8, "sequence_length": 64, "teacher": str(dense)}
    choices |= {"global_batch_size": 4, "micro_batch_size": 2, "learning_rate": 1e-3}
    moefy.train(tmp_path / "moe", tmp_path / "gpu", precision=precision, **choices)
    on_the_cpu(monkeypatch)
    moefy.train(tmp_path / "moe", tmp_path / "cpu", precision="float32", **choices)
    for mine, theirs in zip(
        read_log(tmp_path / "gpu")[1:], read_log(tmp_path / "cpu")[1:], strict=True
    ):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=tolerance)
        assert mine["kl"] == pytest.approx(theirs["kl"], rel=10 * tolerance, abs=tolerance)
