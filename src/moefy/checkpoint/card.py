"""The model card that lies in a converted, trained or tuned folder."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from jinja2 import Environment, StrictUndefined
from pydantic import BaseModel, Field, model_validator

from moefy.checkpoint.reader import read_json
from moefy.checkpoint.targets import is_unbiased_in_vllm
from moefy.errors import CheckpointError
from moefy.recipe import ConvertRecipe
from moefy.storage import parse_json

RECORD = "moefy.json"

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
"""OWNER/MODEL, a place on the hub."""
_NOT_CHOSEN = {"train": ("source", "parent", "data", "text"), "tune": ("source", "data", "tokens")}
_DONE = {"convert": "converted", "train": "trained", "tune": "tuned"}
_MARKS = "<!-- results -->", "<!-- /results -->"
_BETWEEN = re.compile(rf"{_MARKS[0]}.*?{_MARKS[1]}\n?", re.DOTALL)
_UNMEASURED = (
    "## Results\n\nThis model was not measured yet. `moefy report OUT DENSE THIS` measures it and "
    "writes the table here."
)


class _Source(BaseModel, extra="allow"):
    name: str
    sha256: dict[str, str]
    config: dict[str, Any]
    base_model: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None


class _Recipe(BaseModel, extra="allow"):
    experts: int
    active: int
    shared: int


class _Calibration(BaseModel, extra="allow"):
    data: str
    tokens: int
    sha256: str


class _Run(BaseModel, extra="allow"):
    source: dict[str, str]
    data: str | None


class _Record(BaseModel, extra="allow"):
    """What `convert`, `train` and `tune` write; the card and the report read these keys."""

    stage: Literal["convert", "train", "tune"]
    moefy: str
    versions: dict[str, str]
    recipe: _Recipe | None = None
    source: _Source | None = None
    calibration: _Calibration | None = None
    run: _Run | None = None
    earlier: _Record | None = Field(None, alias="from")

    @model_validator(mode="after")
    def _has_its_stage(self) -> Self:
        wanted = (self.recipe, self.source) if self.stage == "convert" else (self.run,)
        if None in wanted:
            raise ValueError(f"it does not say how {self.stage} made the model")
        return self


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return a model folder's moefy.json, None if there is none.

    Raises:
        CheckpointError: it is damaged, or does not say how the model was made.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    remedy = "copy it again from where the model is from, or move it away"
    record = read_json(file)
    parse_json(json.dumps(record).encode(), _Record, str(file), remedy, CheckpointError)
    return record


def model_card(
    record: Mapping[str, Any], config: Mapping[str, Any], dense: Mapping[str, str] | None = None
) -> str:
    """Return README.md: what the model is, how to load it, how it was made, its results and limits.

    Args:
        record: the content of moefy.json.
        config: the model's config.json.
        dense: `source.origin` of the dense model, where the record has no conversion.
    """
    steps = steps_of(record)
    first, is_split = steps[0], steps[0]["stage"] == "convert"
    source = first["source"] if is_split else dense or {}
    base = source.get("base_model") or source.get("name")
    is_public = bool(base and HUB_NAME.fullmatch(base))  # the hub takes no others
    front = {
        "base_model": base if is_public else None,
        "base_model_relation": "finetune" if is_public else None,
        **{key: source.get(key) for key in ("license", "license_name", "license_link")},
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "moefy"] if is_split else ["moefy"],
    }
    known = {key: value for key, value in front.items() if value is not None}
    name = base.rpartition("/")[2] if base else f"A {config['model_type']} model"
    done = " and ".join(dict.fromkeys(_DONE[step["stage"]] for step in steps))
    card = rendered(
        "moefy.checkpoint",
        "card.md.j2",
        front=yaml.safe_dump(known, sort_keys=False),
        name=name,
        done=done,
        base=base,
        model_type=config["model_type"],
        unbiased_in_vllm=is_unbiased_in_vllm(config),
        recipe=first["recipe"] if is_split else None,
        steps=steps,
        command_of=command_of,
        recipe_of=recipe_of,
    )
    return with_results(card, _UNMEASURED)


def rendered(package: str, name: str, /, **values: Any) -> str:
    """Return a template of a package, filled in; in HTML whatever comes from a file is text."""
    template = Environment(
        autoescape=".html" in name,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    ).from_string((files(package) / name).read_text())
    return template.render(values)


def recipe_of(step: Mapping[str, Any]) -> str:
    """Return the choices of one step as YAML: a moefy.json's, or those of what it came `from`."""
    chosen = step.get("recipe")
    if chosen is None:
        left_out = _NOT_CHOSEN[step["stage"]]
        chosen = {key: value for key, value in step["run"].items() if key not in left_out}
    return yaml.safe_dump(json.loads(json.dumps(chosen)), sort_keys=False)


def command_of(step: Mapping[str, Any]) -> str:
    """Return the command that does one step again; train and tune need its recipe.yaml too."""
    if step["stage"] == "convert":
        words = ["convert", step["source"]["name"], "OUT"]
        if found := step.get("calibration"):
            words += ["--data", found["data"]]
        usual = ConvertRecipe.model_fields
        for key, value in step["recipe"].items():
            if value is not None and not (key in usual and usual[key].default == value):
                words += ["--set", f"{key}={value}"]
    else:
        words = [step["stage"], "MODEL", "OUT"]
        words += ["--data", step["run"]["data"]] if step["run"]["data"] else []
        words += ["--recipe", "recipe.yaml"]
    return shlex.join(["moefy", *words])


def steps_of(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the records of all steps in the order in which they were done."""
    steps = [record]
    while steps[0].get("from"):
        steps.insert(0, steps[0]["from"])
    return steps


def with_results(card: str, results: str) -> str:
    """Return a card with a section of results, in the place of an earlier one or at the end."""
    block = f"{_MARKS[0]}\n{results.strip()}\n{_MARKS[1]}\n"
    # a function, because a replacement text would have its backslashes read
    text, count = _BETWEEN.subn(lambda _: block, card, count=1)
    return text if count else f"{card.rstrip()}\n\n{block}"
