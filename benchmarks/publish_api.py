"""Write docs/api.md from the docstrings of moefy's functions and recipes.

    python benchmarks/publish_api.py

`tests/unit/test_docs.py` compares the page with what this script makes.
"""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import moefy
from moefy.recipe import ConvertRecipe, Recipe
from moefy.studies.recipe import StudyRecipe
from moefy.training.recipe import TrainRecipe, TuneRecipe

PAGE = Path(__file__).parents[1] / "docs/api.md"
RECIPES: tuple[type[Recipe], ...] = (*(ConvertRecipe, TrainRecipe, TuneRecipe, StudyRecipe),)


def page() -> str:
    """Return the whole page."""
    parts = ["# Python API", "Made by `benchmarks/publish_api.py` from the docstrings."]
    names = [name for name in moefy.__all__ if inspect.isfunction(getattr(moefy, name))]
    for name in sorted(names):
        function = getattr(moefy, name)
        parameters = ",\n    ".join(map(shown, inspect.signature(function).parameters.values()))
        returns = function.__annotations__.get("return", "None")
        parts.append(f"## moefy.{name}")
        parts.append(f"```python\n{name}(\n    {parameters},\n) -> {returns}\n```")
        parts.append(markdown(inspect.getdoc(function) or ""))
    parts.append("# Recipes")
    for recipe in RECIPES:
        parts.append(f"## {recipe.__name__}")
        parts.append(markdown(inspect.getdoc(recipe) or ""))
        rows = [
            f"| `{name}` | {field.get_default(call_default_factory=True)!r} "
            f"| {field.description or ''} |"
            for name, field in recipe.model_fields.items()
        ]
        parts.append("\n".join(["| key | default | what it sets |", "| --- | --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def shown(parameter: inspect.Parameter) -> str:
    """Return a parameter as it stands in a signature."""
    stars = {parameter.VAR_KEYWORD: "**", parameter.VAR_POSITIONAL: "*"}.get(parameter.kind, "")
    default = parameter.default
    named = getattr(default, "__name__", repr(default))
    value = "" if default is parameter.empty else f" = {named}"
    return f"{stars}{parameter.name}: {parameter.annotation}{value}"


def markdown(docstring: str) -> str:
    """Return a Google docstring as Markdown: its sections become code blocks."""
    before, *rest = re.split(r"\n(?=(?:Args|Attributes|Raises|Returns|Yields):\n)", docstring)
    sections = []
    for section in rest:
        title, _, body = section.partition(":\n")
        sections.append(f"**{title}**\n\n```text\n{inspect.cleandoc(body)}\n```")
    return "\n\n".join([before.strip(), *sections])


if __name__ == "__main__":
    PAGE.write_text(page())
