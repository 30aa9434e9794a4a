"""Model folders, dense and split, and GGUF files."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from tests.parity.test_gguf_source import write_gguf

Mutation = tuple[str, Callable[[Path], None]]

JSON_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
VALUES: dict[str, Any] = {
    "null": None,
    "true": True,
    "zero": 0,
    "negative": -1,
    "huge": 10**30,
    "large": 1 << 31,
    "fraction": 0.5,
    "infinite": float("inf"),
    "nan": float("nan"),
    "text": "x",
    "code": "../../../etc/passwd",
    "empty list": [],
    "list": [1, "x", None],
    "object": {"a": {"b": []}},
}
DOCUMENTS: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "number": b"3",
    "text": b'"x"',
    "list": b"[1, 2]",
    "empty object": b"{}",
    "nested lists": b"[" * 100_000,
    "nested objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "long number": b'{"hidden_size": ' + b"9" * 100_000 + b"}",
    "UTF-16": '{"model_type": "llama"}'.encode("utf-16"),
    "no text": bytes(range(256)),
    "not closed": b'{"model_type": "llama"',
}
HEADERS: dict[str, bytes] = {
    "length of 2^60": struct.pack("<Q", 1 << 60) + b"{}",
    "length behind the end": struct.pack("<Q", 1 << 20) + b"{}",
    "length of zero": struct.pack("<Q", 0),
    "no JSON": struct.pack("<Q", 4) + b"\0\0\0\0",
    "list": struct.pack("<Q", 4) + b"[1] ",
    "nested": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "empty": b"",
    "7 bytes": b"\0" * 7,
}
NAMES = ("../model.safetensors", "/etc/passwd", "missing.safetensors", "", ".", "a\0b", "x" * 300)


CONVERT = "convert {} out --experts 4 --active 4 --shared 0 --partition random --router random "
TRAIN = "train moe out --data text --tokens 32 --set sequence_length=32 --set global_batch_size=1"
KINDS = (*JSON_FILES, "model.safetensors", "index")
COMMANDS = {
    **{f"dense {kind}": CONVERT.format("dense") + "--repair none" for kind in KINDS},
    **{f"split {kind}": TRAIN for kind in KINDS},
    "gguf": CONVERT.format("model.gguf") + "--repair none",
}


def mutations(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """Iterate over every change of a model in `folder`, all of them made from it as it is now."""
    found = [
        (f"{what} {label}", partial(change, folder / name))
        for what, name in {"dense": "dense", "split": "moe"}.items()
        for label, change in folder_mutations(folder / name)
    ]
    with TemporaryDirectory() as place:
        file = Path(place) / "model.gguf"
        write_gguf(file, "llama")
        found += [(label, partial(c, folder / file.name)) for label, c in gguf_mutations(file)]
    yield from found


def agrees(folder: Path, label: str) -> str | None:
    """Compare a conversion with all experts active with what transformers reads in its source."""
    if not label.startswith("dense"):
        return None
    ids = torch.arange(1, 60)[None]
    with torch.inference_mode():
        try:
            expected, found = (
                AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float32)(ids)
                for name in ("dense", "out")
            )
        except Exception as error:
            return f"transformers does not read both ({error!r})"
    difference = (expected[0] - found[0]).abs().max()
    return None if difference < 1e-3 else f"the logits differ by {difference:.3g}"


def folder_mutations(folder: Path) -> Iterator[Mutation]:
    """Iterate over every mutation of a model folder; each function takes a copy of it."""
    for name in JSON_FILES:
        if (folder / name).is_file():
            yield from _json_mutations(folder, name)
    yield from _weight_mutations(folder)
    yield from _index_mutations(folder)


def _json_mutations(folder: Path, name: str) -> Iterator[Mutation]:
    for what, content in DOCUMENTS.items():
        yield f"{name}: {what}", partial(_write, name, content)
    content = (folder / name).read_bytes()
    generator = random.Random(name)
    for number in range(30):
        yield f"{name}: damage {number}", partial(_write, name, damaged(content, generator))
    for key in json.loads(content):
        yield f"{name}: without {key}", partial(_without, name, key)
        for what, value in VALUES.items():
            yield f"{name}: {key} is {what}", partial(_with, name, key, value)
    if name == "config.json":
        for key, value in FOREIGN_KEYS.items():
            yield f"{name}: with {key}", partial(_with, name, key, value)


FOREIGN_KEYS: dict[str, Any] = {
    "attribute_map": {"rms_norm_eps": "initializer_range"},
    "attn_implementation": "somebody/kernel",
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"},
    "configuration_files": ["config.4.0.0.json"],
    "is_causal": False,
    "num_labels": 10**9,
    "per_layer_config": {"0": {"rms_norm_eps": 1.0}},
    "quantization_config": {"quant_method": "gptq"},
    "rope_scaling": {"type": "yarn", "factor": 4.0},
    "text_config": {"model_type": "llama"},
    "transformers_weights": "other.safetensors",
    "unknown_key": [1, {"a": None}],
}


def damaged(content: bytes, generator: random.Random) -> bytes:
    """Return bytes of which some were flipped, removed or repeated."""
    found = bytearray(content)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(found) + 1)
        match generator.randrange(4):
            case 0 if place < len(found):
                found[place] ^= generator.randint(1, 255)
            case 1:
                del found[place : place + generator.randint(1, 40)]
            case 2:
                found[place:place] = found[place : place + generator.randint(1, 40)]
            case _:
                del found[place:]
    return bytes(found)


def _write(name: str, content: bytes, folder: Path) -> None:
    (folder / name).write_bytes(content)


def _with(name: str, key: str, value: Any, folder: Path) -> None:
    file = folder / name
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))


def _without(name: str, key: str, folder: Path) -> None:
    file = folder / name
    content = json.loads(file.read_text())
    del content[key]
    file.write_text(json.dumps(content))


def _weight_mutations(folder: Path) -> Iterator[Mutation]:
    name = "model.safetensors"
    if not (folder / name).is_file():
        return
    for what, content in HEADERS.items():
        yield f"{name}: {what}", partial(_write, name, content)
    entries: list[tuple[str, str, Any]] = [
        ("shape", "negative", [-1, 32]),
        ("shape", "huge", [1 << 62, 1 << 62]),
        ("shape", "text", "x"),
        ("shape", "other", [1, 1]),
        ("dtype", "unknown", "F7"),
        ("dtype", "integers", "I32"),
        ("dtype", "wide", "F64"),
        ("dtype", "number", 3),
        ("data_offsets", "overlap", [0, 8]),
        ("data_offsets", "reversed", [8, 0]),
        ("data_offsets", "behind the end", [1 << 40, 1 << 41]),
        ("data_offsets", "negative", [-8, 8]),
        ("data_offsets", "missing", None),
    ]
    for key, what, value in entries:
        yield f"{name}: {key} {what}", partial(_with_entry, key, value)
    whole = (folder / name).read_bytes()
    header = struct.unpack("<Q", whole[:8])[0] + 8
    generator = random.Random(0)
    for number in range(60):
        head = damaged(whole[:header], generator)
        yield f"{name}: header {number}", partial(_write, name, head + whole[header:])
    for number in range(10):
        cut = whole[: generator.randrange(len(whole))]
        yield f"{name}: cut {number}", partial(_write, name, cut)
    for value in ("nan", "inf"):
        yield f"{name}: {value}", partial(_with_value, float(value))
    yield f"{name}: a folder", _folder_instead
    yield f"{name}: pickled code", _pickled_code


def _with_entry(key: str, value: Any, folder: Path) -> None:
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    header = json.loads(whole[8 : 8 + size])
    name = sorted(set(header) - {"__metadata__"})[0]
    header[name][key] = value
    if value is None:
        del header[name][key]
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])


def _with_value(value: float, folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if name.endswith("up_proj.weight"))
    tensors[name].view(-1)[7] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _folder_instead(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()


class Evil:
    """Unpickling it makes a file `PWNED` in the working folder."""

    def __reduce__(self) -> tuple[Any, ...]:
        return open, ("PWNED", "w")


def _pickled_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Evil()}, folder / "pytorch_model.bin")


def _index_mutations(folder: Path) -> Iterator[Mutation]:
    for name in NAMES:
        yield f"index: shard {name[:30]!r}", partial(_indexed, {"model.norm.weight": name})
    documents: dict[str, Any] = {
        "list": [1],
        "number": 3,
        "object of numbers": {"model.norm.weight": 3},
        "object of lists": {"model.norm.weight": ["a"]},
        "empty": {},
        "null": None,
    }
    for what, weight_map in documents.items():
        yield f"index: {what}", partial(_indexed, weight_map)
    for what, content in DOCUMENTS.items():
        yield f"index: {what} document", partial(_index_document, content)
    yield "index: a tensor twice", _twice
    yield "index: a shard that is a link to a file outside", _linked


def _indexed(weight_map: Any, folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _index_document(content: bytes, folder: Path) -> None:
    _indexed({}, folder)
    (folder / "model.safetensors.index.json").write_bytes(content)


def _twice(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    _indexed(dict.fromkeys(tensors, "model-00001-of-00001.safetensors") | {"x": "b"}, folder)
    norm = {"model.norm.weight": 2 * tensors["model.norm.weight"]}
    save_file(norm, folder / "b.safetensors", metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"b"', '"b.safetensors"'))


def _linked(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/etc/passwd")


def gguf_mutations(file: Path) -> Iterator[Mutation]:
    """Iterate over mutations of a GGUF file; each function takes the path of a copy."""
    whole = file.read_bytes()
    generator = random.Random(0)
    counts = {"tensors": 8, "keys": 16}  # where they stand
    for what, place in counts.items():
        for value in (0, 1, 1 << 20, 1 << 32, 1 << 60, (1 << 64) - 1):
            changed = whole[:place] + struct.pack("<Q", value) + whole[place + 8 :]
            yield f"gguf: {value} {what}", partial(_replace, changed)
    for version in (0, 1, 2, 99, 3 << 24):
        yield (
            f"gguf: version {version}",
            partial(_replace, whole[:4] + struct.pack("<I", version) + whole[8:]),
        )
    for number in range(40):
        cut = whole[: generator.randrange(len(whole))]
        yield f"gguf: cut {number}", partial(_replace, cut)
    head = min(len(whole), 9000)
    for number in range(150):
        place = generator.randrange(head)
        value = generator.choice([0, 1 << 31, 1 << 60, generator.getrandbits(64)])
        changed = whole[:place] + struct.pack("<Q", value) + whole[place + 8 :]
        yield f"gguf: number {number}", partial(_replace, changed)
    for number in range(150):
        yield (
            f"gguf: damage {number}",
            partial(_replace, damaged(whole[:head], generator) + whole[head:]),
        )


def _replace(content: bytes, file: Path) -> None:
    file.write_bytes(content)
