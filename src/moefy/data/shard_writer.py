"""Writing token shards so that a killed run goes on: only what was committed counts."""

from __future__ import annotations

import hashlib
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

_READ_BYTES = 1 << 20


@dataclass
class _Stream:
    """A domain's split: full shards' hashes, and the shard that grows."""

    sha256: list[str] = field(default_factory=list)
    num_bytes: int = 0
    file: IO[bytes] | None = None
    digest: Any = field(default_factory=hashlib.sha256)


class TokenWriter:
    """Appends ids to the shards of many streams.

    Every shard but a stream's last has exactly `shard_bytes`.

    Args:
        folder: to write `<domain>/<split>-NNNNN.bin` in.
        shard_bytes: size of a full shard.
        committed: what `commit` returned last; {} for a fresh folder. Whatever the files hold
            beyond that is cut off.
    """

    def __init__(self, folder: Path, *, shard_bytes: int, committed: dict[str, Any]) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._streams = {name: _Stream(**state) for name, state in committed.items()}
        kept = {self._file(name, index) for name in committed for index in self._indices(name)}
        for file in folder.glob("*/*.bin"):
            if file not in kept:
                file.unlink()
        for name, stream in self._streams.items():
            if rest := stream.num_bytes % shard_bytes:
                file = self._file(name, stream.num_bytes // shard_bytes)
                os.truncate(file, rest)
                with file.open("rb") as shard:
                    while block := shard.read(_READ_BYTES):
                        stream.digest.update(block)

    def append(self, domain: str, split: str, ids: bytes) -> None:
        """Add whole ids to a stream.

        Raises:
            OSError: the disk is full.
        """
        name = f"{domain}/{split}"
        stream = self._streams.setdefault(name, _Stream())
        rest = memoryview(ids)
        while rest:
            room = self._shard_bytes - stream.num_bytes % self._shard_bytes
            if stream.file is None:
                file = self._file(name, stream.num_bytes // self._shard_bytes)
                file.parent.mkdir(exist_ok=True)
                stream.file = file.open("ab")
            stream.file.write(rest[:room])
            stream.digest.update(rest[:room])
            stream.num_bytes += len(rest[:room])
            if len(rest) >= room:
                _close(stream.file)
                stream.sha256.append(stream.digest.hexdigest())
                stream.file, stream.digest = None, hashlib.sha256()
            rest = rest[room:]

    def commit(self) -> dict[str, Any]:
        """Bring everything to the disk and return the state to go on from."""
        for stream in self._streams.values():
            if stream.file is not None:
                _sync(stream.file)
        return {
            name: {"sha256": list(stream.sha256), "num_bytes": stream.num_bytes}
            for name, stream in sorted(self._streams.items())
        }

    def close(self) -> None:
        """Close the files; what was not committed may be lost."""
        for stream in self._streams.values():
            if stream.file is not None:
                with suppress(OSError):
                    stream.file.close()

    def shards(self) -> list[dict[str, Any]]:
        """Return domain, split, file, bytes and SHA-256 of every shard."""
        found = []
        for name, stream in sorted(self._streams.items()):
            domain, _, split = name.rpartition("/")
            for index in self._indices(name):
                full = index < len(stream.sha256)
                found.append(
                    {
                        "domain": domain,
                        "split": split,
                        "file": str(self._file(name, index).relative_to(self._folder)),
                        "bytes": self._shard_bytes
                        if full
                        else stream.num_bytes % self._shard_bytes,
                        "sha256": stream.sha256[index] if full else stream.digest.hexdigest(),
                    }
                )
        return found

    def _indices(self, name: str) -> range:
        return range(-(-self._streams[name].num_bytes // self._shard_bytes))

    def _file(self, name: str, index: int) -> Path:
        return self._folder / f"{name}-{index:05d}.bin"


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _close(file: IO[bytes]) -> None:
    _sync(file)
    file.close()
