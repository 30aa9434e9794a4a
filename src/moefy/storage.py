"""Outputs appear whole or not at all.

A folder is written beside its final place under a hidden name and renamed when it is complete, so
a crash, a kill or a full disk at any moment leaves either the old state or the new one.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from moefy.errors import OutputError, StorageError

Record = TypeVar("Record")
_MODEL_FOLDERS = {"checkpoint", "runs", "tensorboard", "wandb"}
_MODEL_ENDINGS = {
    *(".safetensors", ".bin", ".json", ".jsonl", ".model", ".jinja", ".yaml", ".npy", ".npz"),
    *(".png", ".py"),
}
_MODEL_NAMES = (
    *("LICENSE", "NOTICE", "README", "tokenizer", "chat_template", "vocab.", "merges.txt"),
    *("broken.txt", "wandb-run"),
)
"""What lies in a model's or a run's folder; for names, how they begin."""
_NO_NAMES = {"", ".."}
"""Of paths that end in no name, as "."; `check_output` refuses these."""
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_folder() -> Path:
    """Return the folder for fetched and derived files: $MOEFY_CACHE, else the user's cache."""
    if chosen := os.environ.get("MOEFY_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "moefy"


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder holds a model or an unfinished run of training.

    Raises:
        OutputError: and something else, which would be lost with it.
    """
    begun = any((folder / name).exists() for name in ("log.jsonl", "checkpoint"))
    if not (_has_config(folder) or (begun and (folder / "recipe.yaml").exists())):
        return False
    others = [file.name for file in folder.iterdir() if not _is_of_a_model(file)]
    refuse_others(folder, others, "model")
    return True


def refuse_others(folder: Path, others: Collection[str], what: str) -> None:
    """Refuse to overwrite a folder that holds more than what will be written there.

    Args:
        folder: it.
        others: names of what else it holds.
        what: it holds besides.

    Raises:
        OutputError: there are such.
    """
    if others:
        raise OutputError(
            f"{folder} holds {min(others)} beside a {what}, and --overwrite would delete it: move "
            "it away, or choose another folder"
        )


def refuse_file(out: Path) -> None:
    """Refuse a file where a folder will be written.

    Raises:
        OutputError: it is one.
    """
    if out.exists() and not out.is_dir():
        raise OutputError(f"{out} is a file: choose another output folder")


def _has_config(folder: Path) -> bool:
    try:
        return "model_type" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def _is_of_a_model(file: Path) -> bool:
    if file.name.startswith("."):
        return True
    if file.is_dir():
        return file.name in _MODEL_FOLDERS
    return file.suffix in _MODEL_ENDINGS or file.name.startswith(_MODEL_NAMES)


def check_output(
    out: Path,
    *,
    overwrite: bool,
    sources: tuple[Path, ...] = (),
    what: str = "model",
    is_one: Callable[[Path], bool] = is_model_folder,
) -> None:
    """Refuse an output folder that is in the way, before any work is done.

    Args:
        out: the folder.
        overwrite: what is in it may be replaced.
        sources: what is read.
        what: will be written.
        is_one: says whether a folder holds such a thing and nothing else.

    Raises:
        OutputError: `out` is a file, holds files and `overwrite` is not set, holds something else
            than may be replaced, or is (or contains) one of `sources`.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out} exists and is not a plain folder: choose another output folder")
    resolved = out.resolve()
    if out.name in _NO_NAMES or os.path.ismount(out):
        raise OutputError(
            f"{out} cannot be replaced as a whole, which is how outputs appear: name a folder in it"
        )
    for source in sources:
        if source.exists() and resolved in (source.resolve(), *source.resolve().parents):
            raise OutputError(
                f"the output {out} would replace its own source {source}: choose another folder"
            )
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise OutputError(
                f"{out} exists and is not empty: choose another folder or pass --overwrite"
            )
        if not is_one(out):
            raise OutputError(
                f"{out} holds files but no {what}, so --overwrite will not delete it: "
                "choose another folder or empty it yourself"
            )


