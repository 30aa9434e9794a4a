"""Caches and files appear whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from moefy import storage
from moefy.errors import OutputError
from moefy.storage import (
    cache_folder,
    cached_folder,
    check_place,
    file_sha256,
    known_sha256,
    read_records,
    replace_file,
)


def test_a_cache_is_filled_whole_or_not_at_all(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "model"
    with pytest.raises(FileNotFoundError), cached_folder(cache) as folder:
        (folder / "missing").read_text()
    assert list(cache.parent.iterdir()) == []
    with cached_folder(cache) as folder:
        (folder / "weights").write_text("first")
        with cached_folder(cache.with_name("other")) as other:
            (other / "weights").write_text("other")
    assert (cache / "weights").read_text() == "first"
    with cached_folder(cache) as folder:  # a process that was slower than the first one
        (folder / "weights").write_text("second")
    assert (cache / "weights").read_text() == "first"
    assert sorted(file.name for file in cache.parent.iterdir()) == ["model", "other"]


def test_what_cannot_be_replaced_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for out in (Path(), Path(".."), Path("/proc")):
        with pytest.raises(OutputError, match="name a folder in it"):
            check_place(out)


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "log.jsonl"
    replace_file(file, '{"step": 1}\n')
    replace_file(file, '{"step": 2}\n')
    assert read_records(file, dict[str, int]) == [{"step": 2}]
    assert list(tmp_path.iterdir()) == [file]
    replace_file(file, "[]\n")
    with pytest.raises(OutputError, match=r"log\.jsonl, line 1 is damaged \(JSON: .*remove"):
        read_records(file, dict[str, int])


def test_the_cache_can_be_moved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEFY_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("MOEFY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_folder() == Path("/x/moefy")


def test_the_sum_of_a_file_is_kept_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEFY_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "weights"
    file.write_bytes(b"a" * (2 << 20))
    first = known_sha256(file)
    assert first == file_sha256(file)
    assert not (tmp_path / "cache").exists()  # it may change within the disk's tick
    monkeypatch.setattr(storage, "_SETTLED_NS", 0)
    assert known_sha256(file) == first
    monkeypatch.setattr(storage, "file_sha256", lambda path: "hashed again")
    assert known_sha256(file) == first
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    file.write_bytes(b"b" * (2 << 20))
    os.utime(file, ns=times)  # same size, same time
    assert known_sha256(file) == "hashed again"
