"""The files of a tokenizer, and the chat templates that lie in a model's folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from moefy.data.records import is_held_out
from tests.fuzz.changes import byte_changes, value_changes
from tests.fuzz.corpora import templates
from tests.fuzz.model_folders import DOCUMENTS

_PREPARE = "prepare text out --tokenizer tok --workers 1"
_TUNE = "tune dense out --data talks.jsonl --set sequence_length=64 --set epochs=1"
COMMANDS = {
    "tokenizer.json": _PREPARE,
    "tokenizer_config.json": _PREPARE,
    "special_tokens_map.json": _PREPARE,
    "added_tokens.json": _PREPARE,
    "vocab.json and merges.txt": _PREPARE,
    "bomb of a tokenizer": _PREPARE,
    "bomb of a tokenizer in a conversation": _TUNE,
    "chat_template.jinja": _TUNE,
    "chat_template of tokenizer_config.json": _TUNE,
}
_CONTROL = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
_ADDED = [
    {"id": 256, "content": "<eos>", "special": True, **_CONTROL},
    {"id": 257, "content": "ab", "special": True, **_CONTROL, "normalized": True},
]
_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<eos>",
    "pad_token": {"__type": "AddedToken", "content": "<eos>", **_CONTROL},
    "added_tokens_decoder": {"256": {"content": "<eos>", "special": True, **_CONTROL}},
    "additional_special_tokens": [],
    "clean_up_tokenization_spaces": False,
    "model_max_length": 512,
    "padding_side": "left",
    "split_special_tokens": False,
}
_MAP = {"eos_token": {"content": "<eos>", **_CONTROL}, "additional_special_tokens": ["<eos>"]}


def mutations(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    dense, tok = folder / "dense", folder / "tok"
    rules = _rules(json.loads((dense / "tokenizer.json").read_text()))
    vocab = rules["model"].pop("vocab")  # its entries are alike
    files: dict[str, tuple[Any, int]] = {
        "tokenizer.json": (rules, 240),
        "tokenizer_config.json": (_CONFIG, 100),
        "special_tokens_map.json": (_MAP, 40),
        "added_tokens.json": ({"<eos>": 256, "xyz": 257}, 30),
    }

    def whole(record: Any) -> bytes:
        if isinstance(record, dict) and isinstance(record.get("model"), dict):
            record["model"].setdefault("vocab", vocab)
        return json.dumps(record).encode()

    for kind, (record, number) in files.items():
        yield f"{kind}: as it is", partial(_write, dense, tok / kind, whole(record))
        changed = [(what, whole(new)) for what, new in value_changes(record, number)]
        damaged = byte_changes(whole(record), number // 4)
        for what, content in (*DOCUMENTS.items(), *changed, *damaged):
            yield f"{kind}: {what}", partial(_write, dense, tok / kind, content)
    slow = json.dumps({**vocab, "<eos>": 256, "ab": 257}).encode(), b"#version: 0.2\na b\n"
    for name, content in zip(("vocab.json", "merges.txt"), slow, strict=True):
        for what, new in (("as it is", content), *byte_changes(content, 20)):
            yield f"vocab.json and merges.txt: {name}, {what}", partial(_slow, tok, slow, name, new)
    for what, part in _bombs().items():
        content = json.dumps(
            {**rules, **part, "model": {**rules["model"], "vocab": vocab}}
        ).encode()
        for where, place in (("", tok), (" in a conversation", dense)):
            change = partial(_write, dense, place / "tokenizer.json", content)
            yield f"bomb of a tokenizer{where}: {what}", change
    for number, (what, template) in enumerate(templates()):
        if number % 2 == 0:
            file = dense / "chat_template.jinja"
            yield f"chat_template.jinja: {what}", partial(file.write_bytes, template)
        else:
            held = {**_CONFIG, "chat_template": template.decode(errors="replace")}
            content = json.dumps(held).encode()
            kind = "chat_template of tokenizer_config.json"
            yield f"{kind}: {what}", partial((dense / "tokenizer_config.json").write_bytes, content)


def _rules(content: Any) -> Any:
    """Return a tokenizer.json that has something of everything."""
    split = {
        "type": "Split",
        "pattern": {"Regex": r"[a-z]+|\s+|[^\sa-z]+"},
        "behavior": "Isolated",
        "invert": False,
    }
    normalizers = [{"type": "NFC"}, _replaced("  ", " "), {"type": "Prepend", "prepend": " "}]
    return {
        **content,
        "added_tokens": _ADDED,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split, {**content["pre_tokenizer"], "use_regex": False}],
        },
        "post_processor": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},
    }


def _replaced(pattern: str, content: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: pattern}, "content": content}


def _bombs() -> dict[str, dict[str, Any]]:
    """Return parts of a tokenizer.json that take too much time or memory for a text."""

    def split(pattern: str) -> dict[str, Any]:
        way = {"type": "Split", "behavior": "Isolated", "invert": False}
        return {"pre_tokenizer": {**way, "pattern": {"Regex": pattern}}}

    def rules(*each: Any) -> dict[str, Any]:
        return {"normalizer": {"type": "Sequence", "normalizers": [*each]}}

    long = {"id": 258, "content": "a" * 20, "special": True, **_CONTROL, "normalized": True}
    doubled = [_replaced(" ", "  ")] * 40
    nested: Any = _replaced("i", "ii")
    for _ in range(40):
        nested = {"type": "Sequence", "normalizers": [nested, _replaced(" ", "  ")]}
    deep: Any = {"type": "NFC"}
    for _ in range(400):
        deep = {"type": "Sequence", "normalizers": [deep]}
    return {
        # the library gives up at 10 million steps from one place of a text, but not before
        "a pattern just below the limit of steps": split(r"([a-z0-9 ]+)+\1?#|(?=(\w+\s?){1,4}$)x"),
        "a pattern over the limit of steps": split(r"([a-z0-9 ]+)+#"),
        "a pattern with itself in it": split(r"(?<a>\((?:[^()]|\g<a>)*\)|(?:\w+\s?)+#)"),
        "a pattern of many turns": split("(a{1000}|b?){1000}{1000}#"),
        "a normalizer of a bad pattern": rules(_replaced(r"(\w+\s?)+#", "", "Regex")),
        "a normalizer that doubles": rules(*doubled),
        "a normalizer in a normalizer": rules(nested),
        "a normalizer of empty matches": rules(*[_replaced("x*", "y" * 500, "Regex")] * 8),
        "a normalizer that puts much before": rules(
            *[{"type": "Prepend", "prepend": "x" * 10**7}, _replaced("x", "x" * 1000)]
        ),
        "bytes of bytes": {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
                ]
                * 60,
            }
        },
        "an added token that is doubled": {
            **rules(*[_replaced("a", "aa")] * 40),
            "added_tokens": [*_ADDED, long],
        },
        "a normalizer within normalizers": rules(deep),
    }


def _write(dense: Path, file: Path, content: bytes) -> None:
    """Write one file of a tokenizer; a folder of its own has no rows that its ids must fit."""
    file.parent.mkdir(exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (file.parent / name).write_bytes((dense / name).read_bytes())
    file.write_bytes(content)


def _slow(tok: Path, contents: tuple[bytes, bytes], changed: str, content: bytes) -> None:
    """Write the files of a slow tokenizer, one of them changed."""
    tok.mkdir()
    for name, own in zip(("vocab.json", "merges.txt"), contents, strict=True):
        (tok / name).write_bytes(content if name == changed else own)
    config = {**_CONFIG, "tokenizer_class": "GPT2Tokenizer", "unk_token": "<eos>"}
    (tok / "tokenizer_config.json").write_text(json.dumps(config))


def agrees(folder: Path, label: str) -> str | None:
    """Compare the ids of a corpus with those of transformers' own reading of the tokenizer."""
    if not (folder / "out/moefy.json").is_file() or not label.startswith(tuple(_PREPARED)):
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder / "tok")
    record = json.loads((folder / "out/moefy.json").read_text())
    for name in ("ab", "xyz"):
        lines = (folder / f"text/{name}.jsonl").read_text().splitlines()
        expected: dict[str, list[int]] = {"train": [], "heldout": []}
        for text in (json.loads(line)["text"] for line in lines):
            encoded = tokenizer(text, add_special_tokens=False, split_special_tokens=True)
            side = expected["heldout" if is_held_out(text) else "train"]
            side += [*encoded["input_ids"], tokenizer.eos_token_id]
        for side_name, ids in expected.items():
            files = sorted((folder / "out" / name).glob(f"{side_name}.bin"))
            found = [i for file in files for i in np.fromfile(file, record["dtype"]).tolist()]
            if found != ids:
                return f"{name}/{side_name} has other ids than transformers gives"
    return None


_PREPARED = [f"{kind}:" for kind, command in COMMANDS.items() if command == _PREPARE]
