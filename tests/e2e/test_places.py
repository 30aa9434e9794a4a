"""Bad places, full disks, lost inputs and two processes at once end in one line each."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.fuzz.runner import complaint, hidden
from tests.kill_trials import COMMANDS, contents, make_inputs
from tests.kills import End, Server, fill
from transformers import LlamaConfig, LlamaForCausalLM

from moefy.calibrate.walk import HiddenStates
from moefy.storage import Lock

WRITING = COMMANDS | {"demo": "demo out"}
INPUTS = {
    "convert": "dense",
    "convert, searching": "text",
    "prepare": "text",
    "train": "text",
    "tune": "talks.jsonl",
    "report": "text",
    "export gguf": "known",
    "export dense": "moe",
    "study": "text",
    "judge": "moe",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("places"))


@pytest.fixture
def run(place: Path) -> Iterator[Path]:
    """A folder two below the inputs, as the commands expect."""
    folder = place / "case" / "run"
    folder.mkdir(parents=True)
    shutil.copytree(place / "moe", folder.parent / "moe")
    yield folder
    shutil.rmtree(folder.parent)


def refusal(end: End, run: Path) -> str:
    """Return the line in which a command ended."""
    said = (run.parent / "log").read_text()
    # a lock that this process holds is no rest of the command's
    assert not complaint(end, said, hidden(run / "elsewhere")), said
    assert end.code in (1, 2), said
    return said.strip().splitlines()[-1]


def words(name: str, out: str) -> list[str]:
    return [out if word == "out" else word for word in WRITING[name].split()]


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("file/out", "file"),
        ("x" * 300, "File name too long"),
        ("/sys/out", "cannot be written: "),
    ],
)
def test_a_place_that_cannot_be_written(
    name: str, out: str, message: str, run: Path, server: Server
) -> None:
    (run / "file").touch()
    assert message in refusal(server.run(run, words(name, out)), run)
    assert [file.name for file in run.iterdir()] == ["file"]


@pytest.mark.parametrize("name", WRITING)
def test_a_second_process_is_refused_and_told_of_the_first(
    name: str, run: Path, server: Server
) -> None:
    lock = Lock(run / "out")
    before = contents(run)
    said = refusal(server.run(run, WRITING[name]), run)
    assert f'another process is writing out ({{"pid": {os.getpid()}' in said
    assert contents(run) == before
    lock.release()


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("file_bytes", [300, 20_000])
def test_a_disk_that_fills(name: str, file_bytes: int, run: Path, server: Server) -> None:
    # a limit on each file's size is what a process can be given without a disk of its own
    end = server.run(run, WRITING[name], limits={"RLIMIT_FSIZE": file_bytes})
    if end.code == 0:  # none of its files is so large
        return
    said = refusal(end, run)
    assert "disk filled up" in said or "File too large" in said, said
    again = server.run(run, WRITING[name])
    assert again.code == 0, (run.parent / "log").read_text()


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("read_idx", [0, 1, 3])
def test_an_input_that_disappears(name: str, read_idx: int, run: Path, server: Server) -> None:
    source = run.parents[1] / INPUTS[name]
    end = server.run(run, WRITING[name], loses=(source, read_idx))
    lost = source.with_name(f"{source.name} lost")
    if lost.exists():
        lost.rename(source)
    if end.code != 0:  # else it was read whole before
        assert INPUTS[name].partition(".")[0] in refusal(end, run)


@pytest.fixture(scope="module")
def long(place: Path) -> Path:
    """A model of 20 layers in shards."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=257, num_hidden_layers=20, **shape)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(place / "long", max_shard_size="100KB")
    for file in (place / "dense").glob("tokenizer*"):
        shutil.copy(file, place / "long")
    return place / "long"


@pytest.fixture
def disk(run: Path) -> Iterator[Path]:
    """The folder `run` as a small disk of its own."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(run)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted: {mounted.stderr}")
    yield run
    subprocess.run(["umount", "--lazy", str(run)], check=True)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("free_bytes", [0, 12_000, 60_000])
def test_a_small_disk(name: str, free_bytes: int, disk: Path, server: Server) -> None:
    fill(disk, free_bytes)
    end = server.run(disk, WRITING[name])
    if end.code == 0:  # it needs less
        return
    assert "disk" in refusal(end, disk)
    assert not hidden(disk)
    (disk / "filler").unlink()
    assert server.run(disk, WRITING[name]).code == 0, (disk.parent / "log").read_text()


@pytest.mark.parametrize("when", ["before", "during"])
def test_a_conversion_on_a_disk_that_fills(
    when: str, long: Path, disk: Path, server: Server
) -> None:
    """The disk is full at every tenth of what is written."""
    command, source = WRITING["convert"].replace("dense", "long"), contents(long)
    assert server.run(disk, command).code == 0
    expected = contents(disk)
    whole_bytes = sum(file.stat().st_size for file in (disk / "out").iterdir())
    for tenth in range(10):
        shutil.rmtree(disk / "out")
        free_bytes = whole_bytes * tenth // 10
        if when == "before":
            fill(disk, free_bytes)
            end = server.run(disk, command)
        else:  # another program writes meanwhile
            end = server.run(disk, command, fills=("shard-00001.partial", free_bytes))
        (disk / "filler").unlink()
        said = refusal(end, disk)
        assert "the disk filled up" in said or "the disk has 0.00 GB free" in said
        assert contents(disk) == {}, (tenth, said)
        assert contents(long) == source
        assert server.run(disk, command).code == 0
        assert contents(disk) == expected


def test_hidden_states_that_the_disk_cannot_hold(
    disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moefy.calibrate.walk._IN_MEMORY_BYTES", 0)
    fill(disk, 4096)
    with pytest.raises(OSError, match="No space left"):
        HiddenStates(1 << 10, 32, disk)
