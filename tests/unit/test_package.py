"""The verbs are functions, whatever was imported before."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import moefy

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(ROOT.glob("benchmarks/*.py"))


def test_no_module_hides_a_verb() -> None:
    for module in pkgutil.walk_packages(moefy.__path__, "moefy."):
        importlib.import_module(module.name)
    for name in moefy.__all__:
        assert callable(getattr(moefy, name)), name
        assert name in dir(moefy)


def test_editors_see_the_names_that_there_are() -> None:
    """The imports for editors and mypy, which Python never runs, say what the table says."""
    tree = ast.parse(inspect.getsource(moefy))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    shown = {
        alias.asname: f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname
    }
    aliases = {"bench", "load", "routing", "suite"}
    assert {name: f"moefy.{moefy._HOME[name]}" for name in set(moefy.__all__) - aliases} == shown
    assert moefy.bench is moefy.measure_speed


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'nothing'"):
        moefy.nothing  # noqa: B018


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_import_what_there_is(script: Path) -> None:
    """The scripts take hours and are not run here; their names must follow the package's."""
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("moefy"):
            module = importlib.import_module(str(node.module))
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")
