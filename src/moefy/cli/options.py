"""Options that several commands have, and how their values are read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moefy.errors import UsageError

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a model in OUT.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
RecipeFile = Annotated[Path | None, typer.Option(help="YAML file with any of the settings.")]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any recipe setting, as in a.b=1."),
]
Data = Annotated[str, typer.Option(help="Folder of DOMAIN.jsonl(.gz) files, hf:DATASET or 'demo'.")]
Models = Annotated[list[str], typer.Argument(help="Models; put the dense one among them.")]
SplitName = Annotated[str, typer.Option(help="heldout, train or all.")]
Windows = Annotated[int, typer.Option(min=1, help="Per domain.")]
SequenceLength = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
Limit = Annotated[int | None, typer.Option(help="Items of each benchmark. [all]")]
Hub = Annotated[
    bool | None, typer.Option("--hub/--no-hub", help="Benchmarks from the hub. [if it answers]")
]


def given(**choices: Any) -> dict[str, Any]:
    """Return the choices that were made: those that are not None."""
    return {key: value for key, value in choices.items() if value is not None}


def counts(option: str, text: str) -> list[int]:
    """Return the whole numbers that an option lists."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"{option} {text!r}: write whole numbers, as in 1,8") from None


def listed(texts: list[str] | None) -> list[str]:
    """Return the names that an option lists: separated by commas, given again, or both."""
    return [part.strip() for text in texts or () for part in text.split(",") if part.strip()]


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """Return what `--set KEY=VALUE` says, by key."""
    import yaml

    choices = {}
    for setting in settings or []:
        key, separator, value = setting.partition("=")
        if not separator:
            raise UsageError(f"--set {setting}: write KEY=VALUE")
        try:
            choices[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UsageError(f"--set {setting}: {value!r} is not valid YAML") from error
    return choices
