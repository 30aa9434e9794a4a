"""JSON lines out of plain, gzip and Zstandard files, in bounded memory."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from moefy.errors import CorpusError

ENDINGS = ("", ".gz", ".zst")
"""What may follow `.jsonl` in a file's name."""
_BLOCK_BYTES = 1 << 18
_BATCH_BYTES = 1 << 20
_LONGEST_LINE_BYTES = 1 << 27


class Meter:
    """What was read of a file so far, as it lies on disk: bytes, and their SHA-256."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()

    def add(self, block: bytes) -> None:
        """Count a block."""
        self.num_bytes += len(block)
        self.sha256.update(block)


def blocks(file: Path, meter: Meter) -> Iterator[bytes]:
    """Iterate over a file's content, decompressed.

    Unlike the libraries' own file objects this notices a Zstandard file that is cut off.

    Raises:
        CorpusError: the file cannot be read, is damaged or ends early.
    """
    new_frame = _decompressor(file)
    try:
        with file.open("rb") as raw:
            frame: Any = new_frame() if new_frame else None
            while block := raw.read(_BLOCK_BYTES):
                meter.add(block)
                if new_frame is None:
                    yield block
                    continue
                while block:
                    if frame.eof:
                        if not block.strip(b"\0"):  # padding, as tape archives leave it
                            break
                        frame = new_frame()
                    if content := frame.decompress(block):
                        yield content
                    block = frame.unused_data
    except OSError as error:
        raise CorpusError(f"{file} cannot be read: {error.strerror}") from error
    except Exception as error:
        if not _is_damage(error):
            raise
        raise _damaged(file, error) from error
    if frame is not None and meter.num_bytes and not frame.eof:
        raise _damaged(file, "it ends early")


def batches(content: Iterator[bytes], name: str) -> Iterator[bytes]:
    """Cut a stream into batches of whole lines, of about a MiB; the cuts are always the same.

    Raises:
        CorpusError: a line is longer than 128 MiB.
    """
    parts: list[bytes] = []
    num_bytes = 0
    for block in content:
        end = block.rfind(b"\n") + 1
        if not end or num_bytes + end < _BATCH_BYTES:
            parts.append(block)
            num_bytes += len(block)
            if num_bytes > _LONGEST_LINE_BYTES:
                raise CorpusError(
                    f"{name} has no line end in {_LONGEST_LINE_BYTES >> 20} MiB: it must hold one "
                    "JSON object per line"
                )
            continue
        yield b"".join([*parts, block[:end]])
        parts, num_bytes = [block[end:]], len(block) - end
    if num_bytes:
        yield b"".join(parts)


def lines(file: Path) -> Iterator[bytes]:
    """Iterate over a file's lines, without their ends."""
    for batch in batches(blocks(file, Meter()), str(file)):
        yield from batch.removesuffix(b"\n").split(b"\n")


def record_of(line: bytes, where: str, *, text_key: str = "text") -> tuple[dict[str, Any], str]:
    """Return a line's object and the text in it.

    Args:
        line: one JSON object.
        where: file and line number, for the message.
        text_key: where the text is; dots lead into objects.

    Raises:
        CorpusError: no JSON object, or no text that can be encoded in it.
    """
    try:
        record = json.loads(line)
        text = field(record, text_key)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorpusError(
            f"{where}: not a JSON object with a {text_key!r} ({_short(error)})"
        ) from error
    if not isinstance(text, str):
        raise CorpusError(f"{where}: {text_key!r} is not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where}: {text_key!r} is no valid Unicode ({error.reason})") from error
    return record, text


def field(record: dict[str, Any], key: str) -> Any:
    """Return the value of a key; dots lead into objects.

    Raises:
        KeyError, TypeError: there is none.
    """
    value: Any = record
    for part in key.split("."):
        value = value[part]
    return value


def _decompressor(file: Path) -> Callable[[], Any] | None:
    """Return what makes a decompressor of one frame; None for a plain file."""
    if file.suffix == ".gz":
        return partial(zlib.decompressobj, wbits=zlib.MAX_WBITS | 16)
    if file.suffix != ".zst":
        return None
    try:
        import zstandard
    except ImportError:
        raise CorpusError(
            f"{file} needs the zstandard package: pip install 'moefy[zst]', or decompress it"
        ) from None
    return lambda: zstandard.ZstdDecompressor().decompressobj()


def _is_damage(error: Exception) -> bool:
    return isinstance(error, zlib.error) or type(error).__name__ == "ZstdError"


def _damaged(file: Path, reason: object) -> CorpusError:
    return CorpusError(f"{file} is a damaged compressed file ({reason}): fetch it again")


def _short(error: Exception) -> str:
    return repr(error)[:200]
