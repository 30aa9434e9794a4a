"""Norms and routers trained through the whole model: what changes, and what it gains."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import write_tiny_model
from transformers import AutoModelForCausalLM

import moefy
from moefy.calibrate.text import calibration_windows
from moefy.checkpoint.targets import TARGETS
from moefy.construct import convert as construct
from moefy.construct.repair.fit import fit_ffn
from moefy.errors import OutputError, UsageError
from moefy.progress import Progress

SETTINGS: dict[str, Any] = {
    "experts": 8,
    "active": 4,
    "calibration_tokens": 4096,
    "calibration_length": 64,
    "fit_epochs": 0.5,
    "end_to_end_learning_rate": 1e-3,
}
FORMS = [
    ("llama", 0, "mixtral"),
    ("llama", 2, "granitemoeshared"),
    ("llama", 2, "glm4_moe"),
    ("llama", 4, None),
    ("granite", 0, "granitemoe"),
    ("qwen3", 0, "qwen3_moe"),
    ("mistral", 2, "granitemoe_swa"),
    ("phi3", 4, None),
]


def write_sure_model(folder: Path, family: str) -> Path:
    """Write a tiny model whose predictions are far from uniform, so that there is a divergence."""
    settings = {"sliding_window": 64} if family == "mistral" else {}
    write_tiny_model(folder, family, tie_word_embeddings=False, **settings)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] *= 60
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def predictions(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return AutoModelForCausalLM.from_pretrained(folder)(ids).logits.log_softmax(-1)


@pytest.mark.parametrize(("family", "shared", "target"), FORMS)
def test_norms_and_routers_alone_change_and_bring_the_model_nearer(
    tmp_path: Path,
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    shared: int,
    target: str | None,
) -> None:
    for module in ("convert", "repair.fit", "repair.end_to_end"):
        monkeypatch.setattr(f"moefy.construct.{module}.training_precision", lambda _: "float32")
    dense = write_sure_model(tmp_path / "dense", family)
    settings = SETTINGS | {"shared": shared, "target": target}
    moefy.convert(dense, tmp_path / "before", data=corpus, **settings, end_to_end_epochs=0)
    made = moefy.convert(dense, tmp_path / "after", data=corpus, **settings, end_to_end_epochs=2)

    files = [load_file(tmp_path / name / "model.safetensors") for name in ("before", "after")]
    assert files[0].keys() == files[1].keys()
    changed = {name for name in files[0] if not torch.equal(files[0][name], files[1][name])}
    norms = {name for name in files[0] if name.endswith("norm.weight")}
    routers = {name for name in files[0] if TARGETS[target].router in name} if target else set()
    assert changed == norms | routers
    assert len(routers) == (2 if target else 0)

    windows = calibration_windows(corpus, dense, tokens=4096, sequence_length=64, needed_tokens=1)
    held_out = torch.from_numpy(windows[-(len(windows) // 16) :])
    expected = predictions(dense, held_out)
    record = json.loads((tmp_path / "after/moefy.json").read_text())["end_to_end"]
    for name in ("before", "after"):
        found = predictions(tmp_path / name, held_out)
        divergence = (expected.exp() * (expected - found)).sum(-1).mean()
        assert record[name] == pytest.approx(float(divergence), rel=1e-3)
    assert made.kl == record["after"] < record["before"]


def test_a_training_that_gains_nothing_changes_nothing(tmp_path: Path, corpus: Path) -> None:
    dense = write_sure_model(tmp_path / "dense", "llama")
    settings = SETTINGS | {"shared": 0}
    moefy.convert(dense, tmp_path / "before", data=corpus, **settings, end_to_end_epochs=0)
    moefy.convert(
        dense, tmp_path / "after", data=corpus, **settings | {"end_to_end_learning_rate": 100.0}
    )
    one, two = (tmp_path / name / "model.safetensors" for name in ("before", "after"))
    assert one.read_bytes() == two.read_bytes()


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path, corpus: Path) -> None:
    dense = write_sure_model(tmp_path / "dense", "llama")
    for name in ("one", "two"):
        moefy.convert(dense, tmp_path / name, data=corpus, **SETTINGS)
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_large_models_and_other_repairs_are_not_trained(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = write_sure_model(tmp_path / "dense", "llama")
    monkeypatch.setattr(construct, "_MOST_BYTES", 1000)
    made = moefy.convert(dense, tmp_path / "large", data=corpus, **SETTINGS)
    assert made.recipe.end_to_end_epochs == 0
    made = moefy.convert(dense, tmp_path / "asked", data=corpus, **SETTINGS, end_to_end_epochs=0.5)
    assert made.recipe.end_to_end_epochs == 0.5
    with pytest.raises(UsageError, match="end_to_end_epochs is 1"):
        moefy.convert(dense, tmp_path / "no", repair="refit", end_to_end_epochs=1)


def test_a_long_conversion_goes_on_behind_its_last_layer(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = write_sure_model(tmp_path / "dense", "llama")
    settings = SETTINGS | {"effort": "high"}
    moefy.convert(dense, tmp_path / "whole", data=corpus, **settings)
    fitted: list[int] = []

    def fit(tokens: Any, split: Any, recipe: Any, generator: Any) -> Any:
        fitted.append(1)
        return fit_ffn(tokens, split, recipe, generator)

    def stop(progress: Progress) -> None:
        if progress.stage == "convert" and progress.done == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(construct, "fit_ffn", fit)
    with pytest.raises(KeyboardInterrupt):
        moefy.convert(dense, tmp_path / "out", data=corpus, report=stop, **settings)
    assert not (tmp_path / "out/config.json").exists()
    with pytest.raises(OutputError, match="other settings"):
        moefy.convert(dense, tmp_path / "out", data=corpus, **settings | {"seed": 1})
    moefy.convert(dense, tmp_path / "out", data=corpus, **settings)
    assert len(fitted) == 2  # one layer each time
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        file.name for file in (tmp_path / "whole").iterdir()
    }
    one, two = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == two.read_bytes()
