"""Recipes: YAML files of keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import yaml

from moefy.recipe import ConvertRecipe, Recipe
from moefy.training.recipe import TrainRecipe, TuneRecipe
from tests.fuzz.changes import VALUES, byte_changes, value_changes

COMMANDS = {
    "recipe of convert": "convert dense out --recipe r.yaml --experts 4 --active 2 "
    "--partition random --router random --repair none",
    "recipe of train": "train moe out --data text --recipe r.yaml --tokens 64 "
    "--set sequence_length=32 --set global_batch_size=1",
    "recipe of tune": "tune moe out --data talks.jsonl --recipe r.yaml --set epochs=1 "
    "--set global_batch_size=40 --set sequence_length=128",
}
_RECIPES: dict[str, Recipe] = {
    "recipe of convert": ConvertRecipe(),
    "recipe of train": TrainRecipe(),
    "recipe of tune": TuneRecipe(),
}


def mutations(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    file = folder / "r.yaml"
    for kind, recipe in _RECIPES.items():
        text = recipe.to_yaml()
        for what, content in byte_changes(text.encode(), 60):
            yield f"{kind}: {what}", partial(file.write_bytes, content)
        for what, values in value_changes(yaml.safe_load(text), 120, values=VALUES):
            written = yaml.safe_dump(values, allow_unicode=True)
            yield f"{kind}: {what}", partial(file.write_text, written)
