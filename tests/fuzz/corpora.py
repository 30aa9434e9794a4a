"""Changed text, conversations, chat templates and prepared corpora."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from tests.fuzz.changes import byte_changes, value_changes

_TUNE = "tune dense out --data talks.jsonl --set sequence_length=64 --set epochs=1"
COMMANDS = {
    "text of prepare": "prepare data out --tokenizer dense --workers 1",
    "text of convert": "convert dense out --experts 4 --active 2 --data data "
    "--set calibration_tokens=256 --set calibration_length=16",
    "text of eval": "eval dense --data data --windows 1 --sequence-length 16 --no-decode",
    "domains": "prepare data out --tokenizer dense --workers 1 --domain-key by",
    "conversations": _TUNE,
    "chat template": f"{_TUNE} --set chat_template=mine.jinja",
    "prepared corpus": "train dense out --data tokens --tokens 64 --set sequence_length=32",
}
_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
_BOMBS = (
    "{% for i in range(10**9) %}a{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'a' * 10**9 }}",
    "{{ [0] * 10**10 }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ 'a'.center(10**9) }}",
    "{{ 10**10**8 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "{{ 1 + 'a' }}",
    "{{ nothing.x.y }}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__ }}",
    "{% include '/etc/passwd' %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
)
_MANY = 1 << 26


def mutations(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield each change's name and what makes it in a folder of `make_place`."""
    lines = "".join(json.dumps({"text": f"text {i} " * 9}) + "\n" for i in range(40)).encode()
    for kind in ("text of prepare", "text of convert", "text of eval"):
        for number, (name, content) in enumerate(_texts(lines)):
            if kind == "text of prepare" or number % 5 == 0:
                yield f"{kind}: {name}", partial(_write, folder / "data" / name.split()[0], content)
    row = {"text": "text " * 9, "by": "a"}
    for label, changed in value_changes(row, 40):
        content = json.dumps(changed).encode() + b"\n"
        yield f"domains: {label}", partial(_write, folder / "data/a.jsonl", content * 40)
    for label, record in _talks():
        content = "".join(json.dumps(record(i)) + "\n" for i in range(30)).encode()
        yield f"conversations: {label}", partial(_write, folder / "talks.jsonl", content)
    for label, template in templates():
        yield f"chat template: {label}", partial(_write, folder / "mine.jinja", template)
    for label, change in _records(folder):
        yield f"prepared corpus: {label}", change


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)


def _texts(lines: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield file names with what was done to them, and contents."""
    rows = [json.loads(line) for line in lines.splitlines()]
    array = json.dumps(rows).encode()
    table = b"text\n" + b"".join(row["text"].encode() + b"\n" for row in rows)
    forms = {
        "a.jsonl": lines,
        "a.json": array,
        "a.csv": table,
        "a.txt": table.replace(b"\n", b"\n\n"),
        "a.jsonl.gz": gzip.compress(lines),
        "a.jsonl.zst": zstandard.compress(lines),
        "a.parquet": lines,
        "._a.jsonl": lines,
    }
    for name, content in forms.items():
        yield f"{name} as it is", content
        for label, changed in byte_changes(content, 20):
            yield f"{name} {label}", changed
    for label, row in value_changes(rows[0], 30):
        yield f"a.jsonl {label}", json.dumps(row).encode() + b"\n" + lines
    yield "a.jsonl.gz of blanks", gzip.compress(b"\n" * _MANY)
    yield "a.jsonl.zst of blanks", zstandard.compress(b"\n" * _MANY)
    yield "a.json.gz of one array", gzip.compress(b"[" + b" " * _MANY)
    yield "a.txt.gz of one line", gzip.compress(b"a" * _MANY)
    yield "a.csv.zst of columns", zstandard.compress(b"text\n" + b"," * _MANY)


def _talks() -> Iterator[tuple[str, Callable[[int], Any]]]:
    def talk(i: int) -> dict[str, Any]:
        asked = {"role": "user", "content": [{"type": "text", "text": f"{i}"}], "weight": 1}
        return {"system": "Add.", "messages": [asked, {"role": "assistant", "content": "a"}]}

    forms: dict[str, Callable[[int], Any]] = {
        "messages": talk,
        "completion": lambda i: {"prompt": f"{i}", "completion": "a"},
        "Alpaca": lambda i: {"instruction": "Add.", "input": f"{i}", "output": "a"},
    }
    for name, form in forms.items():
        for label, _ in value_changes(form(0), 40):

            def changed(i: int, form: Any = form, label: str = label) -> Any:
                return dict(value_changes(form(i), 40))[label]

            yield f"{name}, {label}", changed
    for key in ("tools", "functions", "documents", "history"):
        yield key, lambda i, key=key: {key: [{"name": "f"}], **talk(i)}
    for key in ("tool_calls", "function_call", "reasoning_content", "weight"):
        answer = {"role": "assistant", "content": "a", key: [{"name": "f"}]}
        yield key, lambda i, answer=answer: {"messages": [talk(i)["messages"][0], answer]}
    yield "special tokens", lambda i: {"prompt": f"<eos>{i}<|user|>", "completion": "<eos><eos>"}


def templates() -> Iterator[tuple[str, bytes]]:
    for number, bomb in enumerate(_BOMBS):
        yield f"bomb {number}", bomb.encode()
        yield f"bomb {number} behind a template", (_TEMPLATE + bomb).encode()
    yield from byte_changes(_TEMPLATE.encode(), 60)


def _records(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    ids = np.arange(400, dtype="<u2") % 256
    shards = [
        {
            "file": f"ab/{split}.bin",
            "split": split,
            "tokens": len(ids),
            "sha256": hashlib.sha256(ids.tobytes()).hexdigest(),
        }
        for split in ("train", "heldout")
    ]

    def write(change: Callable[[Any], bytes]) -> None:
        from moefy.checkpoint.load import load_tokenizer
        from moefy.data.shards import describe_tokenizer

        record = {
            "stage": "prepare",
            "dtype": "uint16",
            "tokenizer": describe_tokenizer(load_tokenizer(folder / "dense"), "dense"),
            "domains": {"ab": {"shards": shards}},
        }
        for shard in shards:
            (folder / "tokens/ab").mkdir(parents=True, exist_ok=True)
            (folder / "tokens" / str(shard["file"])).write_bytes(ids.tobytes())
        (folder / "tokens/moefy.json").write_bytes(change(record))

    yield "as it is", partial(write, lambda record: json.dumps(record).encode())
    for number in range(60):
        yield f"value {number}", partial(write, partial(_changed_value, number=number))
        yield f"bytes {number}", partial(write, partial(_changed_bytes, number=number))
    for name in ("../out/train.bin", "/etc/passwd", "ab/train-00001.bin", "ab/../x"):
        yield f"shard {name}", partial(write, partial(_renamed, name=name))


def _changed_value(record: Any, number: int) -> bytes:
    return json.dumps([changed for _, changed in value_changes(record, 60)][number]).encode()


def _changed_bytes(record: Any, number: int) -> bytes:
    content = json.dumps(record).encode()
    return [changed for _, changed in byte_changes(content, 60)][number]


def _renamed(record: Any, name: str) -> bytes:
    text = json.dumps(record).replace("ab/train.bin", name)
    return text.encode()