def changed_settings(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say of each key that differs what it was and what it is now."""
    return [
        f"{key}: was {found.get(key)!r}, now {wanted.get(key)!r}"
        for key in sorted({*found, *wanted})
        if found.get(key) != wanted.get(key)
    ]


def check_same_settings(
    out: Path, found: Mapping[str, Any], wanted: Mapping[str, Any], *, what: str = "run"
) -> None:
    """Refuse to go on with what was begun with other settings.

    Args:
        out: where it lies.
        found: its settings.
        wanted: those that are asked for now.
        what: was begun.

    Raises:
        OutputError: they differ.
    """
    if changed := changed_settings(found, wanted):
        raise OutputError(
            f"{out} holds an unfinished {what} with other settings ({'; '.join(changed)}): give "
            "the same ones to continue it, or --overwrite to start again"
        )


def has_model(folder: Path) -> bool:
    """Return whether a folder holds a complete model."""
    return (folder / "config.json").exists()


def run_folder(out: Path, *, overwrite: bool, is_whole: Callable[[Path], bool] = has_model) -> Path:
    """Return where a run works: in `out`, or beside what it may replace there.

    The folder beside has the same name every time, so that the run can go on there; `put_in_place`
    ends it. What a kill in the middle of that left behind is put right first.

    Args:
        out: the run's folder.
        overwrite: what is in it may be replaced.
        is_whole: says whether it holds a complete result, which is kept until the new one is.
    """
    _remove_leftovers(out)
    if not overwrite or out.name in _NO_NAMES or not is_whole(out):
        return out
    return out.with_name(f".{out.name}.next")


def put_in_place(folder: Path, out: Path) -> None:
    """Let a complete folder take the place of `out`; a kill leaves one of the two there.

    Raises:
        StorageError: the place cannot be written.
    """
    if folder == out:
        return
    with storage_errors(out):
        if out.exists():
            old = out.with_name(f".{out.name}.old-{socket.gethostname()}-{os.getpid()}")
            out.rename(old)
            folder.rename(out)
            shutil.rmtree(old)
        else:
            folder.rename(out)
        sync(out.parent)


@contextmanager
def whole_folder(out: Path, *, needed_bytes: int = 0) -> Iterator[Path]:
    """Give a folder to write in; on success it becomes `out`, on any error it vanishes.

    An existing `out` is replaced (see `check_output`). What a killed process of this host left
    behind is removed first.

    Args:
        out: the final place.
        needed_bytes: what will be written, to fail before the work when it cannot fit.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
    """
    parent = out.parent
    with storage_errors(out):
        parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        free_bytes = shutil.disk_usage(parent).free
        if needed_bytes > free_bytes:
            raise StorageError(
                f"{out} needs {needed_bytes / 1e9:.2f} GB and the disk has {free_bytes / 1e9:.2f} "
                "GB free: free some space or choose a folder on another disk"
            )
        partial = parent / f".{out.name}.partial-{socket.gethostname()}-{os.getpid()}"
        partial.mkdir()
    try:
        with storage_errors(out):
            yield partial
            sync_files(partial)
            put_in_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def cached_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to fill; on success it becomes `folder` of a cache, unless another was faster.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
    """
    with storage_errors(folder):
        partial = folder.with_name(f".{folder.name}.partial-{socket.gethostname()}-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            sync_files(partial)
            # Two processes may fill the same cache: both write the same, and the first one wins.
            if not folder.exists():
                partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def replace_file(path: Path, content: str) -> None:
    """Write a text file so that readers see the old content or the new one.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial-{socket.gethostname()}-{os.getpid()}")
    with storage_errors(path):
        try:
            partial.write_text(content)
            sync(partial)
            partial.replace(path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def read_records(
    file: Path, build: Callable[[dict[str, Any]], Record], *, what: str
) -> list[Record]:
    """Read a file of one JSON object a line; none where there is no file.

    Args:
        file: in a folder that may not exist yet.
        build: makes a record of an object.
        what: a record is, for the error.

    Raises:
        OutputError: the folder is a file, or a line is no record.
    """
    refuse_file(file.parent)
    if not file.exists():
        return []
    records = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        try:
            records.append(build(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise OutputError(
                f"{file}, line {number} is no {what} of this version of moefy ({error!r}): remove "
                "the line, or choose another folder"
            ) from error
    return records


def write_records(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, the file whole.

    Raises:
        StorageError: the disk is full, or the place cannot be written.
    """
    with storage_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    replace_file(file, "".join(json.dumps(record) + "\n" for record in records))


@contextmanager
def storage_errors(out: Path) -> Iterator[None]:
    """Translate "disk full" and "permission denied", however a library reports them."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise StorageError(_full(out)) from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
            raise StorageError(
                f"{error.filename or out} cannot be written: {error.strerror}"
            ) from error
        if error.errno in {errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP}:
            raise OutputError(f"{out} cannot be written: {error.strerror}") from error
        raise
    except Exception as error:
        # safetensors and torch report operating system errors as text only
        text = str(error)
        if "No space left" in text or "File too large" in text or "PytorchStreamWriter" in text:
            raise StorageError(_full(out)) from error
        raise


def _full(out: Path) -> str:
    return f"the disk filled up while {out} was written; nothing was left behind: free some space"


def sync_files(folder: Path) -> None:
    """Wait until all files in a folder are on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            sync(file)
    sync(folder)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(handle)
    finally:
        os.close(handle)


def _remove_leftovers(out: Path) -> None:
    """Undo what a killed process left: an old output in mid-swap goes back, the rest goes away."""
    for kind in ("old", "partial"):
        mark = f".{out.name}.{kind}-{socket.gethostname()}-"
        for folder in out.parent.glob(f".{out.name}.{kind}-*"):
            pid = folder.name.removeprefix(mark)
            # in a container that is started again, the killed process had our number
            if not pid.isdigit() or (int(pid) != os.getpid() and _is_running(int(pid))):
                continue
            if kind == "old" and not out.exists():
                folder.rename(out)
            else:
                shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
