"""`moefy demo` on a tiny model: its folder, its numbers, and what a kill leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.conftest import write_tiny_llama
from transformers import AutoModelForCausalLM

from moefy.errors import OutputError
from moefy.progress import Progress
from moefy.report import demo

SMALL = {"experts": 4, "active": 2, "tokens": 2048}


@pytest.fixture(autouse=True)
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a tiny model stand in for SmolLM2-135M."""
    dense = write_tiny_llama(tmp_path / "dense", max_position_embeddings=512)
    monkeypatch.setattr(demo, "BUILTIN", str(dense))


def test_the_folder_and_its_numbers(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    done = demo.demo(out, **SMALL)
    results = json.loads((out / "results.json").read_text())
    assert [r["name"] for r in results["comparison"]["results"]] == [
        *("dense", "random split", "converted", "recovered"),
    ]
    assert (
        results["comparison"]["results"][3]["perplexity"] == done.comparison.results[3].perplexity
    )
    assert results["train_recipe"]["tokens"] == 2048
    assert results["train_recipe"]["distillation"]["alpha"] == 0.5  # of the recipe "demo"
    assert {"elapsed_s", "peak_rss_bytes", "machine"} < set(results)
    page = (out / "report.html").read_text()
    assert page.count("<img") == 3
    assert "of the parameters active per token" in page
    for name in ("random-split", "converted", "recovered"):
        AutoModelForCausalLM.from_pretrained(out / name)
    before = {file.name for file in tmp_path.iterdir()}
    with pytest.raises(OutputError, match="pass --overwrite"):
        demo.demo(out, **SMALL)
    demo.demo(out, overwrite=True, **SMALL)
    assert {file.name for file in tmp_path.iterdir()} == before


def test_an_interrupted_demo_leaves_nothing(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.stage == "evaluate":
            raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    with pytest.raises(KeyboardInterrupt):
        demo.demo(tmp_path / "demo", report=stop, **SMALL)
    assert set(tmp_path.iterdir()) == before
