"""The README's own commands, run as written, in an empty folder."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from publish_demo import shown
from tests.conftest import write_small_llama
from tests.pages import ROOT, blocks
from transformers import AutoModelForCausalLM

README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
ENVIRONMENT = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def block(language: str, containing: str) -> str:
    found = [each.text for each in blocks(ROOT / "README.md", language) if containing in each.text]
    assert len(found) == 1
    return found[0]


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(
        command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=["tiny", pytest.param("smollm2-135m", marks=pytest.mark.slow)])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A random model with SmolLM2's tokenizer, which takes seconds, and the README's own."""
    if request.param == "tiny":
        write_small_llama(tmp_path / "tiny")
    return str(request.param)


@pytest.mark.timeout(2400)
def test_the_commands(model: str, tmp_path: Path) -> None:
    lines = block("bash", "moefy convert").replace("smollm2-135m", model).splitlines()
    assert [line.split()[1] for line in lines] == [
        "inspect",
        "convert",
        "train",
        "eval",
        "export",
    ]
    # wide enough for every column
    outputs = [run(["bash", "-c", f"COLUMNS=200 {line}"], tmp_path) for line in lines]
    for number in ("6.74B", "2.95B", "3.49B"):
        assert number in outputs[0]
    trained_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out/trained")
    assert trained_model.config.model_type == "granitemoeshared"
    column = next(line for line in outputs[3].splitlines() if "perplexity" in line)
    at = [name.strip() for name in re.split("[│┃]", column)].index("perplexity")
    rows = [line.split("│") for line in outputs[3].splitlines() if line.startswith("│")]
    dense, converted, trained = (float(row[at].replace(",", "")) for row in rows)
    assert trained < converted
    assert dense < trained or model == "tiny"  # a random model learns the text itself
    assert (tmp_path / "out/moe.gguf").read_bytes()[:4] == b"GGUF"


def test_the_python_lines(model: str, tmp_path: Path) -> None:
    code = block("python", "import moefy").replace("smollm2-135m", model)
    assert len([line for line in code.splitlines() if line.strip()]) == 6
    run([sys.executable, "-c", code], tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_make_demo(tmp_path: Path) -> None:
    """`make demo` as in the README, with less training so that the tests end sooner."""
    assert "make demo" in block("bash", "make demo")
    out = tmp_path / "demo"
    arguments = f"ARGS=--tokens 4096 {out}"
    printed = run(["make", "demo", f"VENV={sys.prefix}", arguments], ROOT)
    assert "Report:" in printed
    results = json.loads((out / "results.json").read_text())
    dense, random_split, converted, recovered = (
        r["perplexity"] for r in results["comparison"]["results"]
    )
    assert dense < recovered < converted < 5 * dense < random_split
    assert results["peak_rss_bytes"] < 6 * 2**30
    AutoModelForCausalLM.from_pretrained(out / "recovered")
    for name in ("loss.png", "results.md"):
        assert (out / name).stat().st_size > 0
    page = Page()
    page.feed((out / "report.html").read_text())
    assert page.figures == 3
    assert not page.outside, "the report must not need anything from elsewhere"


class Page(HTMLParser):
    """Counts figures and collects what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.figures = 0
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.figures += tag == "img"
        values = dict(attrs)
        target = values.get("src") or values.get("href") or values.get("xlink:href") or "#"
        if tag in {"script", "link", "iframe"} or not target.startswith(("#", "data:")):
            self.outside.append(f"{tag} {target}")


def test_the_readmes_table_is_the_committed_result() -> None:
    results = json.loads((ROOT / "docs/demo/results.json").read_text())
    assert f"<!-- demo -->\n{shown(results)}<!-- /demo -->" in README
