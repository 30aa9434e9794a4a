"""Conversations out of files and datasets; what is broken in them is named, never hidden."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefy.data.records import find_sources, is_held_out
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
    """A whole conversation."""

    where: str  # file and line, or dataset and row
    messages: list[Message]  # possibly a system message, then user and assistant in turn

    @property
    def is_held_out(self) -> bool:
        """Whether it is kept out of training: one in twenty, chosen by what the user says first."""
        # other answers to the same opening are always on the same side
        return is_held_out(next(m["content"] for m in self.messages if m["role"] == "user"))


def read_conversations(data: str | Path) -> tuple[list[Conversation], list[str]]:
    """Return a corpus' conversations, and a line about each one that is broken.

    Args:
        data: a file, a folder of files, or `hf:NAME[:CONFIG]` (see `records.find_sources`). Each
            record is an object with `messages` (`role` and `content`) or `conversations`
            (ShareGPT's `from` and `value`).

    Raises:
        CorpusError: there is no such corpus, a file is damaged, or no conversation is whole.
    """
    whole, broken = [], []
    for source in find_sources(data, text_key=None):
        for where, line in source.records():
            try:
                whole.append(Conversation(where, _messages_of(json.loads(line))))
            except (ValueError, RecursionError) as error:
                broken.append(f"{where}: {' '.join(str(error).split())}")
    if not whole:
        example = f"; {broken[0]}" if broken else ""
        raise CorpusError(
            f"{data} holds no whole conversation in {len(broken):,} lines{example}. A line is an "
            'object with "messages" (role, content) or "conversations" (from, value)'
        )
    return whole, broken


def _messages_of(record: Any) -> list[Message]:
    """Return a record's messages; the ValueError of a broken conversation says why."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    turns = record.get("messages") or record.get("conversations")
    if not (isinstance(turns, list) and turns):
        raise ValueError(
            'no list "messages" or "conversations", or an empty one, only '
            + ", ".join(sorted(map(repr, record)))
        )
    messages = [_message(number, turn) for number, turn in enumerate(turns, start=1)]
    # Only then is every answer one to a question, which is what the loss is taken on.
    num_system = int(messages[0]["role"] == "system")
    for place, message in enumerate(messages[num_system:], start=1 + num_system):
        expected = "user" if (place - num_system) % 2 else "assistant"
        if message["role"] != expected:
            raise ValueError(f"message {place} is {message['role']}'s, not {expected}'s")
    if len(messages) < 2 + num_system:
        raise ValueError("the assistant never speaks")
    return messages


def _message(number: int, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"message {number} is not a JSON object")
    # A turn in OpenAI's form, else in ShareGPT's.
    speaker = turn.get("role", turn.get("from"))
    text = turn.get("content", turn.get("value"))
    if not (isinstance(speaker, str) and speaker in _ROLES):
        raise ValueError(f"message {number} is from {speaker!r}, not from {', '.join(_ROLES)}")
    if not isinstance(text, str):
        raise ValueError(f"message {number} has no text")
    if not text.strip():
        raise ValueError(f"message {number} is empty")
    try:
        text.encode()  # JSON can hold half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise ValueError(f"message {number} is no valid Unicode ({error.reason})") from error
    return {"role": _ROLES[speaker], "content": text}
