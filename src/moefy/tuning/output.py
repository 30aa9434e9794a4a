"""The tuned model's folder: the source's own form, with the template it was tuned on."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from moefy.checkpoint.reader import read_config, side_files
from moefy.storage import storage_errors
from moefy.training.write import cast_weights
from moefy.tuning.template import ChatTemplate, end_of_turn


def write_model(
    network: Any,
    source: Path,
    out: Path,
    tokenizer: Any,
    template: ChatTemplate,
    record: dict[str, Any],
) -> None:
    """Put the finished model into the run's folder, config.json last.

    Weights go back to the dtype and the on-disk form of the source; its config.json is kept as it
    is, because other runtimes read spellings there that transformers would not write again.

    Args:
        network: plain, without adapters.
        source: the folder it came from.
        out: the run's folder.
        tokenizer: the model's.
        template: of the conversations.
        record: goes into moefy.json.
    """
    config = read_config(source)
    dtype = getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"))
    finished = out / ".finished"
    shutil.rmtree(finished, ignore_errors=True)
    origin = source / "moefy.json"
    record = {
        "moefy": version("moefy"),
        "stage": "tune",
        **record,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        "from": json.loads(origin.read_text()) if origin.is_file() else None,
    }
    with storage_errors(out):
        cast_weights(network, dtype).cpu().save_pretrained(finished)
        for file in side_files(source):
            shutil.copyfile(file, finished / file.name)
        if template.source is not None:
            _replace_template(finished, template.source)
        _stop_at(finished, config, end_of_turn(tokenizer, template))
        (finished / "moefy.json").write_text(json.dumps(record, indent=2) + "\n")
        shutil.copyfile(source / "config.json", finished / "config.json")
        for file in sorted(finished.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(out / file.name)
        finished.rmdir()


def _replace_template(folder: Path, text: str) -> None:
    """Write the template where runtimes look first, and nowhere else."""
    (folder / "chat_template.jinja").write_text(text)
    (folder / "chat_template.json").unlink(missing_ok=True)
    settings = folder / "tokenizer_config.json"
    if settings.is_file():
        content = json.loads(settings.read_text())
        if content.pop("chat_template", None) is not None:
            settings.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _stop_at(folder: Path, config: dict[str, Any], token: int | None) -> None:
    """Make generation stop where the assistant's turn ends, besides where it stopped before."""
    file = folder / "generation_config.json"
    settings = json.loads(file.read_text()) if file.is_file() else {}
    known = settings.get("eos_token_id", config.get("eos_token_id"))
    stops = known if isinstance(known, list) else [] if known is None else [known]
    if token is None or token in stops:
        return
    settings["eos_token_id"] = [*stops, token]
    file.write_text(json.dumps(settings, indent=2) + "\n")
