"""The documentation as a reader uses it: its blocks are run, its site is built."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import write_small_llama
from tests.e2e.test_readme import ENVIRONMENT, run
from tests.pages import ROOT, TAUGHT, blocks


def _write(file: Path, records: Iterable[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with what the pages ask the reader for: a model, texts, conversations."""
    write_small_llama(tmp_path / "my-model")
    (tmp_path / "my-texts").mkdir()
    for name in ("letters", "notes"):
        sentences = (f"the {i % 7} small words of {name} again. " for i in range(400))
        records = ({"text": f"{i}: {text * 20}"} for i, text in enumerate(sentences))
        _write(tmp_path / f"my-texts/{name}.jsonl", records)
    said = {"role": "assistant", "content": "Yes."}
    talks = ({"messages": [{"role": "user", "content": f"{i}?"}, said]} for i in range(60))
    _write(tmp_path / "conversations.jsonl", talks)
    return tmp_path


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("page", TAUGHT, ids=lambda page: page.stem)
def test_the_blocks_run(page: Path, place: Path) -> None:
    for block in blocks(page, "bash", "python"):
        if block.why_not is None:
            shell = ["bash", "-ec"] if block.language == "bash" else [sys.executable, "-c"]
            run([*shell, block.text], place)


def test_the_site_is_built_without_a_warning_and_needs_no_network(tmp_path: Path) -> None:
    site = tmp_path / "site"
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)],
        cwd=ROOT,
        env=ENVIRONMENT | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    fetched = re.compile(r"""<(?!a )[^>]*(?:src|href)=["']?https?:|@import|url\(["']?https?:""")
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(files) > len(TAUGHT)
    assert not {
        file.name: found[0] for file in files if (found := fetched.search(file.read_text()))
    }
