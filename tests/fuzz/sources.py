"""Folders read into others: quantised, adapters, `.bin`, Mistral's layout, GGUF in parts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.conftest import write_tiny_model
from tests.fuzz.changes import byte_changes, value_changes
from tests.fuzz.model_folders import CONVERT, VALUES
from tests.parity.test_gguf_source import write_gguf
from tests.parity.test_merged_sources import write_adapter, write_consolidated
from tests.parity.test_quantised_source import quantise, tiny

FORMS = ("gptq", "awq", "fp8", "compressed int4, zeros", "mxfp4", "bitsandbytes, nested")
KINDS = ("adapter", "bin", "consolidated", "part", *(form.replace(",", "") for form in FORMS))
COMMANDS = dict.fromkeys(KINDS, CONVERT.format("model") + "--repair none")
COMMANDS["part"] = COMMANDS["part"].replace(" model ", " model/model-00001-of-00003.gguf ")
_HEADER = 600
"""Bytes of a file's start among which is what is damaged here, besides a few anywhere."""


def mutations(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    for kind, ready in _ready(folder).items():
        for file in sorted(ready.iterdir()):
            if (
                file.suffix not in (".safetensors", ".json", ".bin", ".gguf")
                or "token" in file.name
            ):
                continue
            content = file.read_bytes()
            head, rest = content[:_HEADER], content[_HEADER:]
            changed = [(f"head {what}", new + rest) for what, new in byte_changes(head, 25)]
            changed += list(byte_changes(content, 10))
            if file.suffix == ".json":
                settings = json.loads(content)
                values = (*VALUES.values(), 1 << 40)
                changed += [
                    (what, json.dumps(new).encode())
                    for what, new in value_changes(settings, 60, values=values)
                ]
            for what, new in changed:
                label = f"{kind}: {file.name}, {what}"
                yield label, partial(_write, ready, folder / "model", file.name, new)


def _write(ready: Path, model: Path, name: str, content: bytes) -> None:
    shutil.copytree(ready, model)
    (model / name).write_bytes(content)


def _ready(folder: Path) -> dict[str, Path]:
    """Make one folder of each kind, once."""
    root = folder.parents[1] / "sources"
    found = {kind: root / kind for kind in KINDS}
    if root.is_dir():
        return found
    settings: dict[str, Any] = {"tie_word_embeddings": False, "sliding_window": None}
    base = write_tiny_model(root / "base", "mistral", head_dim=8, **settings)
    write_adapter(found["adapter"], base, r=2)
    write_consolidated(found["consolidated"], base)
    write_tiny_model(found["bin"], "llama")
    weights = found["bin"] / "model.safetensors"
    torch.save(load_file(weights), found["bin"] / "pytorch_model.bin")
    weights.unlink()
    found["part"].mkdir()
    write_gguf(found["part"] / "model.gguf", "qwen2", part_tensors=11)
    shutil.rmtree(found["part"] / "dense")
    for form in FORMS:
        quantise(tiny(found[form.replace(",", "")]), form)
    return found
