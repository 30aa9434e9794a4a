"""The model card that lies in a converted, trained or tuned folder."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping
from typing import Any

import yaml

_NOT_CHOSEN = {"train": ("source", "parent", "data", "text"), "tune": ("source", "data", "tokens")}
_MARKS = "<!-- results -->", "<!-- /results -->"
_BETWEEN = re.compile(rf"{_MARKS[0]}.*?{_MARKS[1]}\n?", re.DOTALL)


def model_card(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return README.md: what the model is, how to load it, how it was made.

    Args:
        record: what moefy.json says.
        config: the model's config.json.
    """
    steps = steps_of(record)
    is_split = steps[0]["stage"] == "convert"
    tags = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "moefy"] if is_split else ["moefy"],
    }
    front = yaml.safe_dump(tags, sort_keys=False)
    done = " and ".join(dict.fromkeys(_DONE[step["stage"]] for step in steps))
    what = _split(steps[0], config) if is_split else _PLAIN.format(config["model_type"], done)
    name = steps[0]["source"]["name"] if is_split else f"A {config['model_type']} model"
    made = "\n".join(map(_how, steps))
    return f"""---
{front}---

# {name}, {done} by moefy

{what}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```

## How it was made

{made}"""


def recipe_of(step: Mapping[str, Any]) -> str:
    """Return the choices of one step as YAML: a moefy.json's, or those of what it came `from`."""
    chosen = step.get("recipe")
    if chosen is None:
        left_out = _NOT_CHOSEN[step["stage"]]
        chosen = {key: value for key, value in step["run"].items() if key not in left_out}
    return yaml.safe_dump(json.loads(json.dumps(chosen)), sort_keys=False)


def command_of(step: Mapping[str, Any]) -> str:
    """Return the command that does one step again, its recipe in recipe.yaml."""
    if step["stage"] == "convert":
        words = ["convert", step["source"]["name"], "OUT"]
        data = step.get("calibration", {}).get("data")
    else:
        words, data = [step["stage"], "MODEL", "OUT"], step["run"]["data"]
    words += ["--data", data] if data else []
    return shlex.join(["moefy", *words, "--recipe", "recipe.yaml"])


def steps_of(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the records of all steps, the first first."""
    steps = [record]
    while steps[0].get("from"):
        steps.insert(0, steps[0]["from"])
    return steps


def with_results(card: str, results: str) -> str:
    """Return a card with a section of results, in the place of an earlier one or at the end.

    Args:
        card: Markdown.
        results: Markdown.
    """
    block = f"{_MARKS[0]}\n{results.strip()}\n{_MARKS[1]}\n"
    text, count = _BETWEEN.subn(lambda _: block, card, count=1)
    return text if count else f"{card.rstrip()}\n\n{block}"


_DONE = {"convert": "converted", "train": "trained", "tune": "tuned"}
_PLAIN = "A `{}` model, {} from the files whose hashes stand below; their licence applies."


def _split(first: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    recipe, name = first["recipe"], first["source"]["name"]
    routed = recipe["active"] - recipe["shared"]
    slices = (
        f"every FFN is cut into {recipe['experts']} slices, of which {recipe['active']} run per "
        f"token: {recipe['shared']} always, {routed} by the router's choice"
        if routed
        else f"every FFN keeps {recipe['shared']} of {recipe['experts']} slices"
    )
    return (
        f"A `{config['model_type']}` model made from the dense `{name}`: {slices}. It is not the "
        "dense\nmodel: measure it before use (`moefy eval DENSE THIS`). The dense model's licence "
        "applies."
    )


def _how(step: Mapping[str, Any]) -> str:
    """Return what one step did: versions, recipe, data, hashes of what it was made from."""
    versions = ", ".join(f"{name} {number}" for name, number in step["versions"].items())
    whole = f"""`{command_of(step)}` (moefy {step["moefy"]}, {versions}) with this recipe:

```yaml
{recipe_of(step)}```
"""
    if step["stage"] != "convert":
        return f"{whole}\n{_hashes(step['run']['source'])}"
    if found := step.get("calibration"):
        whole += (
            f"\nCalibrated on {found['tokens']:,} tokens of `{found['data']}` "
            f"(SHA-256 of the token ids: `{found['sha256']}`).\n"
        )
    return f"{whole}\n{_hashes(step['source']['sha256'])}"


def _hashes(files: Mapping[str, str]) -> str:
    lines = "".join(f"- `{name}`: `{digest}`\n" for name, digest in files.items())
    return f"SHA-256 of the source's files:\n\n{lines}"
