"""The folder that a command writes: one owner, one marker, one atomic end.

OUT/.moefy.json     marker: kind, state, identity, own files
.OUT.lock           held by the process that writes OUT; names it to others
.OUT.next           work of a command that cannot go on, or that will replace a finished OUT
.OUT.old            the replaced OUT, while the two swap places
.OUT.trash          an unfinished run that is being removed
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel

from moefy.errors import OutputError, StorageError, UsageError, without_secrets
from moefy.storage import (
    Lock,
    changed_settings,
    check_place,
    read_json,
    replace_file,
    storage_errors,
    sync,
    sync_files,
)

MARKER = ".moefy.json"
State = Literal["unfinished", "finished"]
Action = Literal["begin", "go on", "replace", "finish"]


class Marker(BaseModel):
    """What `OUT/.moefy.json` says of a folder."""

    kind: str  # what it holds
    state: State
    identity: dict[str, Any]  # what must be the same for an unfinished run to go on
    files: list[str]  # that moefy wrote, or of an unfinished run may write

    @property
    def what(self) -> str:
        """The folder's content for a message, as in "an unfinished model"."""
        return f"{'an' if self.state == 'unfinished' else 'a'} {self.state} {self.kind}"


def read_marker(folder: Path) -> Marker | None:
    """Return a folder's marker, None where there is none; an OutputError if it is damaged."""
    remedy = f"move {folder} away, or choose another folder"
    try:
        return read_json(folder / MARKER, Marker, remedy)
    except (FileNotFoundError, NotADirectoryError):
        return None


def foreign_files(folder: Path) -> Iterator[str]:
    """Iterate over the files that a folder's marker does not list; moefy writes no links."""
    marker = read_marker(folder)
    for file in sorted(folder.rglob("*")):
        name = file.relative_to(folder)
        ours = name == Path(MARKER) or _is_one_of(name, marker.files if marker else ())
        if file.is_symlink() or not (ours or file.is_dir()):
            yield name.as_posix()


