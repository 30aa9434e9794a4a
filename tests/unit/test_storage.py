"""Outputs appear whole or not at all."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from moefy.errors import OutputError, StorageError
from moefy.storage import cache_folder, check_output, put_in_place, run_folder, whole_folder


def test_an_error_leaves_the_old_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text("old")
    with pytest.raises(FileNotFoundError), whole_folder(out) as partial:  # noqa: PT012
        (partial / "config.json").write_text("new")
        (partial / "missing").read_text()
    assert (out / "config.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]
    with whole_folder(out) as partial:
        (partial / "config.json").write_text("new")
    assert (out / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_too_little_space_is_seen_before_the_work(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match="GB free"),
        whole_folder(tmp_path / "out", needed_bytes=1 << 60),
    ):
        raise AssertionError("the work began")
    assert not list(tmp_path.iterdir())


def test_leftovers_of_dead_processes_go_and_of_living_ones_stay(tmp_path: Path) -> None:
    host, dead = socket.gethostname(), 2**22 + 1  # above any Linux process id
    (tmp_path / f".out.partial-{host}-{dead}").mkdir()
    alive = tmp_path / f".out.partial-{host}-1"
    other_host = tmp_path / f".out.partial-not-{host}-{dead}"
    old = tmp_path / f".out.old-{host}-{dead}"
    # of the process before this one in a container that was started again
    own = tmp_path / f".out.partial-{host}-{os.getpid()}"
    for folder in (alive, other_host, old, own):
        folder.mkdir()
    (old / "config.json").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out"):
        raise RuntimeError
    assert set(tmp_path.iterdir()) == {alive, other_host, tmp_path / "out"}
    assert (tmp_path / "out/config.json").read_text() == "old"  # it was in mid-swap


def test_an_output_never_replaces_its_source(tmp_path: Path) -> None:
    source = tmp_path / "models" / "dense"
    source.mkdir(parents=True)
    (source / "config.json").touch()
    for out in (source, source.parent, source / ".." / "dense"):
        with pytest.raises(OutputError, match="its own source"):
            check_output(out, overwrite=True, sources=(source,))


def test_only_models_are_replaced(tmp_path: Path) -> None:
    model, study = tmp_path / "model", tmp_path / "study"
    model.mkdir()
    study.mkdir()
    (study / "recipe.yaml").touch()  # a corpus has one too
    (study / "runs.jsonl").touch()
    with pytest.raises(OutputError, match="no model"):
        check_output(study, overwrite=True)
    (model / "config.json").write_text('{"name": "something else"}')
    with pytest.raises(OutputError, match="no model"):
        check_output(model, overwrite=True)
    (model / "config.json").write_text('{"model_type": "llama"}')
    check_output(model, overwrite=True)
    (model / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"holds thesis.tex beside a model"):
        check_output(model, overwrite=True)


def test_what_cannot_be_replaced_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (Path(), Path(".."), Path("/proc")):
        run_folder(out, overwrite=True, is_whole=Path.is_dir)
        with pytest.raises(OutputError, match="name a folder in it"):
            check_output(out, overwrite=False)


def test_a_run_beside_what_it_will_replace(tmp_path: Path) -> None:
    out, beside = tmp_path / "out", tmp_path / ".out.next"
    assert run_folder(out, overwrite=True) == out
    out.mkdir()
    (out / "config.json").write_text("old")
    assert run_folder(out, overwrite=False) == out
    assert run_folder(out, overwrite=True) == beside
    assert run_folder(out, overwrite=True, is_whole=lambda _: False) == out
    beside.mkdir()
    (beside / "config.json").write_text("new")
    out.rename(tmp_path / f".out.old-{socket.gethostname()}-{2**22 + 1}")  # killed in the swap
    assert run_folder(out, overwrite=True) == beside
    assert (out / "config.json").read_text() == "old"
    put_in_place(beside, out)
    assert (out / "config.json").read_text() == "new"
    assert list(tmp_path.iterdir()) == [out]


def test_a_file_or_link_is_no_output(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(OutputError, match="not a plain folder"):
            check_output(tmp_path / name, overwrite=True)


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEFY_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("MOEFY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/moefy")
