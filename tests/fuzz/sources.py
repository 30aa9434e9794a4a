"""Model folders and GGUF files: what `model_folders` changes, converted or used as a tokenizer."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from tests.fuzz import model_folders
from tests.parity.test_gguf_source import write_gguf

_ALL = "--experts 4 --active 4 --shared 0 --partition random --router random --repair none"
_CONVERT = f"convert dense out {_ALL}"
COMMANDS = {
    "config.json": _CONVERT,
    "generation_config.json": _CONVERT,
    "model.safetensors": _CONVERT,
    "index": _CONVERT,
    "tokenizer.json": "prepare text out --tokenizer dense --workers 1",
    "tokenizer_config.json": "prepare text out --tokenizer dense --workers 1",
    "special_tokens_map.json": "prepare text out --tokenizer dense --workers 1",
    "gguf": f"convert dense.gguf out {_ALL}",
}


def mutations(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    for label, change in model_folders.mutations(folder / "dense"):
        yield label, partial(change, folder / "dense")
    with tempfile.TemporaryDirectory() as kept:
        whole = Path(kept) / "dense.gguf"
        write_gguf(whole, "llama")
        for label, change in model_folders.gguf_mutations(whole):
            yield label, partial(_changed_copy, change, whole, folder / "dense.gguf")


def _changed_copy(change: Callable[[Path], None], whole: Path, copy: Path) -> None:
    shutil.copyfile(whole, copy)
    change(copy)


def agrees(folder: Path, label: str) -> str | None:
    """Compare the logits with those of the dense model, where transformers itself reads it."""
    from transformers import AutoModelForCausalLM

    if not (folder / "out" / "config.json").is_file() or label.startswith("gguf"):
        return None
    ids = torch.arange(1, 33)[None]
    try:
        dense = AutoModelForCausalLM.from_pretrained(folder / "dense", dtype=torch.float32)
        with torch.inference_mode():
            expected = dense(ids).logits
    except Exception:
        return None  # moefy needs less of a file than transformers does
    made = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    with torch.inference_mode():
        difference = (made(ids).logits - expected).abs().max().item()
    return None if difference < 1e-3 else f"logits differ by {difference:.2g}"
