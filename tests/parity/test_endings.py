"""What can fail behind the last step is tried before the first one, or mended and said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import make_place
from transformers import AutoModelForCausalLM

import moefy
from moefy.errors import CheckpointError, StorageError, UsageError
from moefy.progress import Progress

SHORT: dict[str, Any] = {
    "sequence_length": 128,
    "epochs": 1,
    "global_batch_size": 16,
    "checkpoint_every_steps": 0,
}
# Llama-2-chat's: temperature and top_p mean nothing where nothing is sampled
GENERATION = {"do_sample": False, "temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return make_place(tmp_path)


def tune(place: Path, out: str, *, model: str = "dense", **options: Any) -> Any:
    return moefy.tune(place / model, place / out, data=place / "talks.jsonl", **SHORT | options)


def change(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_generation_config_that_transformers_does_not_save(place: Path) -> None:
    (place / "dense" / "generation_config.json").write_text(json.dumps(GENERATION))
    told: list[Progress] = []
    tune(place, "out", report=told.append)
    notes = [progress.note for progress in told if "generation" in progress.stage]
    assert notes == ["without temperature, top_p: they mean nothing beside its other keys"]
    network = AutoModelForCausalLM.from_pretrained(place / "out")
    network.generation_config.max_length = 7
    network.save_pretrained(place / "again")
    found = json.loads((place / "out" / "generation_config.json").read_text())
    assert found == {"do_sample": False, "eos_token_id": [2, 256]}


@pytest.mark.parametrize("stage", ["train", "tune"])
def test_a_source_that_disappears_while_it_is_trained(stage: str, place: Path) -> None:
    def run(out: str, report: Callable[[Progress], None]) -> bytes:
        if stage == "tune":
            tune(place, out, model="moe", report=report)
        else:
            sizes = {"tokens": 256, "sequence_length": 64}
            data = place / "text"
            moefy.train(place / "moe", place / out, data=data, report=report, **sizes)  # type: ignore[arg-type]
        files = [file for file in (place / out).iterdir() if file.name != "log.jsonl"]
        return b"".join(file.read_bytes() for file in sorted(files))

    def remove(progress: Progress) -> None:
        if (progress.stage, progress.done) == (stage, 1):
            shutil.rmtree(place / "moe")

    assert run("whole", lambda _: None) == run("out", remove)


def test_what_would_end_a_run_is_said_before_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, error: type[UsageError] = CheckpointError) -> None:
        with pytest.raises(error, match=message):
            tune(place, "out", model="moe", report=told.append)
        assert not [progress for progress in told if progress.stage == "tune"]

    told: list[Progress] = []
    record = place / "moe" / "moefy.json"
    content = record.read_text()
    change(record, recipe={"active": 2})
    refused(r"moefy\.json is damaged \(recipe\.experts: Field required\): copy it again")
    record.write_text("[" * 100_000)
    refused("moefy.json is not valid JSON")
    record.write_text(content)
    change(place / "moe" / "config.json", dtype="float33", torch_dtype=None)
    refused("float33")
    change(place / "moe" / "config.json", dtype="float32")
    free = shutil.disk_usage(place)._replace(free=10_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    refused(r"needs 0\.00 GB and the disk has 0\.00 GB free", StorageError)
