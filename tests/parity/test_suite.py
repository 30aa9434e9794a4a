"""Benchmarks against lm-evaluation-harness run directly on the same model and data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tests.conftest import write_tiny_model

from moefy.checkpoint.load import load_model, load_tokenizer
from moefy.checkpoint.source import builtin
from moefy.evaluation.harness import (
    HarnessModel,
    load_task,
    run_task,
    task_configs,
)
from moefy.evaluation.paired import standard_error
from moefy.evaluation.suite import PAPER_BENCHMARKS, Benchmark
from moefy.progress import silent

MOE = {"num_local_experts": 8, "num_experts_per_tok": 2}
LONGROPE = {
    "original_max_position_embeddings": 16,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 4.0, 5.0],
    },
}


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 8}),
        ("phi3", LONGROPE),
        ("mixtral", MOE),
        ("granitemoeshared", MOE),
    ],
)
@pytest.mark.parametrize("length", [1, 2, 14])
def test_answers_are_those_of_whole_passes(
    tmp_path: Path, model_type: str, settings: dict[str, Any], length: int
) -> None:
    folder = write_tiny_model(tmp_path, model_type, **settings)
    network = load_model(folder, dtype=torch.float32)
    ids = torch.randint(0, 256, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    question = ids[:length]
    answers = [ids[20:21], ids[20:24], ids[25:26], ids[20:23], ids[27:30]]
    model = HarnessModel(network, load_tokenizer(folder))
    requests = [(("", str(answer)), question, answer) for answer in answers]
    scores = model._loglikelihood_tokens(requests, disable_tqdm=True)
    for answer, (score, greedy) in zip(answers, scores, strict=True):
        with torch.inference_mode():
            logits = network(torch.tensor([question + answer[:-1]])).logits[0, length - 1 :]
        tokens = torch.tensor(answer)
        expected = logits.log_softmax(-1).gather(-1, tokens[:, None]).sum()
        assert score == pytest.approx(float(expected), abs=1e-5)
        assert greedy == bool((logits.argmax(-1) == tokens).all())


PAPER = {benchmark.task: benchmark for benchmark in PAPER_BENCHMARKS}


def check(network: Any, tokenizer: Any, entry: Benchmark, task: str, limit: int) -> None:
    """Every score and standard error is the harness's."""
    config = task_configs(entry, report=silent)[task]
    metric = entry.metric
    loaded = load_task(config)
    ours = run_task(HarnessModel(network, tokenizer), loaded, metric=metric, limit=limit)
    theirs = lm_eval.simple_evaluate(
        model=HFLM(pretrained=network, tokenizer=tokenizer, device="cpu", batch_size=1),
        tasks=[config],
        num_fewshot=entry.shots,
        task_manager=TaskManager(include_defaults=False),
        limit=limit,
        bootstrap_iters=2,
    )
    samples = theirs["samples"][task]
    kind = samples[0]["filter"]
    assert ours.values == [sample[metric] for sample in samples]
    assert sum(ours.values) / len(ours.values) == theirs["results"][task][f"{metric},{kind}"]
    error = theirs["results"][task][f"{metric}_stderr,{kind}"]
    assert standard_error(ours.values) == pytest.approx(error, rel=1e-12)


@pytest.fixture(scope="module")
def smollm2() -> tuple[Any, Any]:
    folder = builtin()
    return load_model(folder, dtype=torch.float32), load_tokenizer(folder)


@pytest.mark.parametrize("task", ["sciq", "arc_easy"])
def test_a_real_model(smollm2: tuple[Any, Any], task: str) -> None:
    check(*smollm2, PAPER[task], task, 3)


@pytest.mark.parametrize(
    "task",
    ["winogrande", "arc_challenge", "hellaswag", "logiqa", "boolq", "lambada_openai", "nq_open"],
)
def test_a_random_model(tmp_path: Path, task: str) -> None:
    """Its context is 512 tokens, so that prompts with examples are cut as the harness cuts them."""
    folder = write_tiny_model(tmp_path / "model", "llama")
    network, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    check(network, tokenizer, PAPER[task], task, 2 if task == "nq_open" else 6)


def test_mmlu(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", "llama", max_position_embeddings=4096)
    network, tokenizer = load_model(folder, dtype=torch.float32), load_tokenizer(folder)
    assert len(task_configs(PAPER["mmlu"], report=silent)) == 57
    for task in ("mmlu_anatomy", "mmlu_world_religions"):
        check(network, tokenizer, PAPER["mmlu"], task, 8)
