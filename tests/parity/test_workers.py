"""Several processes: the losses of one on the same batches, and checkpoints for any number."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file

import moefy
from moefy.training.state import read_log

LAYOUTS = {
    "replicate": {"replicate": 2},
    "shard": {"shard": 2},
    "shard + expert": {"shard": 2, "expert": 2},
    "tensor": {"tensor": 2},
}
SETTINGS: dict[str, Any] = {
    "global_batch_size": 4,
    "precision": "float32",
    "learning_rate": 3e-3,
    "z_loss": 1e-3,
    "evaluate_every_steps": 4,
    "heldout_sequences": 3,
}


@pytest.fixture
def dense(make_llama: Callable[..., Path]) -> Path:
    return make_llama(intermediate_size=64)


@pytest.fixture
def moe(dense: Path, corpus: Path, tmp_path: Path) -> Path:
    return converted(dense, corpus, tmp_path / "moe", "glm4_moe")


def converted(dense: Path, corpus: Path, out: Path, target: str) -> Path:
    choices = {"experts": 8, "active": 4, "shared": 2, "target": target}
    sizes = {"calibration_tokens": 512, "calibration_length": 32}
    moefy.convert(dense, out, data=corpus, **sizes, **choices)
    return out


def command(
    moe: Path, out: Path, corpus: Path, processes: int, steps: int, **settings: Any
) -> list[str]:
    launcher = [
        *("-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(processes)),
    ]
    chosen = SETTINGS | settings
    flags = [flag for key, value in chosen.items() for flag in ("--set", f"{key}={value}")]
    return [
        sys.executable,
        *(launcher if processes > 1 else []),
        *("-m", "moefy", "train", str(moe), str(out), "--data", str(corpus)),
        *("--tokens", str(32 * 4 * steps), "--sequence-length", "32", *flags),
    ]


def run(line: list[str], returncode: int | None = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert returncode in (None, done.returncode), done.stderr[-2000:]
    return done


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def stop_after(line: list[str], out: Path, steps: int, *, only_launcher: bool = False) -> None:
    """Kill a run when its log has so many steps: all its processes, or torchrun alone."""
    process = subprocess.Popen(
        line, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip
    log = out / "log.jsonl"
    while process.poll() is None and (
        not log.exists() or len(log.read_text().splitlines()) < steps
    ):
        time.sleep(0.005)
    workers = psutil.Process(process.pid).children(recursive=True)
    for worker in [psutil.Process(process.pid), *workers * (not only_launcher)]:
        worker.kill()
    process.wait()
    _, alive = psutil.wait_procs(workers, timeout=10)
    for worker in alive:
        worker.kill()
    assert not alive, "they go on without their launcher"
    assert not (out / "config.json").exists(), "the run was over before it was killed"


def losses(out: Path) -> np.ndarray:
    return np.array([line["loss"] for line in read_log(out)[1:]])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_train_as_one(layout: str, dense: Path, corpus: Path, tmp_path: Path) -> None:
    # granitemoeshared's output matrix is tied, and 257 rows are no multiple of two processes
    target = "granitemoeshared" if layout == "shard" else "glm4_moe"
    moe = converted(dense, corpus, tmp_path / "moe", target)
    settings = {
        "teacher": dense,
        "distillation": "{alpha: 0.5, layers: residual}",
        "balance": "{kind: switch, coefficient: 0.1}",
        "learning_rate": 1e-3,
    }
    one, two = tmp_path / "one", tmp_path / "two"
    if layout == "tensor":
        settings |= {"mixture": "DynamicUniform", "mixture_interval_steps": 3}
    run(command(moe, one, corpus, 1, 8, **settings, micro_batch_size=4))
    parallel = str(LAYOUTS[layout]).replace("'", "")
    settings |= {"parallel": parallel, "micro_batch_size": 4 if layout == "tensor" else 2}
    done = run(command(moe, two, corpus, 2, 8, **settings))
    assert done.stdout.count("KL to the dense model") == 1
    for line in (0, -1):
        for key in ("heldout_loss", "heldout_kl"):
            mine, theirs = (read_log(out)[line][key] for out in (two, one))
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-6), (key, line)
    for mine, theirs in zip(read_log(two)[1:], read_log(one)[1:], strict=True):
        for key in ("loss", "kl", "layer_loss", "balance_loss", "z_loss", "grad_norm"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-4, abs=1e-6), (key, mine["step"])
        assert mine["domain_loss"] == pytest.approx(theirs["domain_loss"], rel=1e-4)
        assert np.allclose(mine["expert_load"], theirs["expert_load"], atol=1e-2)
        assert ("mixture" in mine) == ("mixture" in theirs)
    assert (two / "config.json").read_bytes() == (one / "config.json").read_bytes()
    expected, found = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.allclose(found[name], tensor, atol=2e-3), name


def test_two_processes_tune_as_one(moe: Path, tmp_path: Path) -> None:
    """The last step of an epoch has one conversation: the second process waits with padding."""
    talks = tmp_path / "talks.jsonl"
    turns = [
        [{"from": "human", "value": f"say {i}"}, {"from": "gpt", "value": "ab" * (i % 7 + 1)}]
        for i in range(14)
    ]
    talks.write_text("".join(json.dumps({"conversations": turn}) + "\n" for turn in turns))
    settings = {"epochs": 2, "sequence_length": 64, "global_batch_size": 4, "learning_rate": 1e-3}
    settings |= {"precision": "float32", "heldout_conversations": 3}
    flags = [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]
    logs, weights = [], []
    for processes in (1, 2):
        out = tmp_path / f"tuned{processes}"
        launcher = command(moe, out, talks, processes, 1)
        launcher = launcher[: launcher.index("moefy") + 1]
        done = run([*launcher, "tune", str(moe), str(out), "--data", str(talks), *flags])
        assert done.stdout.count("chat template") == 1
        logs.append(read_log(out))
        weights.append(load_file(out / "model.safetensors"))
    one, two = logs
    assert len(one) == len(two) == 2 * 4 + 1
    for mine, theirs in zip(two[1:], one[1:], strict=True):
        for key in ("loss", "grad_norm", "tokens", "epoch"):
            assert mine[key] == pytest.approx(theirs[key], rel=2e-4), (key, mine["step"])
    for line in (0, -1):
        assert two[line]["heldout_loss"] == pytest.approx(one[line]["heldout_loss"], rel=1e-4)
    for name, tensor in weights[0].items():
        assert torch.allclose(weights[1][name], tensor, atol=2e-3), name


def test_a_stopped_run_goes_on_with_any_number_of_processes(
    moe: Path, corpus: Path, tmp_path: Path
) -> None:
    """With as many as before it ends bit for bit as if uninterrupted, with others to rounding."""
    settings = {"checkpoint_every_steps": 10, "balance": "selection-bias"}
    parallel: dict[int, dict[str, Any]] = {1: {}, 2: {"parallel": "{shard: 2, expert: 2}"}}

    def line(out: Path, processes: int) -> list[str]:
        return command(moe, out, corpus, processes, 60, **settings, **parallel[processes])

    whole = {processes: tmp_path / f"whole{processes}" for processes in (1, 2)}
    for processes, out in whole.items():
        run(line(out, processes))
    for before, after in ((2, 2), (2, 1), (1, 2)):
        out = tmp_path / f"{before}then{after}"
        stop_after(line(out, before), out, 25)
        run(line(out, after))
        expected, found = (load_file(m / "model.safetensors") for m in (whole[after], out))
        if before == after:
            assert losses(out).tolist() == losses(whole[after]).tolist()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert np.allclose(losses(out), losses(whole[after]), rtol=2e-3)
        for name, tensor in expected.items():
            assert torch.allclose(found[name], tensor, atol=1e-2), name


@pytest.mark.slow
def test_ranks_end_with_their_launcher(moe: Path, corpus: Path, tmp_path: Path) -> None:
    """The same command goes on from where they were, and ends as if nothing had happened."""
    settings = {"checkpoint_every_steps": 5, "parallel": "{shard: 2}"}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(command(moe, whole, corpus, 2, 60, **settings))
    stop_after(command(moe, killed, corpus, 2, 60, **settings), killed, 12, only_launcher=True)
    before = {file: file.stat().st_mtime_ns for file in killed.rglob("*")}
    time.sleep(1)
    assert before == {file: file.stat().st_mtime_ns for file in killed.rglob("*")}
    run(command(moe, killed, corpus, 2, 60, **settings))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, killed)]
    assert weights[0] == weights[1]
    assert losses(killed).tolist() == losses(whole).tolist()


@pytest.mark.slow
@pytest.mark.parametrize("failure", ["usage", "loss", "disk"])
def test_an_error_is_said_once(failure: str, moe: Path, corpus: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"parallel": "{shard: 2}"}
    message = "is longer than the context"
    if failure == "loss":
        settings |= {"learning_rate": 1e30}
        message = "lower --learning-rate"
    line = command(moe, tmp_path / "out", corpus, 2, 400, **settings)
    if failure == "usage":
        line[line.index("--sequence-length") + 1] = "513"
    if failure == "disk":
        message = "cannot be written|filled up"
        line = ["bash", "-c", 'ulimit -f 60; exec "$@"', "bash", *line]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    assert done.returncode != 0
    said = [text for text in done.stderr.splitlines() if "moefy: " in text]
    assert len(said) == 1, done.stderr[-3000:]
    assert re.search(message, said[0])
    assert "this is a bug" not in said[0]


def test_a_parallelism_that_is_not_there_is_an_error(
    moe: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    alone = run(command(moe, out, corpus, 1, 2, parallel="{shard: 2}"), returncode=2)
    assert "does not make 1 process: start 2 with torchrun" in alone.stderr
    uneven = run(command(moe, out, corpus, 2, 2, global_batch_size=3), returncode=None)
    assert uneven.stderr.count("must be a multiple of 2: 2 processes") == 1
    odd = run(command(moe, out, corpus, 2, 2, parallel="{tensor: 2, expert: 3}"), returncode=None)
    assert "expert 3 is impossible with shard 1 and tensor 2" in odd.stderr
    assert not out.exists()
