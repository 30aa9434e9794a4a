"""Training: the loss is transformers' own, it falls, and a killed run ends as if uninterrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import moefy
from moefy.data.corpus import open_corpus
from moefy.data.mixture import Mixture
from moefy.data.strategies import initial_weights
from moefy.errors import (
    ArchitectureError,
    CheckpointError,
    CorpusError,
    OutputError,
    TrainingError,
    UsageError,
)
from moefy.progress import Progress
from moefy.recipe import LLAMA_MOE
from moefy.run_folder import RunFolder
from moefy.training.state import read_log

SHORT: dict[str, Any] = {
    "sequence_length": 32,
    "global_batch_size": 4,
    "precision": "float32",
    "learning_rate": 3e-3,
}


@pytest.fixture
def moe(make_llama: Callable[..., Path], tmp_path: Path) -> Path:
    moefy.convert(make_llama(), tmp_path / "moe", experts=4, active=2, **LLAMA_MOE)
    return tmp_path / "moe"


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def without_time(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    timed = {"tokens_per_s"}
    return [{key: value for key, value in line.items() if key not in timed} for line in log]


def test_training_lowers_the_loss_and_keeps_the_form(
    moe: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    done = moefy.train(moe, out, data=corpus, tokens=32 * 4 * 60, **SHORT)
    assert done.heldout_before == pytest.approx(np.log(257), rel=0.05)  # a random model
    assert done.heldout_after is not None
    assert done.heldout_after < 2.5
    before, after = (
        moefy.evaluate(folder, data=corpus, sequence_length=32, decode=False).results[0].perplexity
        for folder in (moe, out)
    )
    assert after < 0.1 * before
    assert (out / "config.json").read_bytes() == (moe / "config.json").read_bytes()
    log = read_log(out)
    assert [line["step"] for line in log] == list(range(61))
    assert np.allclose(np.sum(log[-1]["expert_load"], axis=1), 1, atol=1e-3)
    assert {"ab", "xyz"} == set().union(*(line["domain_loss"] for line in log[1:]))


def test_the_first_loss_is_transformers_loss(moe: Path, corpus: Path, tmp_path: Path) -> None:
    one = SHORT | {"global_batch_size": 1}
    moefy.train(moe, tmp_path / "out", data=corpus, tokens=32, seed=5, **one)
    windows = open_corpus(corpus, moe, sequence_length=32, max_sequences=1, seed=5).train
    weights = initial_weights("Uniform", windows)
    one_each = dict.fromkeys(windows, 1)
    ((name, _, _),) = Mixture(one_each, weights, seed=5, global_batch_size=1).next_batch()
    ids = torch.from_numpy(windows[name])
    model = AutoModelForCausalLM.from_pretrained(moe).double()
    expected = model(ids, labels=ids).loss.item()
    assert read_log(tmp_path / "out")[1]["loss"] == pytest.approx(expected, abs=1e-5)


def test_a_long_document_does_not_take_the_place_of_the_others(moe: Path, tmp_path: Path) -> None:
    texts = ["a" * 5000, *(letter * 100 for letter in "bcd")]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    windows = open_corpus(tmp_path / "text.jsonl", moe, sequence_length=32, max_sequences=4).train
    (found,) = windows.values()
    assert len({tuple(window) for window in found.tolist()}) == 4


def test_several_passes_are_one_batch(moe: Path, corpus: Path, tmp_path: Path) -> None:
    logs = []
    for per_pass in (1, 4):
        out = tmp_path / f"by{per_pass}"
        moefy.train(
            moe,
            out,
            data=corpus,
            tokens=32 * 4,
            micro_batch_size=per_pass,
            balance="none",  # the balance of a whole batch is not the mean of its parts
            **SHORT,
        )
        logs.append(read_log(out)[1])
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], abs=1e-5)
    assert logs[0]["grad_norm"] == pytest.approx(logs[1]["grad_norm"], rel=1e-4)


def test_a_killed_run_ends_as_if_uninterrupted(moe: Path, corpus: Path, tmp_path: Path) -> None:
    def command(out: Path) -> list[str]:
        settings = {
            "checkpoint_every_steps": 20,
            "global_batch_size": 4,
            "precision": "float32",
        }
        chosen = [flag for key, value in settings.items() for flag in ("--set", f"{key}={value}")]
        options = ["--data", str(corpus), "--tokens", str(32 * 4 * 160), "--sequence-length", "32"]
        moefy_script = Path(sys.executable).with_name("moefy")
        return [str(moefy_script), "train", str(moe), str(out), *options, *chosen, "--json"]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command(whole), env=environment, check=True, capture_output=True)
    process = subprocess.Popen(
        command(killed), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = killed / "log.jsonl"
    while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) < 50):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "config.json").exists(), "the run was over before it was killed"

    resumed = subprocess.run(
        command(killed), env=environment, check=True, capture_output=True, text=True
    )
    assert json.loads(resumed.stdout)["resumed_from_step"] >= 40
    assert weights(killed) == weights(whole)
    assert without_time(read_log(killed)) == without_time(read_log(whole))
    assert not (killed / "checkpoint").exists()


def test_an_unfinished_run_refuses_other_settings(moe: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(TrainingError, match=r"step \d+: loss .*(ab|xyz)\[\d+\].*lower --learn"):
        moefy.train(
            moe,
            out,
            data=corpus,
            tokens=32 * 4 * 400,
            checkpoint_every_steps=1,
            **SHORT | {"learning_rate": 1e30},
        )
    assert list((out / "checkpoint").glob("step-*/run.json"))
    with pytest.raises(UsageError, match="unfinished training run"):
        moefy.evaluate(out, data=corpus)
    with pytest.raises(OutputError, match=r"learning_rate: was 1e\+30, now 0.003"):
        moefy.train(moe, out, data=corpus, tokens=32 * 4 * 400, checkpoint_every_steps=1, **SHORT)


def test_bad_input_keeps_what_overwrite_would_replace(
    moe: Path, corpus: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    moefy.train(moe, out, data=corpus, tokens=128, **SHORT)
    before = weights(out)
    with pytest.raises(CorpusError):
        moefy.train(moe, out, data=tmp_path / "none", overwrite=True, **SHORT)
    with pytest.raises(CorpusError):
        moefy.train(moe, out, data=corpus, mixture={"ab": 1.0}, overwrite=True, **SHORT)
    with pytest.raises(OutputError, match="--overwrite"):
        moefy.train(moe, out, data=corpus, tokens=128, **SHORT)
    with pytest.raises(OutputError, match="its own source"):
        moefy.train(moe, moe, data=corpus, overwrite=True, **SHORT)
    assert weights(out) == before


def test_overwrite_replaces_when_the_new_model_is_whole(
    moe: Path, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, beside = tmp_path / "out", tmp_path / ".out.next"
    again: dict[str, Any] = {"data": corpus, "tokens": 256, "checkpoint_every_steps": 1, **SHORT}
    moefy.train(moe, tmp_path / "whole", **again)
    moefy.train(moe, out, data=corpus, tokens=128, **SHORT)
    before = weights(out)
    with pytest.raises(TrainingError):
        moefy.train(moe, out, overwrite=True, **again | {"learning_rate": 1e30})
    assert weights(out) == before
    assert (beside / "checkpoint").is_dir()

    def stop(progress: Progress) -> None:
        if (progress.stage, progress.done) == ("train", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # other settings: begun again
        moefy.train(moe, out, overwrite=True, report=stop, **again)
    assert weights(out) == before

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(RunFolder, "_swap", killed)
        with pytest.raises(KeyboardInterrupt):
            moefy.train(moe, out, overwrite=True, **again)
    assert weights(out) == before
    done = moefy.train(moe, out, overwrite=True, **again)
    assert (done.resumed_from_step, done.elapsed_s) == (2, 0.0)
    assert weights(out) == weights(tmp_path / "whole")
    assert not beside.exists()


def test_overwrite_keeps_what_the_run_reads(
    moe: Path, make_llama: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    other = make_llama("other", vocab_size=300)
    out = tmp_path / "out"
    moefy.train(moe, out, data=corpus, tokens=128, **SHORT)
    before = weights(out)
    follows = {"mixture": "DynamicUniform", "reference_losses": {"ab": 1.5}}
    again: dict[str, Any] = {"data": corpus, "tokens": 128, "overwrite": True, **SHORT}
    with pytest.raises(ArchitectureError, match="300 tokens in its vocabulary"):
        moefy.train(moe, out, teacher=str(other), **again)
    with pytest.raises(CorpusError, match=r"reference_losses are for ab, and .* has ab, xyz"):
        moefy.train(moe, out, **follows, **again)
    with pytest.raises(OutputError, match="its own source"):
        moefy.train(moe, out, teacher=str(out), **again)
    with pytest.raises(OutputError, match="its own source"):
        moefy.train(moe, out, **again | {"data": out})
    assert weights(out) == before


def test_a_prepared_corpus_is_no_unfinished_run(moe: Path, corpus: Path, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    moefy.prepare(corpus, tokens, tokenizer=str(moe), workers=1)
    with pytest.raises(OutputError, match="holds a finished corpus"):
        moefy.train(moe, tokens, data=corpus, tokens=128, **SHORT)
    with pytest.raises(OutputError, match="holds a corpus, so --overwrite will not delete it"):
        moefy.train(moe, tokens, data=corpus, tokens=128, overwrite=True, **SHORT)
    with pytest.raises(CheckpointError, match=r"no config\.json$"):
        moefy.evaluate(tokens, data=corpus)


def test_a_dense_model_trains_too(
    make_llama: Callable[..., Path], corpus: Path, tmp_path: Path
) -> None:
    done = moefy.train(make_llama(), tmp_path / "out", data=corpus, tokens=32 * 4 * 20, **SHORT)
    assert done.kl_before is None, "nothing says that it comes from another dense model"
    assert done.heldout_before is not None
    assert done.heldout_after is not None
    assert done.heldout_after < done.heldout_before
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"
