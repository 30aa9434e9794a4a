"""Files and caches that appear whole or not at all, and errors of the disk in our words."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError

from moefy.errors import MoefyError, OutputError, StorageError

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows has no such locks: there two processes are not kept apart
    fcntl = None

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_LARGE_BYTES = 1 << 20  # smaller files are hashed as fast as their sum is looked up
_SETTLED_NS = 2_000_000_000
_HOLDER = {"pid", "host", "since"}
_BAD_NAME = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EISDIR}


def cache_folder() -> Path:
    """Return the folder for fetched and derived files: $MOEFY_CACHE, else the user's cache."""
    if chosen := os.environ.get("MOEFY_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "moefy"


def digest(content: Any) -> str:
    """Return a short hash of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, kept in moefy's cache until the file changes."""
    seen = _state(path)
    kept = cache_folder() / "sums" / digest([str(path.resolve()), *seen])
    with suppress(OSError):
        return kept.read_text(encoding="ascii")
    found, now = file_sha256(path), time.time_ns()
    # a file that was just written may change again within one tick of the disk's clock
    if _state(path) == seen and now - max(seen[3:]) > _SETTLED_NS and seen[0] > _LARGE_BYTES:
        with suppress(OSError, StorageError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            replace_file(kept, found)
    return found


def _state(path: Path) -> list[int]:
    """Return what a change of a file's content changes."""
    found = path.stat()
    return [found.st_size, found.st_dev, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def changed_settings(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Say of each key that differs what it was and what it is now, a SHA-256 last."""
    return [
        f"{key}: was {found.get(key)!r}, now {wanted.get(key)!r}"
        for key in sorted({*found, *wanted}, key=lambda key: (len(str(wanted.get(key))), key))
        if found.get(key) != wanted.get(key)
    ]


@contextmanager
def cached_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to fill; on success it becomes `folder` of a cache, if there is none yet."""
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


def replace_file(path: Path, content: str | bytes) -> None:
    """Write a file so that readers see the old content or the new one."""
    partial = path.with_name(f".{path.name}.partial-{socket.gethostname()}-{os.getpid()}")
    with storage_errors(path):
        try:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
            sync(partial)
            partial.replace(path)
            sync(path.parent)
        finally:
            partial.unlink(missing_ok=True)


def read_json(file: Path, shape: Any, remedy: str, *, error: type[MoefyError] = OutputError) -> Any:
    """Read a JSON file that moefy has written, and that anybody may have changed since.

    `shape` is a type as pydantic takes them; where the file is damaged, `error` ends with `remedy`.
    """
    return parse_json(file.read_bytes(), shape, str(file), remedy, error)


def read_records(file: Path, shape: Any) -> list[Any]:
    """Read a file of one JSON value a line, as `read_json` does; none where there is no file."""
    lines = file.read_bytes().splitlines() if file.exists() else []
    remedy = "remove the line, or choose another folder"
    return [
        parse_json(line, shape, f"{file}, line {number}", remedy, OutputError)
        for number, line in enumerate(lines, start=1)
    ]


def parse_json(content: bytes, shape: Any, where: str, remedy: str, error: type[MoefyError]) -> Any:
    """Return JSON as a type that pydantic takes; `where` and `remedy` are for the error."""
    try:
        # strict: a text where a number was written is damage
        return TypeAdapter(shape).validate_json(content, strict=True)
    except ValidationError as found:
        first = found.errors()[0]
        key = ".".join(map(str, first["loc"])) or "JSON"
        raise error(f"{where} is damaged ({key[:100]}: {first['msg']}): {remedy}") from found


def write_records(file: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line, the file whole."""
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
        if error.errno in _BAD_NAME:
            raise OutputError(f"{out} cannot be written: {error.strerror}") from error
        raise
    except Exception as error:
        # safetensors and torch report operating system errors as text only
        text = str(error)
        if "No space left" in text or "File too large" in text or "PytorchStreamWriter" in text:
            raise StorageError(_full(out)) from error
        raise


def _full(out: Path) -> str:
    return f"the disk filled up while {out} was written: free some space, and run it again"


def sync_files(folder: Path) -> None:
    """Wait until all files in a folder are on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            sync(file)
    sync(folder)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if fcntl is None:  # Windows opens no folders, and syncs no file that is open to be read
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(handle)
    finally:
        os.close(handle)


class Lock:
    """An exclusive lock on an output, held by a file beside it until `release` or the process ends.

    Attributes:
        notes: what the lock's file says besides its holder; a killed holder's are handed on.

    Raises:
        OutputError: another process holds it, or the file is none of moefy's.
    """

    def __init__(self, out: Path) -> None:
        self._out, self._file = out, out.with_name(f".{out.name}.lock")
        # Folders above OUT that are made for the lock go away again if nothing is written.
        self._made = [parent for parent in out.parents if not parent.exists()]
        with storage_errors(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            while True:
                # a link planted there must not lead the lock to another file
                how = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
                self._handle = os.open(self._file, how, 0o644)
                self._take(out)
                # The holder before us may have removed the file between our two calls.
                with suppress(FileNotFoundError):
                    if os.path.samestat(self._file.stat(), os.fstat(self._handle)):
                        break
                os.close(self._handle)
            self.notes = self._left()
            try:
                self.note()
            except OSError:  # the disk is full
                self.release()
                raise

    def _take(self, out: Path) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = self._content()[:300]
            os.close(self._handle)
            raise OutputError(
                f"another process is writing {out} ({holder}): wait until it ends, or choose "
                "another folder"
            ) from None
        except OSError:
            return  # a network file system without locks

    def _content(self) -> str:
        os.lseek(self._handle, 0, os.SEEK_SET)  # Windows has no pread
        return os.read(self._handle, 4096).decode(errors="replace")

    def _left(self) -> dict[str, Any]:
        """Return the notes of a holder that was killed."""
        content = self._content()
        if not content:
            return {}
        try:
            # a kill between writing and cutting leaves the end of longer notes behind these
            left = json.JSONDecoder().raw_decode(content)[0]
            return {key: left[key] for key in left.keys() - _HOLDER} if left["pid"] else {}
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            os.close(self._handle)
            raise OutputError(
                f"{self._file} is no lock of moefy's: move it away, or choose another folder"
            ) from None

    def note(self, **notes: Any) -> None:
        """Say in the lock's file who holds it, and what a call after a kill should know."""
        self.notes |= notes
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since, **self.notes}
        content = json.dumps(holder).encode()
        os.lseek(self._handle, 0, os.SEEK_SET)
        os.write(self._handle, content)
        os.truncate(self._handle, len(content))

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if fcntl is None:  # Windows removes no open file
            os.close(self._handle)
        self._file.unlink(missing_ok=True)
        if fcntl is not None:
            os.close(self._handle)  # from here on others may take the lock
        if not self._out.exists():
            for parent in self._made:
                with suppress(OSError):  # somebody else put files there
                    parent.rmdir()


def check_place(out: Path, sources: Iterable[Path] = ()) -> None:
    """Raise OutputError for a path that cannot become a folder of ours.

    It is a file, a link, a mount point or has no name, lies below a file, or holds a source.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise OutputError(f"{out} exists and is not a plain folder: choose another output folder")
    if out.name in {"", ".."} or os.path.ismount(out):
        raise OutputError(
            f"{out} cannot be replaced as a whole, which is how outputs appear: name a folder in it"
        )
    above = next(parent for parent in out.parents if parent.exists())
    if not above.is_dir():
        raise OutputError(f"{above} is a file, so {out} cannot lie in it: choose another folder")
    resolved = out.resolve()
    for source in sources:
        if source.exists() and resolved in (source.resolve(), *source.resolve().parents):
            raise OutputError(
                f"the output {out} would replace its own source {source}: choose another folder"
            )


@contextmanager
def whole_file(
    out: Path, *, overwrite: bool = False, sources: Iterable[Path] = ()
) -> Iterator[Path]:
    """Give a path to write a file at; on success it becomes `out`, on any error it vanishes.

    Raises:
        OutputError: `out` exists and `overwrite` is not set, is a folder or a source, or another
            process writes it.
    """
    partial = out.with_name(f".{out.name}.next")
    with storage_errors(out):
        if any(source.exists() and out.resolve() == source.resolve() for source in sources):
            raise OutputError(f"the output {out} would replace its own source: choose another file")
        if not partial.is_file():  # a killed call's, which shows that the place is right
            check_place(partial)
    lock = Lock(out)
    try:
        partial.unlink(missing_ok=True)
        # A call that was killed behind its last step noted the file that it put in place.
        inode = out.stat().st_ino if out.is_file() else None
        is_ours = inode is not None and inode == lock.notes.get("inode")
        if out.is_dir() or (out.exists() and not overwrite and not is_ours):
            what = "is a folder" if out.is_dir() else "exists"
            raise OutputError(
                f"{out} {what}: choose another file" + " or pass --overwrite" * (not out.is_dir())
            )
        with storage_errors(out):
            yield partial
            sync(partial)
            lock.note(inode=partial.stat().st_ino)
            partial.replace(out)
            sync(out.parent)
    finally:
        partial.unlink(missing_ok=True)
        lock.release()


_OPENING = (
    *(yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken),
    *(yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken),
)
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
_DEEPEST = 20


def load_yaml(text: str) -> Any:
    """Return what a stranger's YAML holds; YAMLError names what is wrong with it."""
    depth = 0
    for token in yaml.scan(text):
        depth += isinstance(token, _OPENING) - isinstance(token, _CLOSING)
        # aliases of aliases become gigabytes, and seconds grow with the square of the depth
        if isinstance(token, yaml.AliasToken) or depth > _DEEPEST:
            raise yaml.YAMLError(f"an alias (*name), or nested over {_DEEPEST} deep: write it out")
    return yaml.safe_load(text)
