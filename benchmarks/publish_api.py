"""Write the pages of the reference: docs/api.md, docs/recipes.md and docs/cli.md.

    python benchmarks/publish_api.py

They come from the docstrings of moefy's functions, the fields of its recipes and the command
line itself. `tests/unit/test_docs.py` compares the pages with what this script makes.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from typer.main import get_command

import moefy
from moefy.cli import app
from moefy.recipe import ConvertRecipe, Recipe, own_recipes
from moefy.studies.recipe import StudyRecipe
from moefy.training.recipe import TrainRecipe, TuneRecipe

DOCS = Path(__file__).parents[1] / "docs"
RECIPES: dict[str, type[Recipe]] = {
    "convert": ConvertRecipe,
    "train": TrainRecipe,
    "tune": TuneRecipe,
    "study": StudyRecipe,
}
"""The recipe of each command that has one."""


def api() -> str:
    """Return the page of the Python functions."""
    parts = ["# Python API", "Made by `benchmarks/publish_api.py` from the docstrings."]
    names = [name for name in moefy.__all__ if inspect.isfunction(getattr(moefy, name))]
    for name in sorted(names):
        function = getattr(moefy, name)
        parameters = ",\n    ".join(map(shown, inspect.signature(function).parameters.values()))
        returns = function.__annotations__.get("return", "None")
        parts.append(f"## moefy.{name}")
        parts.append(f"```text\n{name}(\n    {parameters},\n) -> {returns}\n```")
        parts.append(markdown(inspect.getdoc(function) or ""))
    return "\n\n".join(parts) + "\n"


def recipes() -> str:
    """Return the page of the recipes: every key, and the recipes that come with moefy."""
    parts = [
        "# Recipes",
        "Made by `benchmarks/publish_api.py` from the recipes' fields.",
        "A recipe holds every setting of a command. `--recipe` takes a YAML file with any of its "
        "keys, or the name of a recipe that comes with moefy; `--set KEY=VALUE` sets one key, and "
        "`a.b` is key `b` of `a`. The Python functions take keys as keywords. An unknown key is "
        "refused. The resolved recipe lies in `moefy.json` of every folder that moefy writes.",
    ]
    sections: list[str] = []
    for command, recipe in RECIPES.items():
        parts += [f"## moefy {command}", markdown(inspect.getdoc(recipe) or ""), key_table(recipe)]
        for key, part in parts_of(recipe):
            section = [f"### {key}", markdown(inspect.getdoc(part) or ""), key_table(part)]
            sections += section if f"### {key}" not in sections else []
    parts += ["## Keys of keys", *sections]
    parts.append("## Recipes that come with moefy")
    for name, file in own_recipes().items():
        parts += [f"### {name}", f"```yaml\n{file.read_text()}```"]
    return "\n\n".join(parts) + "\n"


def key_table(recipe: type[Recipe]) -> str:
    """Return a table of a recipe's own keys."""
    rows = ["| key | values | default | what it sets |", "| --- | --- | --- | --- |"]
    for name, field in recipe.model_fields.items():
        default = field.get_default(call_default_factory=True)
        value = "[below](#keys-of-keys)" if isinstance(default, Recipe) else f"`{default!r}`"
        cells = [f"`{name}`", values(field.annotation), value, field.description or ""]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def values(kind: Any) -> str:
    """Return which values a type allows."""
    inside = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) is Literal:
        return ", ".join(f"`{name}`" for name in inside)
    if get_origin(kind) is dict:
        return "mapping"
    if get_origin(kind) is tuple:
        return "list of " + values(inside[0])
    if get_origin(kind) is Annotated:
        return values(inside[0])
    if inside:
        return " or ".join(dict.fromkeys(map(values, inside)))
    return "mapping" if issubclass(kind, Recipe) else str(kind.__name__)


def parts_of(recipe: type[Recipe]) -> Iterator[tuple[str, type[Recipe]]]:
    """Yield the recipes that are values of a recipe's keys, by key."""

    def inside(kind: Any) -> Iterator[type[Recipe]]:
        if isinstance(kind, type) and issubclass(kind, Recipe):
            yield kind
        for part in get_args(kind):
            yield from inside(part)

    for key, field in recipe.model_fields.items():
        for part in inside(field.annotation):
            kind = part.model_fields.get("kind")
            yield (f"{key}: {kind.default}" if kind else key), part


def cli() -> str:
    """Return the page of the command line, one section for each command."""
    parts = [
        "# Command line",
        "Made by `benchmarks/publish_api.py` from the commands themselves; `moefy COMMAND --help` "
        "shows the same. [Recipes](recipes.md) has the keys that `--set` takes. A command ends "
        "with exit code 0, with 2 where the input or the command is at fault, and with 1 where "
        "the run failed; `moefy --debug COMMAND` shows the traceback.",
    ]
    for name, command in commands("moefy", get_command(app)):
        text, _, example = inspect.cleandoc(command.help or "").partition("Example: ")
        parts += [f"## {name}", text.strip()]
        if example:
            parts.append(f"```bash\n{example.strip('` ')}\n```")
        records = (p.get_help_record(command.context_class(command)) for p in command.params)
        rows = [f"| {cell(f'`{what}`')} | {cell(text)} |" for what, text in filter(None, records)]
        if rows:
            parts.append("\n".join(["| argument or option | what it is |", "| --- | --- |", *rows]))
    return "\n\n".join(parts) + "\n"


def cell(text: str) -> str:
    """Return a text as it stands in a table's cell."""
    return text.replace("|", "\\|")


def commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    """Yield a command and those below it, by what is typed."""
    yield name, command
    for word, below in getattr(command, "commands", {}).items():
        yield from commands(f"{name} {word}", below)


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


PAGES = {"api": api, "recipes": recipes, "cli": cli}


if __name__ == "__main__":
    for name, page in PAGES.items():
        (DOCS / f"{name}.md").write_text(page())
