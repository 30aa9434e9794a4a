"""Conversations are read in both forms, and every broken one is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from moefy.data.conversations import Conversation, read_conversations
from moefy.errors import CorpusError

PAIR = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def write(file: Path, *rows: Any) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    if file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    elif file.suffix == ".zst":
        import zstandard

        file.write_bytes(zstandard.ZstdCompressor().compress(text.encode()))
    else:
        file.write_text(text)
    return file


def test_sharegpt_and_messages_are_the_same(tmp_path: Path) -> None:
    for speakers in (("system", "human", "gpt"), ("system", "user", "chatgpt")):
        turns = zip(speakers, ("Be short.", "Hi", "Ho"), strict=True)
        sharegpt = {"id": "x", "conversations": [{"from": s, "value": t} for s, t in turns]}
        messages = {"messages": [{"role": "system", "content": "Be short."}, *PAIR]}
        file = write(tmp_path / "c.jsonl", sharegpt, "", messages)
        (one, two), broken = read_conversations(file)
        assert one.messages == two.messages == messages["messages"]
        assert two.where == f"{file}, line 3"
        assert broken == []


def test_folders_compressed_files_and_datasets(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst"):
        write(folder / name, {"messages": PAIR})
    (folder / "readme.txt").write_text("not read")
    found, _ = read_conversations(folder)
    assert [Path(c.where.partition(",")[0]).name for c in found] == [
        "a.jsonl",
        "b.jsonl.gz",
        "c.jsonl.zst",
    ]
    (tmp_path / "array.json").write_text(json.dumps([{"messages": PAIR}, {"messages": []}]))
    (one,), (broken_line,) = read_conversations(tmp_path / "array.json")
    assert one.where == f"{tmp_path / 'array.json'}, record 1"
    assert broken_line.startswith(f"{tmp_path / 'array.json'}, record 2: no list")
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub/train.jsonl", {"messages": PAIR})
    (row,), broken = read_conversations(f"hf:{tmp_path / 'hub'}")
    assert (row.messages, broken) == (PAIR, [])
    assert row.where.endswith(", row 1")


SAME: dict[str, Any] = {
    "top-level system": {"system": "Be short.", "messages": PAIR},
    "parts": {
        "messages": [
            {"role": "system", "content": [{"type": "text", "text": "Be "}, {"text": "short."}]},
            {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
            PAIR[1],
        ]
    },
    "prompt and completion": {"system": "Be short.", "prompt": "Hi", "completion": "Ho"},
    "conversational prompt": {
        "prompt": [{"role": "system", "content": "Be short."}, PAIR[0]],
        "completion": [PAIR[1]],
    },
    "Alpaca": {"system": "Be short.", "instruction": "Hi", "input": "", "output": "Ho"},
    "empty extras": {
        "tools": [],
        "messages": [
            {"role": "system", "content": "Be short.", "tool_calls": None},
            PAIR[0],
            {**PAIR[1], "weight": 1, "reasoning_content": ""},
        ],
    },
}


@pytest.mark.parametrize("form", SAME)
def test_other_forms_are_the_same_conversation(form: str, tmp_path: Path) -> None:
    (found,), broken = read_conversations(write(tmp_path / "c.jsonl", SAME[form]))
    assert broken == []
    assert found.messages == [{"role": "system", "content": "Be short."}, *PAIR]
    assert found.unlearned == frozenset()


def test_answers_that_are_only_read(tmp_path: Path) -> None:
    weighted = {"messages": [PAIR[0], PAIR[1] | {"weight": 0}, *PAIR]}
    prompt = {"prompt": [*PAIR, PAIR[0]], "completion": [PAIR[1]]}
    alpaca = {"instruction": "Add.", "input": "1 + 1", "output": "2"}
    (one, two, three), _ = read_conversations(write(tmp_path / "c.jsonl", weighted, prompt, alpaca))
    assert one.messages == two.messages == [*PAIR, *PAIR]
    assert one.unlearned == two.unlearned == {1}
    assert three.messages[0]["content"] == "Add.\n\n1 + 1"


BROKEN: dict[str, tuple[Any, str]] = {
    "no JSON": ('{"messages": [', "Expecting value"),
    "no object": ([1], "not a JSON object"),
    "no messages": ({"text": "x", "id": 1}, "only 'id', 'text'"),
    "no list": ({"messages": "Hi"}, 'no list "messages"'),
    "nothing said": ({"conversations": []}, "an empty one"),
    "no message": ({"messages": ["Hi"]}, "message 1 is not a JSON object"),
    "stranger": ({"messages": [{"role": "tool", "content": "x"}]}, "message 1 is from 'tool'"),
    "list for a speaker": ({"messages": [{"role": ["user"], "content": "x"}]}, "message 1 is from"),
    "no text": ({"messages": [{"role": "user", "content": 3}]}, "message 1 has no text"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "text": "x"}]}]},
        "message 1 has a part that is no text",
    ),
    "tools": ({"tools": [{"name": "f"}], "messages": PAIR}, "'tools' is not trained on"),
    "tool call": (
        {"messages": [PAIR[0], {**PAIR[1], "tool_calls": [{}]}]},
        "message 2 has 'tool_calls', which is not trained on",
    ),
    "reasoning": (
        {"messages": [PAIR[0], {**PAIR[1], "reasoning_content": "Hm."}]},
        "message 2 has 'reasoning_content', which is not trained on",
    ),
    "two systems": (
        {"system": "a", "messages": [{"role": "system", "content": "b"}, *PAIR]},
        "message 2 is system's, not user's",
    ),
    "weight": ({"messages": [PAIR[0], {**PAIR[1], "weight": 0.5}]}, "message 2 has the weight 0.5"),
    "nothing to learn": (
        {"messages": [PAIR[0], {**PAIR[1], "weight": 0}]},
        "no answer is to be learned",
    ),
    "no output": ({"instruction": "Hi", "input": ""}, "only 'input', 'instruction'"),
    "empty": ({"messages": [PAIR[0], {"role": "assistant", "content": " "}]}, "message 2 is empty"),
    "half a character": (
        '{"messages": [{"role": "user", "content": "\\ud800"}]}',
        "no valid Unicode",
    ),
    "wrong beginning": ({"messages": PAIR[1:]}, "message 1 is assistant's, not user's"),
    "twice": (
        {"messages": [{"role": "system", "content": "s"}, *PAIR, PAIR[1]]},
        "message 4 is assistant's, not user's",
    ),
    "late system": (
        {"messages": [*PAIR, {"role": "system", "content": "s"}]},
        "message 3 is system's, not user's",
    ),
    "no answer": ({"messages": PAIR[:1]}, "the assistant never speaks"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_conversations_are_named(kind: str, tmp_path: Path) -> None:
    row, reason = BROKEN[kind]
    file = write(tmp_path / "c.jsonl", {"messages": PAIR}, row)
    (whole,), (line,) = read_conversations(file)
    assert whole.messages == PAIR
    assert line.startswith(f"{file}, line 2: ")
    assert reason in line


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "c.jsonl", {"messages": PAIR})
    file.write_bytes(file.read_bytes() + b'{"messages": "\xff"}\n')
    _, (line,) = read_conversations(file)
    assert line.startswith(f"{file}, line 2: ")


@pytest.mark.parametrize("name", ["missing", "text.txt"])
def test_nothing_to_read(name: str, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x")
    with pytest.raises(CorpusError, match=r"does not exist|is in no form that is read here"):
        read_conversations(tmp_path / name)


def test_only_broken_conversations_are_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "c.jsonl", {"text": "x"}, {"text": "y"})
    with pytest.raises(CorpusError, match=r"no whole conversation in 2 lines.*line 1: no list"):
        read_conversations(file)


def test_one_in_twenty_is_held_out_by_its_opening() -> None:
    def say(opening: str, answer: str) -> Conversation:
        return Conversation(
            "x",
            [
                {"role": "system", "content": answer},
                {"role": "user", "content": opening},
                {"role": "assistant", "content": answer},
            ],
        )

    held_out = [say(f"question {i}", "a").is_held_out for i in range(4000)]
    assert 140 < sum(held_out) < 260
    assert held_out == [say(f"question {i}", "another").is_held_out for i in range(4000)]
