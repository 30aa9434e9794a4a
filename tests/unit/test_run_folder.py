"""An output folder has one writer, knows its own files, and survives a kill at any moment."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
from tests.kills import killed_at

from moefy.errors import OutputError, StorageError
from moefy.run_folder import MARKER, RunFolder, read_marker
from moefy.storage import whole_file

IDENTITY = {"seed": 0}


def one_shot(out: Path, *, overwrite: bool = False, content: str = "weights") -> None:
    with RunFolder(out, "model", overwrite=overwrite) as run:
        if run.begin(IDENTITY | {"content": content}):
            return
        (run.work / "sub").mkdir()
        (run.work / "sub" / "weights").write_text(content)
        run.finish()


def steps(out: Path, *, overwrite: bool = False, content: str = "x") -> None:
    """Write a line a step, go on after the last whole one, and publish a model at the end."""
    own = ("log", "figure.png")
    with RunFolder(
        out, "model", overwrite=overwrite, resumes=True, own=own, scratch=("checkpoint", "ready")
    ) as run:
        run.begin(IDENTITY | {"content": content})
        if run.was_finished:
            return
        checkpoint = run.work / "checkpoint"
        checkpoint.mkdir(exist_ok=True)
        first = len(list(checkpoint.iterdir()))
        for step in range(first, 3):
            (run.work / "log").write_text(content * (step + 1))
            (checkpoint / str(step)).write_text("state")
        ready = run.work / "ready"
        ready.mkdir(exist_ok=True)
        for name in ("config.json", "weights"):
            (ready / name).write_text(content)
        run.publish(ready)
        (run.work / "figure.png").write_text("figure")
        run.finish()


def content_of(folder: Path) -> dict[str, str]:
    files = (file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.read_text() for file in files}


@pytest.mark.parametrize("write", [one_shot, steps])
@pytest.mark.parametrize("replaces", [False, True])
def test_the_same_command_goes_on_after_a_kill_at_any_event(
    tmp_path: Path, write: Callable[..., None], replaces: bool
) -> None:
    expected = tmp_path / "expected"
    write(expected, content="new")
    for event_idx in range(1000):
        out = tmp_path / str(event_idx) / "out"
        if replaces:
            write(out, content="old")
        again = partial(write, out, overwrite=replaces, content="new")
        if not killed_at(event_idx, again):
            break
        if replaces:  # the old one is there whole until the new one is
            assert out.is_dir() or (out.parent / ".out.old").is_dir()
        again()
        assert content_of(out) == content_of(expected), event_idx
        assert [file.name for file in out.parent.iterdir()] == ["out"], event_idx
    assert event_idx > 5


def test_a_second_process_is_refused_and_told_who_writes(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "out", "model"):
        child = os.fork()
        if child == 0:
            try:
                one_shot(tmp_path / "out")
            except OutputError as error:
                os._exit(7 if f'"pid": {os.getppid()}' in str(error) else 8)
            os._exit(9)
        assert os.WEXITSTATUS(os.waitpid(child, 0)[1]) == 7
    one_shot(tmp_path / "out")
    assert content_of(tmp_path / "out").keys() == {"sub/weights", MARKER}


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunFolder(out, "model") as run:
        run.begin(IDENTITY)
        out.mkdir()
        (out / "thesis.txt").write_text("mine")
        with pytest.raises(OutputError, match="somebody else"):
            run.finish()
    assert (out / "thesis.txt").read_text() == "mine"


def test_overwrite_removes_what_the_marker_lists_and_nothing_else(tmp_path: Path) -> None:
    out = tmp_path / "out"
    steps(out)
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.txt beside a model"):
        steps(out, overwrite=True)
    (out / "thesis.txt").unlink()
    steps(out, overwrite=True, content="new")
    assert content_of(out)["weights"] == "new"
    with pytest.raises(OutputError, match="holds a model, so --overwrite"):
        RunFolder(out, "corpus", overwrite=True).__enter__()


def test_a_file_of_the_users_in_a_running_folder_is_not_called_moefys(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunFolder(out, "model", resumes=True, own=("log",)) as run:
        run.begin(IDENTITY)
        (out / "log").write_text("line")
        (out / "thesis.txt").write_text("mine")
        run.finish()
    marker = read_marker(out)
    assert marker is not None
    assert marker.files == ["log"]


def test_an_unfinished_run_of_other_settings_is_named(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with RunFolder(out, "model", resumes=True) as run:
        run.begin({"seed": 0, "rate": 1})
    with (
        pytest.raises(OutputError, match=r"unfinished model .*seed: was 0, now 1"),
        RunFolder(out, "model", resumes=True) as run,
    ):
        run.begin({"seed": 1, "rate": 1})
    with RunFolder(out, "model", resumes=True) as run:
        assert run.begin({"seed": 0, "rate": 1})
    with RunFolder(out, "model", resumes=True, overwrite=True) as run:
        assert not run.begin({"seed": 1})


def test_a_finished_folder_is_reopened_by_its_own_kind_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for expected in (False, True, True):
        with RunFolder(out, "study", resumes=True, reopens=True) as run:
            assert run.begin(IDENTITY) is expected
            run.finish()
    with pytest.raises(OutputError, match="holds a finished study"):
        steps(out)


def test_a_finished_folder_that_reopens_is_begun_anew_on_request(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for seed, overwrite in ((0, False), (1, True), (1, True)):
        with RunFolder(out, "study", resumes=True, reopens=True, overwrite=overwrite) as run:
            assert not run.begin({"seed": seed})
            assert not (run.work / "row").exists()
            assert (out / "row").exists() is overwrite  # it stays until the new one is whole
            (run.work / "row").write_text(str(seed))
            run.finish()
        assert (out / "row").read_text() == str(seed)
    with (
        pytest.raises(OutputError, match=r"seed: was 1, now 2.* or --overwrite to start again"),
        RunFolder(out, "study", resumes=True, reopens=True) as run,
    ):
        run.begin({"seed": 2})


def rows(out: Path, *, overwrite: bool = False, row: str = "x") -> None:
    with RunFolder(out, "study", resumes=True, reopens=True, overwrite=overwrite) as run:
        run.begin(IDENTITY)
        with (run.work / "rows").open("a") as file:
            file.write(row)
        run.finish()


def test_overwrite_begins_anew_wherever_an_earlier_call_was_killed(tmp_path: Path) -> None:
    for event_idx in range(100):
        out = tmp_path / str(event_idx) / "out"
        if not killed_at(event_idx, partial(rows, out, row="old")):
            break
        rows(out, overwrite=True, row="new")
        assert (out / "rows").read_text() == "new", event_idx
    assert event_idx > 5


@pytest.mark.parametrize("name", ["log", "checkpoint", "checkpoint/0", ".moefy.json"])
def test_a_link_in_an_unfinished_run_is_not_followed(tmp_path: Path, name: str) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    with RunFolder(out, "model", resumes=True, own=("log",), scratch=("checkpoint",)) as run:
        run.begin(IDENTITY | {"content": "x"})
        (run.work / "checkpoint").mkdir()
    outside.mkdir()
    (outside / "file").write_text("mine")
    target = outside / "file"
    if name == "checkpoint":
        (out / name).rmdir()
        target = outside
    elif name == MARKER:
        target.write_bytes((out / name).read_bytes())
        (out / name).unlink()
    before = content_of(outside)
    (out / name).symlink_to(target)
    for overwrite in (False, True):
        with suppress(OutputError):
            steps(out, overwrite=overwrite)
        assert content_of(outside) == before


@pytest.mark.parametrize("suffix", ["lock", "next", "old", "trash"])
def test_what_is_not_moefys_beside_an_output_is_kept(tmp_path: Path, suffix: str) -> None:
    place = tmp_path / f".out.{suffix}"
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    if suffix == "lock":
        place.write_text("mine")
    else:
        place.mkdir()
        (place / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"move it away"):
        one_shot(tmp_path / "out")
    kept = place if suffix == "lock" else place / "thesis.txt"
    assert kept.read_text() == "mine"
    kept.unlink()
    if place.is_dir():
        place.rmdir()
    place.symlink_to(mine / "thesis.txt" if suffix == "lock" else mine)
    with pytest.raises(OutputError, match=r"Too many levels|is a link"):
        one_shot(tmp_path / "out")
    assert content_of(mine) == {"thesis.txt": "mine"}


@pytest.mark.parametrize("content", ["", "{", '{"kind": "model"}', "[" * 100_000])
def test_a_damaged_marker_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(OutputError, match=r"\.moefy\.json is damaged"):
        read_marker(tmp_path)


def test_places_that_cannot_be_an_output(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    for place, message in {
        tmp_path / "file": "not a plain folder",
        tmp_path / "file" / "out": "is a file",
        tmp_path / "link": "not a plain folder",
        Path("/"): "name a folder in it",
        tmp_path / ("x" * 300): "File name too long",
    }.items():
        with pytest.raises(OutputError, match=message):
            one_shot(place)
    with pytest.raises(OutputError, match="its own source"):
        RunFolder(tmp_path, "model", sources=(tmp_path / "file",)).__enter__()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "link"]


def test_nothing_is_left_where_the_work_fails(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "new" / "out", "model") as run:
        run.begin(IDENTITY)
        with pytest.raises(StorageError, match="GB free"):
            run.require_bytes(10**18)
    assert list(tmp_path.iterdir()) == []


def test_a_file_appears_whole(tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    with suppress(ValueError), whole_file(out) as file:
        file.write_text("half")
        raise ValueError
    assert list(tmp_path.iterdir()) == []
    with whole_file(out) as file:
        file.write_text("whole")
    with pytest.raises(OutputError, match="pass --overwrite"), whole_file(out):
        pass
    with whole_file(out, overwrite=True) as file:
        file.write_text("new")
    assert out.read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_goes_on_after_a_kill_at_any_event(tmp_path: Path) -> None:
    def write(out: Path) -> None:
        with whole_file(out) as file:
            file.write_text("whole")

    for event_idx in range(100):
        out = tmp_path / str(event_idx) / "file"
        if not killed_at(event_idx, partial(write, out)):
            break
        write(out)
        assert content_of(out.parent) == {"file": "whole"}, event_idx
        with pytest.raises(OutputError, match="exists: choose another file"):
            write(out)
    assert event_idx > 3
