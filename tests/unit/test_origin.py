"""A model card names the dense model by its real name and carries its license."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from moefy import assets
from moefy.checkpoint.card import model_card
from moefy.checkpoint.source import BUILTIN, origin


def model(folder: Path, readme: str = "", **config: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text(readme)
    return folder


def test_a_local_folder_has_the_hub_name_of_its_config_or_its_own(tmp_path: Path) -> None:
    plain = model(tmp_path / "mine", "---\nlicense: mit\ntags: [a]\n---\n# Mine\n")
    assert origin(plain, plain) == {"base_model": "mine", "license": "mit"}
    known = model(tmp_path / "copy", _name_or_path="meta-llama/Llama-3.2-1B")
    assert origin(known, known) == {"base_model": "meta-llama/Llama-3.2-1B"}
    moved = model(tmp_path / "moved", _name_or_path="/home/me/models/x")
    assert origin(moved, moved) == {"base_model": "moved"}


@pytest.mark.parametrize("front", ["", "# No front", "---\nlicense: [\n---\n", "---\n- a\n---\n"])
def test_a_readme_without_a_license_gives_none(tmp_path: Path, front: str) -> None:
    folder = model(tmp_path / "mine", front)
    assert origin(folder, folder) == {"base_model": "mine"}


def test_no_folder_of_a_cache_gives_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOEFY_CACHE", str(tmp_path / "cache"))
    models = tmp_path / "cache" / "models"
    builtin = model(models / f"{BUILTIN}-instruct-{assets.SMOLLM2.sha256[:12]}")
    real = {"base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0"}
    assert origin(BUILTIN, builtin) == origin(builtin, builtin) == real
    unpacked = model(models / "gguf-2-0123")
    (tmp_path / "qwen.gguf").touch()
    assert origin(tmp_path / "qwen.gguf", unpacked) == {"base_model": "qwen"}
    assert origin(unpacked, unpacked) == {}
    snapshot = model(tmp_path / "hub/models--Qwen--Qwen3-0.6B/snapshots/c1899de")
    assert origin(snapshot, snapshot) == {"base_model": "Qwen/Qwen3-0.6B"}
    assert origin("Qwen/Qwen3-0.6B", snapshot) == {"base_model": "Qwen/Qwen3-0.6B"}


def test_the_front_matter_is_what_the_hub_reads() -> None:
    source = {"name": "a", "base_model": "org/a", "license": "mit", "sha256": {}}
    record = {
        "moefy": "0.1.0",
        "stage": "convert",
        "recipe": {"experts": 8, "active": 4, "shared": 2},
        "source": source,
        "versions": {},
    }
    card = model_card(record, {"model_type": "granitemoeshared"})
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "base_model": "org/a",
        "base_model_relation": "finetune",
        "license": "mit",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "moefy"],
    }
    assert "# a, converted by moefy" in card
