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

# What a template could be given, but is not; dropped in silence, the model would learn answers to
# questions that it does not see.
_NOT_READ = ("tools", "functions", "documents", "history", "chat_template_kwargs")
_NOT_READ_OF_MESSAGE = (
    *("tool_calls", "function_call", "tool_call_id"),
    *("reasoning_content", "reasoning", "thinking", "audio", "refusal"),
)

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
    unlearned: frozenset[int] = frozenset()  # the answers that are only read, by their place

    @property
    def is_held_out(self) -> bool:
        """Whether it is kept out of training: one in twenty, chosen by what the user says first."""
        # other answers to the same opening are always on the same side
        return is_held_out(next(m["content"] for m in self.messages if m["role"] == "user"))


def read_conversations(data: str | Path) -> tuple[list[Conversation], list[str]]:
    """Return a corpus' conversations, and a line about each one that is broken.

    Each record of `data` (see `records.find_sources`) is an object of one of the forms in
    docs/tuning.md.

    Raises:
        CorpusError: there is no such corpus, a file is damaged, or no conversation is whole.
    """
    whole, broken = [], []
    for source in find_sources(data, whole_records=True):
        for where, line in source.records():
            try:
                whole.append(Conversation(where, *_messages_of(json.loads(line))))
            except (ValueError, RecursionError) as error:
                broken.append(f"{where}: {' '.join(str(error).split())}")
    if not whole:
        example = f"; {broken[0]}" if broken else ""
        raise CorpusError(
            f"{data} holds no whole conversation in {len(broken):,} lines{example}. A line is an "
            'object with "messages" (role, content), "conversations" (from, value), "prompt" and '
            '"completion", or "instruction" and "output"'
        )
    return whole, broken


def _messages_of(record: Any) -> tuple[list[Message], frozenset[int]]:
    """Return a record's messages and the places of answers that are not learned, or ValueError."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    if found := [key for key in _NOT_READ if record.get(key)]:
        raise ValueError(f"{found[0]!r} is not trained on: write it into a system message")
    turns, num_read = _turns_of(record)
    messages = [_message(number, turn) for number, turn in enumerate(turns, start=1)]
    unlearned = {i for i, turn in enumerate(turns) if i < num_read or not _is_learned(i + 1, turn)}
    # Only then is every answer one to a question, which is what the loss is taken on.
    num_system = int(messages[0]["role"] == "system")
    for place, message in enumerate(messages[num_system:], start=1 + num_system):
        expected = "user" if (place - num_system) % 2 else "assistant"
        if message["role"] != expected:
            raise ValueError(f"message {place} is {message['role']}'s, not {expected}'s")
    if len(messages) < 2 + num_system:
        raise ValueError("the assistant never speaks")
    answers = {i for i, message in enumerate(messages) if message["role"] == "assistant"}
    if answers <= unlearned:
        raise ValueError("no answer is to be learned: each has the weight 0")
    return messages, frozenset(answers & unlearned)


def _turns_of(record: dict[str, Any]) -> tuple[list[Any], int]:
    """Return a record's turns, and how many of the first are a prompt, which is not learned."""
    turns, num_read = record.get("messages") or record.get("conversations"), 0
    prompt, answer = record.get("prompt"), record.get("completion")
    if not turns and record.get("instruction"):  # Alpaca's
        asked = [part for part in (record["instruction"], record.get("input")) if part]
        if all(isinstance(part, str) for part in asked):
            prompt, answer = "\n\n".join(asked), record.get("output")
    if not turns and prompt and answer:
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        answer = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        if isinstance(prompt, list) and isinstance(answer, list):
            turns, num_read = prompt + answer, len(prompt)
    if not (isinstance(turns, list) and turns):
        raise ValueError(
            'no list "messages" or "conversations", or an empty one, only '
            + ", ".join(sorted(map(repr, record)))
        )
    if system := record.get("system"):
        turns, num_read = [{"role": "system", "content": system}, *turns], num_read + 1
    return turns, num_read


def _is_learned(number: int, turn: dict[str, Any]) -> bool:
    weight = turn.get("weight")  # OpenAI's
    if weight not in (None, 0, 1):
        raise ValueError(f"message {number} has the weight {weight!r}, not 0 or 1")
    return weight != 0


def _message(number: int, turn: Any) -> Message:
    if not isinstance(turn, dict):
        raise ValueError(f"message {number} is not a JSON object")
    if found := [key for key in _NOT_READ_OF_MESSAGE if turn.get(key)]:
        raise ValueError(
            f"message {number} has {found[0]!r}, which is not trained on: remove it, or write it "
            "into the content"
        )
    # A turn in OpenAI's form, else in ShareGPT's.
    speaker = turn.get("role", turn.get("from"))
    text = turn.get("content", turn.get("value"))
    if not (isinstance(speaker, str) and speaker in _ROLES):
        raise ValueError(f"message {number} is from {speaker!r}, not from {', '.join(_ROLES)}")
    if isinstance(text, list):  # OpenAI's parts
        parts = [part if isinstance(part, dict) else {} for part in text]
        kinds = [(part.get("type", "text"), part.get("text")) for part in parts]
        texts = [part for kind, part in kinds if kind == "text" and isinstance(part, str)]
        if len(texts) < len(text):
            raise ValueError(f"message {number} has a part that is no text")
        text = "".join(texts)
    if not isinstance(text, str):
        raise ValueError(f"message {number} has no text")
    if not text.strip():
        raise ValueError(f"message {number} is empty")
    try:
        text.encode()  # JSON can hold half of a surrogate pair, which no tokenizer takes
    except UnicodeEncodeError as error:
        raise ValueError(f"message {number} is no valid Unicode ({error.reason})") from error
    return {"role": _ROLES[speaker], "content": text}
