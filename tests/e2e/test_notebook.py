"""The notebook in examples/ runs as it stands."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "examples/convert_and_recover.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # jupyter's own
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NOTEBOOK_TOKENS", "1536")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=800, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = notebook.cells[-1].outputs
    shown = "".join(o.text for o in outputs if o.get("name") == "stdout").splitlines()
    names = [line.split()[0].rpartition("/")[2] for line in shown]
    assert names == ["smollm2-135m", "moe", "trained"]
    dense, moe, trained = (float(line.split()[-1]) for line in shown)
    assert dense < trained < moe
