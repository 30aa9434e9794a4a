"""Damaged checkpoints: passed over for the one before, or named; never a silently different run."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import moefy
from moefy.errors import OutputError
from moefy.progress import Progress
from moefy.recipe import LLAMA_MOE
from moefy.training.state import read_log

COMMON = {"global_batch_size": 4, "checkpoint_every_steps": 2, "precision": "float32"}
TRAIN: dict[str, Any] = COMMON | {
    "sequence_length": 32,
    "tokens": 32 * 4 * 8,
    "mixture": "DynamicUniform",
    "mixture_interval_steps": 3,
    "distillation": {"alpha": 0.0},
}
TUNE: dict[str, Any] = COMMON | {"sequence_length": 64, "epochs": 1}


class StopError(Exception):
    pass


@pytest.fixture
def place(make_llama: Callable[..., Path], corpus: Path, tmp_path: Path) -> Path:
    """A folder with a model, its split, text, conversations and whole runs of both commands."""
    dense = make_llama()
    recipe = LLAMA_MOE | {"partition": "random", "router": "random", "repair": "none"}
    moefy.convert(dense, tmp_path / "moe", experts=4, active=2, **recipe)
    talks = (
        {"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "a"}]}
        for i in range(32)
    )
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks))
    return tmp_path


def run(stage: str, place: Path, out: Path, *, stop: int | None = None) -> Any:
    def report(progress: Progress) -> None:
        notes.append(f"{progress.stage} {progress.note}")
        if progress.stage == stage and progress.done == stop:
            raise StopError

    notes: list[str] = []
    if stage == "train":
        options = TRAIN | {"teacher": str(place / "dense"), "data": place / "corpus"}
        done: Any = moefy.train(place / "moe", out, report=report, **options)
    else:
        done = moefy.tune(place / "moe", out, data=place / "talks.jsonl", report=report, **TUNE)
    return done, [note for note in notes if note.startswith("resume")]


def stopped(stage: str, place: Path) -> Path:
    with pytest.raises(StopError):
        run(stage, place, place / "stopped", stop=7)
    return place / "stopped"


def ends(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    timed = {"tokens_per_s"}
    log = [{k: v for k, v in line.items() if k not in timed} for line in read_log(folder)]
    return (folder / "model.safetensors").read_bytes(), log


def damages(content: bytes) -> Iterator[bytes | None]:
    """Yield what may have become of a file: None for nothing at all."""
    yield None
    yield b""
    yield content[: len(content) // 2]
    yield bytes(len(content))
    for place in range(0, len(content), max(1, len(content) // 5)):
        yield content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["train", "tune"])
def test_no_damage_to_any_file_changes_a_run_in_silence(stage: str, place: Path) -> None:
    run(stage, place, place / "whole")
    expected, left = ends(place / "whole"), stopped(stage, place)
    last = sorted((left / "checkpoint").iterdir())[-1]
    out, counts = place / "out", {"as if whole": 0, "named": 0}
    files = [file for file in left.rglob("*") if file.is_file() and file.parent in (left, last)]
    assert {"log.jsonl", ".moefy.json", "checksums.json"} < {file.name for file in files}
    for file in files:
        for damaged in damages(file.read_bytes()):
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(left, out)
            victim = out / file.relative_to(left)
            victim.unlink() if damaged is None else victim.write_bytes(damaged)
            try:
                run(stage, place, out)
            except OutputError:
                # `train` keeps a checkpoint to go back to, and reads no journal of OUT itself
                assert stage == "tune" or file.name == ".moefy.json", (file, damaged)
                counts["named"] += 1
            else:
                assert ends(out) == expected, (file, damaged)
                counts["as if whole"] += 1
    print(f"{stage}: {len(files)} files, {counts}")
    assert min(counts.values()) > 0


def test_a_damaged_checkpoint_is_passed_over_and_said(place: Path) -> None:
    run("train", place, place / "whole")
    out = stopped("train", place)
    (out / "log.jsonl").unlink()
    last = out / "checkpoint" / "step-00000006"
    content = bytearray((last / "00000.safetensors").read_bytes())
    content[-1] ^= 1
    (last / "00000.safetensors").write_bytes(content)
    done, notes = run("train", place, out)
    assert done.resumed_from_step == 4
    assert notes == ["resume passed over step-00000006: 00000.safetensors is damaged or missing"]
    assert ends(out) == ends(place / "whole")


def test_no_whole_checkpoint_is_an_error(place: Path) -> None:
    out = stopped("tune", place)
    (out / "checkpoint" / "step-00000006" / "checksums.json").unlink()
    with pytest.raises(OutputError, match=r"no checkpoint of .* is whole \(step-00000006: .*sums"):
        run("tune", place, out)


def resealed(checkpoint: Path) -> None:
    """Write checksums that fit, as a stranger would who made the files."""
    sums = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in checkpoint.iterdir()
        if file.name != "checksums.json"
    }
    (checkpoint / "checksums.json").write_text(json.dumps(sums))


@pytest.mark.parametrize("name", ["00000.safetensors", ".metadata", "run.json", "checksums.json"])
def test_a_checkpoint_runs_no_code(name: str, place: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (place / "ran",)

    out = stopped("train", place)
    for checkpoint in (out / "checkpoint").iterdir():
        (checkpoint / name).write_bytes(pickle.dumps(Evil()))
        if name != "checksums.json":
            resealed(checkpoint)
    if name == ".metadata":
        run("train", place, out)  # which nothing reads
    else:
        with pytest.raises(OutputError, match=r"no checkpoint of (this run|.* is whole)"):
            run("train", place, out)
    assert not (place / "ran").exists()


@pytest.mark.parametrize("change", ["shape", "dtype", "missing", "more"])
def test_another_models_checkpoint_is_named(change: str, place: Path) -> None:
    out = stopped("tune", place)
    file = out / "checkpoint" / "step-00000006" / "00000.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    if change == "shape":
        tensors[name] = tensors[name][:1].clone()
    elif change == "dtype":
        tensors[name] = tensors[name].to(torch.bfloat16)
    elif change == "missing":
        del tensors[name]
    else:
        tensors["more"] = torch.zeros(1)
    save_file(tensors, file)
    resealed(file.parent)
    with pytest.raises(OutputError, match="is no checkpoint of this run"):
        run("tune", place, out)