class RunFolder:
    """The output folder of one command: who may write it, what it is, and how it appears.

    Only one process at a time holds OUT (a lock beside it). A marker, `OUT/.moefy.json`, says what
    the folder is, which files are moefy's, and with which identity the run was begun. A command
    that cannot go on (`resumes=False`) works in the hidden folder `.NAME.next` beside OUT; one that
    can works in OUT itself, or in `.NAME.next` while a finished OUT waits to be replaced.

    A kill at any moment leaves the old state, or one from which the same command goes on.

    Args:
        out: the folder.
        kind: what it will hold, in a word that messages use ("model", "corpus").
        overwrite: a finished folder of the same kind may be replaced, an unfinished one begun anew.
        sources: paths that are read; none of them may be OUT or lie in it.
        resumes: the same command goes on with what a killed one left.
        reopens: a finished folder of the same identity may be worked on again.
        own: names of what the command writes in `work` besides `scratch`, `*` for any characters; a
            folder counts with its files. A file of another name is the user's and is never deleted.
            Empty: every file in the folder is the command's.
        scratch: names of folders and files that are removed when the run is finished.
    """

    def __init__(
        self,
        out: str | Path,
        kind: str,
        *,
        overwrite: bool = False,
        sources: Iterable[str | Path] = (),
        resumes: bool = False,
        reopens: bool = False,
        own: Collection[str] = (),
        scratch: Collection[str] = (),
    ) -> None:
        self.out = Path(out).expanduser()
        self.was_finished = False
        self._kind, self._overwrite = kind, overwrite
        self._resumes, self._reopens = resumes, reopens
        self._sources = [Path(source).expanduser() for source in sources]
        self._own, self._scratch = tuple(own) or ("*",), tuple(scratch)
        self._next, self._old, self._trash = (
            self.out.parent / f".{self.out.name}.{suffix}" for suffix in ("next", "old", "trash")
        )
        self.work = self.out if resumes else self._next

    def __enter__(self) -> Self:
        """Take the folder; OutputError says who holds it, or why it must not be written."""
        with storage_errors(self.out):
            check_place(self.out, self._sources)
        self._lock = Lock(self.out)
        try:
            with storage_errors(self.out):
                self._recover()
                self._decide(None)
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Let the folder go; what a one-shot command did not finish vanishes."""
        marker = read_marker(self._next)
        if marker is not None and marker.state == "unfinished" and not self._resumes:
            shutil.rmtree(self._next, ignore_errors=True)
        self._lock.release()

    def begin(self, identity: Mapping[str, Any]) -> bool:
        """Say whether `work` holds a run of this identity (JSON values); else make it empty.

        Raises:
            OutputError: the folder holds a run of another identity.
            UsageError: the name of an input holds a secret.
        """
        told = json.dumps([identity, *map(str, self._sources)])
        if without_secrets(told) != told:
            raise UsageError(
                f"an input's name holds a password, key or token, which {self.out} would keep: "
                "download it under another name, or rename it"
            )
        identity = json.loads(told)[0]
        with storage_errors(self.out):
            action = self._decide(identity)
            self.work = self.out if self._resumes and action != "replace" else self._next
            ahead, is_new = read_marker(self._next), action in ("begin", "replace")
            is_same = ahead is not None and ahead.identity == identity
            if action == "finish" or (is_new and is_same and ahead and ahead.state == "finished"):
                self.was_finished, self.work = True, self._next if is_new else self.out
                self.finish()
                return True
            if action == "go on" or (action == "replace" and self._resumes and is_same):
                marker = read_marker(self.work)
                if marker and marker.state == "finished":
                    self._mark(self.work, "unfinished", identity)
                return True
            self._lock.note(finishing=None)
            self._clear(self.work)
            try:
                self._mark(self.work, "unfinished", identity)
            except BaseException:
                self.work.rmdir()  # without a marker nobody would know whose it is
                raise
        return False

    def _decide(self, identity: Mapping[str, Any] | None) -> Action:
        """Say what is to be done about what OUT holds, or refuse.

        The identity None is any, for a refusal before it is known.
        """
        if not (self.out.is_dir() and any(self.out.iterdir())):
            return "begin"
        marker = read_marker(self.out)
        if self._overwrite:
            self._check_removal(marker)
        if marker is None or marker.kind != self._kind:
            raise self._in_the_way(marker)
        same = identity is None or marker.identity == identity
        finishing = same and self._lock.notes.get("finishing") == self._overwrite
        goes_on = same and (self._resumes if marker.state == "unfinished" else self._reopens)
        match marker.state, self._overwrite:
            case _, False if goes_on:
                self._check_links()
                return "go on"
            case "finished", _ if finishing:
                return "finish"
            case "finished", True:
                return "replace"
            case "unfinished", True:
                return "begin" if self._resumes else "replace"
        if self._reopens or (self._resumes and marker.state == "unfinished"):
            raise self._other_settings(marker, identity or {})
        raise self._in_the_way(marker)

    def require_bytes(self, needed_bytes: int) -> None:
        """Raise StorageError where fewer bytes are free on the disk."""
        free_bytes = shutil.disk_usage(self.out.parent).free
        if needed_bytes > free_bytes:
            raise StorageError(
                f"{self.out} needs {needed_bytes / 1e9:.2f} GB and the disk has "
                f"{free_bytes / 1e9:.2f} GB free: free some space or choose a folder on another "
                "disk"
            )

    def publish(self, folder: Path) -> None:
        """Move the files of a folder in `work` into `work`, config.json last.

        The marker lists them first, so that a kill in between leaves no file that nobody owns.
        """
        with storage_errors(self.out):
            files = sorted(folder.iterdir(), key=lambda file: file.name == "config.json")
            self._own = (*self._own, *(file.name for file in files))
            marker = read_marker(self.work)
            self._mark(self.work, "unfinished", marker.identity if marker else {})
            sync_files(folder)
            mode = (self.work / MARKER).stat().st_mode & 0o777
            for file in files:
                file.chmod(mode)  # safetensors lets only the owner read what it writes
                file.replace(self.work / file.name)
            folder.rmdir()

    def finish(self) -> None:
        """Make the folder final: list its files, remove the scratch, put it in OUT's place.

        OutputError says that somebody else wrote into OUT in the meantime; both are kept.
        """
        with storage_errors(self.out):
            marker = read_marker(self.work)
            if not self.was_finished:
                sync_files(self.work)
                # The call after a kill knows by this that the run that it finds is its own.
                self._lock.note(finishing=self._overwrite)
                self._mark(self.work, "finished", marker.identity if marker else {})
            # The marker is the commit point: a kill below this line leaves a finished run.
            for name in self._scratch:
                path = self.work / name
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
            if self.work != self.out:
                self._swap()

    def _swap(self) -> None:
        if self.out.is_dir() and any(self.out.iterdir()):
            self.out.rename(self._old)
            if not self._overwrite or self._foreign(self._old):
                self._old.rename(self.out)
                raise OutputError(
                    f"{self.out} was written by somebody else in the meantime: it is kept, and the "
                    f"finished {self._kind} lies in {self._next}"
                )
        self._next.rename(self.out)
        self._remove(self._old)
        sync(self.out.parent)
        self.work = self.out

    def _recover(self) -> None:
        """Put right what a killed call left beside OUT and in it."""
        for folder in (self._next, self._old, self._trash):
            if folder.is_symlink():
                raise OutputError(f"{folder} is a link, and moefy would work in it: move it away")
        for folder in (self.out, self._next):
            # before the marker is read, whose own partial file this may be
            for file in folder.glob(f".{MARKER}.partial-*"):
                file.unlink()
            if read_marker(folder) is not None:
                for file in folder.rglob(".*.partial-*"):
                    file.unlink()
        self._remove(self._trash)
        if read_marker(self._old) is not None and not self.out.exists():
            found = read_marker(self._next)
            finished = found is not None and found.state == "finished"
            (self._next if finished else self._old).rename(self.out)
        self._remove(self._old)

    def _remove(self, folder: Path) -> None:
        """Remove a folder of moefy's, the marker last: without it nobody could tell whose it is."""
        if not folder.is_dir():
            return
        files = list(folder.iterdir())
        if files and read_marker(folder) is None:
            raise OutputError(f"{folder} is in the way and no folder of moefy's: move it away")
        for file in sorted(files, key=lambda file: file.name == MARKER):
            if file.is_dir() and not file.is_symlink():
                shutil.rmtree(file)
            else:
                file.unlink()
        folder.rmdir()

    def _check_removal(self, marker: Marker | None) -> None:
        """Refuse to overwrite what is not this command's."""
        if marker is None or marker.kind != self._kind:
            what = f"a {marker.kind}" if marker else f"files but no {self._kind} of moefy's"
            raise OutputError(
                f"{self.out} holds {what}, so --overwrite will not delete it: choose another "
                "folder or empty it yourself"
            )
        if foreign := self._foreign(self.out):
            raise OutputError(
                f"{self.out} holds {foreign} beside a {self._kind}, and --overwrite would delete "
                "it: move it away, or choose another folder"
            )

    def _check_links(self) -> None:
        """Refuse a link under a name that the command writes: it may lead anywhere."""
        for file in self.out.rglob("*"):
            name = file.relative_to(self.out)
            if file.is_symlink() and _is_one_of(name, [*self._own, *self._scratch]):
                raise OutputError(
                    f"{file} is a link, and {self._kind} files would be written where it leads: "
                    "remove it, or choose another folder"
                )

    def _in_the_way(self, marker: Marker | None) -> OutputError:
        what = f"holds {marker.what}" if marker else "exists and is not empty"
        return OutputError(f"{self.out} {what}: choose another folder or pass --overwrite")

    def _other_settings(self, marker: Marker, identity: Mapping[str, Any]) -> OutputError:
        return OutputError(
            f"{self.out} holds {marker.what} with other settings "
            f"({'; '.join(changed_settings(marker.identity, identity))}): give the same ones to "
            "continue it, or --overwrite to start again"
        )

    def _foreign(self, folder: Path) -> str | None:
        """Return a file in the folder that its marker does not list."""
        return next(foreign_files(folder), None)

    def _clear(self, folder: Path) -> None:
        """Remove an unfinished run, refusing where something else lies in its folder."""
        if folder.is_dir():
            if foreign := self._foreign(folder):
                raise OutputError(
                    f"{folder} holds {foreign}, which is not moefy's and would be deleted: move it "
                    "away, or choose another folder"
                )
            # A kill while the files are removed must not leave a folder without its marker.
            folder.rename(self._trash)
            self._remove(self._trash)
        folder.mkdir(parents=True)

    def _mark(self, folder: Path, state: State, identity: Mapping[str, Any]) -> None:
        files = [*self._own, *self._scratch]
        if state == "finished":
            names = (file.relative_to(folder) for file in folder.rglob("*") if not file.is_dir())
            files = [
                name.as_posix()
                for name in sorted(names)
                if _is_one_of(name, self._own) and name.parts[0] not in {MARKER, *self._scratch}
            ] + [*self._scratch]
        marker = Marker(kind=self._kind, state=state, identity=dict(identity), files=files)
        replace_file(folder / MARKER, marker.model_dump_json(indent=1) + "\n")


def _is_one_of(name: Path, owned: Collection[str]) -> bool:
    """Say whether a file or a folder that it lies in is owned, by itself or by a pattern."""
    names = {name.as_posix(), *(parent.as_posix() for parent in name.parents)}
    patterns = [each for each in owned if "*" in each]
    return any(each in owned or any(fnmatchcase(each, p) for p in patterns) for each in names)
