"""The verbs are functions, whatever was imported before."""

from __future__ import annotations

import importlib
import pkgutil

import pytest

import moefy


def test_no_module_hides_a_verb() -> None:
    for module in pkgutil.walk_packages(moefy.__path__, "moefy."):
        importlib.import_module(module.name)
    for name in moefy.__all__:
        assert callable(getattr(moefy, name)), name
        assert name in dir(moefy)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="'nothing'"):
        moefy.nothing  # noqa: B018
