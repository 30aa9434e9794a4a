"""Writing token shards so that a killed run goes on: only what was committed counts."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from moefy.errors import OutputError


class TokenWriter:
    """Appends ids to the shards of many streams; a stream is named DOMAIN/SIDE.

    Every shard but a stream's last has exactly `shard_bytes`.

    Args:
        folder: where `<domain>/<side>-NNNNN.bin` are written.
        shard_bytes: size of a full shard.
        sizes: bytes by stream at the last commit.
    """

    def __init__(self, folder: Path, *, shard_bytes: int, sizes: dict[str, int]) -> None:
        self.sizes = dict(sizes)
        # What was written after the last commit is cut off: its lines will be read again.
        self.folder, self._shard_bytes = folder, shard_bytes
        self._unsynced: set[Path] = set()
        for file in folder.glob("*/*-*.bin"):
            stream, _, index = file.relative_to(folder).with_suffix("").as_posix().rpartition("-")
            committed = sizes.get(stream, 0) - int(index) * shard_bytes
            if committed <= 0:
                file.unlink()
            elif committed < file.stat().st_size:
                os.truncate(file, committed)

    def append(self, stream: str, ids: bytes) -> None:
        """Add whole ids to a stream.

        Raises:
            OSError: the disk is full.
        """
        rest = memoryview(ids)
        while rest:
            size = self.sizes.get(stream, 0)
            block = rest[: self._shard_bytes - size % self._shard_bytes]
            file = self._file(stream, size // self._shard_bytes)
            file.parent.mkdir(exist_ok=True)
            # Opened for each block: a corpus of many domains would hold hundreds of files open.
            with file.open("ab") as shard:
                shard.write(block)
            self._unsynced.add(file)
            self.sizes[stream] = size + len(block)
            rest = rest[len(block) :]

    def commit(self) -> dict[str, int]:
        """Bring everything to the disk and return the sizes, which may then be written down."""
        for file in self._unsynced:
            with file.open("rb") as shard:
                os.fsync(shard.fileno())  # some file systems find only now that the disk is full
        self._unsynced.clear()
        return dict(self.sizes)

    def shards(self, itemsize: int) -> dict[str, list[dict[str, Any]]]:
        """Return, by domain, the file, split, tokens and SHA-256 of every shard, once all is done.

        Raises:
            OutputError: a shard has not the size that was written.
        """
        found: dict[str, list[dict[str, Any]]] = {}
        for stream, size in sorted(self.sizes.items()):
            domain, _, side = stream.rpartition("/")
            for start in range(0, size, self._shard_bytes):
                file = self._file(stream, start // self._shard_bytes)
                wanted = min(self._shard_bytes, size - start)
                if not file.is_file() or file.stat().st_size != wanted:
                    raise OutputError(
                        f"{file} has not the {wanted:,} bytes that were written: somebody else "
                        "changed it; start again with --overwrite"
                    )
                with file.open("rb") as content:
                    digest = hashlib.file_digest(content, "sha256")
                found.setdefault(domain, []).append(
                    {
                        "file": file.relative_to(self.folder).as_posix(),
                        "split": side,
                        "tokens": wanted // itemsize,
                        "sha256": digest.hexdigest(),
                    }
                )
        return found

    def _file(self, stream: str, index: int) -> Path:
        return self.folder / f"{stream}-{index:05d}.bin"
