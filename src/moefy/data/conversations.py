"""Conversations out of jsonl files and datasets; what is broken in them is named, never hidden."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefy.data.domains import HELD_OUT_ONE_IN, HUB, dataset_rows
from moefy.data.jsonl import ENDINGS, lines
from moefy.errors import CorpusError

Message = dict[str, str]
"""`{"role": "system" | "user" | "assistant", "content": text}`, as chat templates take it."""

_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
}


@dataclass(frozen=True)
class Conversation:
    """A whole conversation.

    Attributes:
        where: file and line, or dataset and row.
        messages: possibly a system message, then user and assistant in turn.
    """

    where: str
    messages: list[Message]

    @property
    def is_held_out(self) -> bool:
        """Whether it is kept out of training: one in twenty, chosen by what the user says first.

        Other answers to the same opening are always on the same side.
        """
        opening = next(m["content"] for m in self.messages if m["role"] == "user")
        digest = hashlib.sha256(opening.encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def read_conversations(data: str | Path) -> tuple[list[Conversation], list[str]]:
    """Return a corpus' conversations, and a line about each one that is broken.

    Args:
        data: a `.jsonl(.gz, .zst)` file, a folder of such files, or `hf:NAME[:CONFIG]`, the
            training split of a Hugging Face dataset. Each line is an object with `messages`
            (`role` and `content`) or `conversations` (ShareGPT's `from` and `value`).

    Raises:
        CorpusError: there is no such corpus, a file is damaged, or no conversation is whole.
    """
    whole, broken = [], []
    for where, content in _records(data):
        try:
            record = json.loads(content) if isinstance(content, bytes) else content
            whole.append(Conversation(where, _messages_of(record)))
        except (ValueError, RecursionError) as error:
            broken.append(f"{where}: {' '.join(str(error).split())}")
    if not whole:
        example = f"; {broken[0]}" if broken else ""
        raise CorpusError(
            f"{data} holds no whole conversation in {len(broken):,} lines{example}. A line is an "
            'object with "messages" (role, content) or "conversations" (from, value)'
        )
    return whole, broken


def _records(data: str | Path) -> Iterator[tuple[str, bytes | dict[str, Any]]]:
    if str(data).startswith(HUB):
        name, _, config = str(data).removeprefix(HUB).partition(":")
        for number, row in enumerate(dataset_rows(name, config or None), start=1):
            yield f"{data}, row {number}", row
        return
    for file in _files(Path(data).expanduser()):
        for number, line in enumerate(lines(file), start=1):
            if line.strip():
                yield f"{file}, line {number}", line


def _files(path: Path) -> list[Path]:
    endings = tuple(f".jsonl{ending}" for ending in ENDINGS)
    if path.is_file() and path.name.endswith(endings):
        return [path]
    found = sorted(f for f in path.glob("*") if f.is_file() and f.name.endswith(endings))
    if not found:
        raise CorpusError(
            f"{path} is no {', '.join(endings)} file and no folder that holds one: name the "
            f"conversations' file or folder, or {HUB}DATASET"
        )
    return found


def _messages_of(record: Any) -> list[Message]:
    """Return a record's messages.

    Raises:
        ValueError: it is no whole conversation; the message says why.
    """
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    turns = record.get("messages") or record.get("conversations")
    if not (isinstance(turns, list) and turns):
        raise ValueError(
            'no list "messages" or "conversations", or an empty one, only '
            + ", ".join(sorted(map(repr, record)))
        )
    messages = [_message(number, turn) for number, turn in enumerate(turns, start=1)]
    spoken = messages[1:] if messages[0]["role"] == "system" else messages
    for number, message in enumerate(spoken):
        expected = "assistant" if number % 2 else "user"
        if message["role"] != expected:
            place = number + 1 + len(messages) - len(spoken)
            raise ValueError(f"message {place} is {message['role']}'s, not {expected}'s")
    if len(spoken) < 2:
        raise ValueError("the assistant never speaks")
    return messages


def _message(number: int, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"message {number} is not a JSON object")
    speaker = turn.get("role", turn.get("from"))
    text = turn.get("content", turn.get("value"))
    if not (isinstance(speaker, str) and speaker in _ROLES):
        raise ValueError(f"message {number} is from {speaker!r}, not from {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise ValueError(f"message {number} has no text")
    if not text.strip():
        raise ValueError(f"message {number} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"message {number} is no valid Unicode ({error.reason})") from error
    return {"role": _ROLES[speaker], "content": text}
