"""The code blocks and commands of the documentation."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import publish_api
from typer.main import get_command

from moefy.cli import app
from moefy.cli.options import parse_settings
from moefy.recipe import own_recipes

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TAUGHT = [
    page
    for page in PAGES
    if page.name == "index.md" or page.parent.name in ("tutorials", "howto", "explanation")
]
"""Pages whose blocks are run; on the others they name files of the reader's."""
_FENCE = re.compile(
    r"(?:^ *<!-- not run: (?P<why>[^>]*) -->\n\n)?^(?P<indent> *)```(?P<language>\w*)\n"
    r"(?P<text>.*?)^(?P=indent)```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A code block of a page."""

    page: Path
    language: str
    text: str
    why_not: str | None  # why it is not run

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text[:40]!r}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """Return a page's code blocks in some languages."""
    return [
        Block(page, found["language"], _outdented(found["text"], found["indent"]), found["why"])
        for found in _FENCE.finditer(page.read_text())
        if found["language"] in languages
    ]


def _outdented(text: str, indent: str) -> str:
    return re.sub(f"^{indent}", "", text, flags=re.MULTILINE)


def prose(page: Path) -> str:
    """Return a page without its code blocks."""
    return _FENCE.sub("", page.read_text())


def commands(text: str) -> Iterator[list[str]]:
    """Yield what stands behind `moefy` in the lines of a shell block."""
    for line in text.replace("\\\n", " ").splitlines():
        if "moefy" in (words := shlex.split(line, comments=True)):
            rest = words[words.index("moefy") + 1 :]
            end = next((i for i, word in enumerate(rest) if word in {"|", ">", "&&"}), len(rest))
            if words[0] != "pip":
                yield rest[:end]


def found_command(words: list[str]) -> tuple[list[str], Any, list[str]]:
    """Return the names of a command, the command, and the words behind it."""
    command, names, rest = get_command(app), [], list(words)
    while rest and rest[0] in (below := getattr(command, "commands", {})):
        command = below[rest[0]]
        names.append(rest.pop(0))
    return names, command, rest


def check(words: list[str]) -> None:
    """Raise an error unless the command line would take these words."""
    names, command, rest = found_command(words)
    is_group = hasattr(command, "commands")
    assert not is_group or not rest or rest[0].startswith("-"), f"no command {rest[0]}"
    if "--help" in rest or (is_group and not rest):
        return
    given = command.make_context(" ".join(names), rest).params
    if names and (recipe := publish_api.RECIPES.get(names[0])):
        keys = {key: given[key] for key in recipe.model_fields if given.get(key) is not None}
        file = given["recipe"] if given["recipe"] in own_recipes() else None
        recipe.build(file, **parse_settings(given["settings"]) | keys)
