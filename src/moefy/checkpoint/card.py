"""The model card that lies in a converted, trained or tuned folder."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field

from moefy.errors import CheckpointError
from moefy.recipe import ConvertRecipe
from moefy.storage import read_json

RECORD = "moefy.json"

_NOT_CHOSEN = {"train": ("source", "parent", "data", "text"), "tune": ("source", "data", "tokens")}
_DONE = {"convert": "converted", "train": "trained", "tune": "tuned"}
_MARKS = "<!-- results -->", "<!-- /results -->"
_BETWEEN = re.compile(rf"{_MARKS[0]}.*?{_MARKS[1]}\n?", re.DOTALL)
_UNMEASURED = (
    "## Results\n\nThis model was not measured yet. `moefy report OUT DENSE THIS` measures it and "
    "writes the table here."
)
_LIMITS = """## Limits

- The model is not the dense model: the conversion changes what it computes. Compare the two before
  use (`moefy eval DENSE THIS`).
- Fewer active parameters are not a promise of speed, which depends on the runtime, the number of
  experts and their size.
- Knowledge, biases and unsafe answers of the dense model remain, and so does its license.
"""


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


class _Step(BaseModel, extra="allow"):
    moefy: str
    versions: dict[str, str]


class _Converted(_Step):
    stage: Literal["convert"]
    recipe: _Recipe
    source: _Source
    calibration: _Calibration | None = None


class _Run(BaseModel, extra="allow"):
    source: dict[str, str]
    data: str | None


class _Tuning(BaseModel, extra="allow"):
    conversations: int
    heldout_before: float | None
    heldout_after: float | None


class _Learned(_Step):
    run: _Run
    earlier: _Record | None = Field(alias="from")


class _Trained(_Learned):
    stage: Literal["train"]


class _Tuned(_Learned):
    stage: Literal["tune"]
    result: _Tuning


_Record = Annotated[_Converted | _Trained | _Tuned, Field(discriminator="stage")]


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return a model folder's moefy.json, None if there is none.

    Raises:
        CheckpointError: it is damaged, or does not say how the model was made.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    remedy = "copy it again from where the model is from, or move it away"
    read_json(file, _Record, remedy, error=CheckpointError)
    return json.loads(file.read_bytes())


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
    front = {
        "base_model": base,
        **{key: source.get(key) for key in ("license", "license_name", "license_link")},
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "moefy"] if is_split else ["moefy"],
    }
    known = {key: value for key, value in front.items() if value is not None}
    name = base.rpartition("/")[2] if base else f"A {config['model_type']} model"
    done = " and ".join(dict.fromkeys(_DONE[step["stage"]] for step in steps))
    what = f"A `{config['model_type']}` model"
    if is_split:
        recipe = first["recipe"]
        what += f" made from the dense `{base}`: every FFN "
        if routed := recipe["active"] - recipe["shared"]:
            what += (
                f"is cut into {recipe['experts']} slices, of which {recipe['active']} run per "
                f"token: {recipe['shared']} always, {routed} by the router's choice."
            )
        else:
            what += f"keeps {recipe['shared']} of {recipe['experts']} slices."
    else:
        what += f", {done} by moefy."
    made = "\n".join(map(_how, steps))
    card = f"""---
{yaml.safe_dump(known, sort_keys=False)}---

# {name}, {done} by moefy

{what}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```

## How it was made

{made}
{_LIMITS}"""
    return with_results(card, _UNMEASURED)


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


def _how(step: Mapping[str, Any]) -> str:
    """Return what one step did: command, versions, data, hashes of what it was made from."""
    versions = ", ".join(f"{name} {number}" for name, number in step["versions"].items())
    text = f"```bash\n{command_of(step)}\n```\n\nwith moefy {step['moefy']} ({versions})"
    if step["stage"] != "convert":
        text += f" and this recipe.yaml:\n\n```yaml\n{recipe_of(step)}```\n"
        files = step["run"]["source"]
    else:
        text += ".\n"
        files = step["source"]["sha256"]
    if found := step.get("calibration"):
        text += (
            f"\nCalibrated on {found['tokens']:,} tokens of `{found['data']}` "
            f"(SHA-256 of the token ids: `{found['sha256']}`).\n"
        )
    lines = "".join(f"- `{name}`: `{digest}`\n" for name, digest in files.items())
    return f"{text}\nSHA-256 of the source's files:\n\n{lines}"
