"""The model card that lies in a converted folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml


def model_card(record: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """Return README.md: what the model is, how to load it, how it was made.

    Args:
        record: what moefy.json says.
        config: the model's config.json.
    """
    recipe, source = record["recipe"], record["source"]
    tags = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["moe", "moefy"],
    }
    front = yaml.safe_dump(tags, sort_keys=False)
    routed = recipe["active"] - recipe["shared"]
    what = (
        f"every FFN is cut into {recipe['experts']} slices, of which {recipe['active']} run per "
        f"token: {recipe['shared']} always, {routed} by the router's choice"
        if routed
        else f"every FFN keeps {recipe['shared']} of {recipe['experts']} slices"
    )
    hashes = "\n".join(f"- `{name}`: `{digest}`" for name, digest in source["sha256"].items())
    calibration = ""
    if found := record.get("calibration"):
        calibration = (
            f"\nCalibrated on {found['tokens']:,} tokens of `{found['data']}` "
            f"(SHA-256 of the token ids: `{found['sha256']}`).\n"
        )
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return f"""---
{front}---

# {source["name"]}, converted by moefy

A `{config["model_type"]}` model made from the dense `{source["name"]}`: {what}. It is not the dense
model: measure it before use (`moefy eval DENSE THIS`). The dense model's licence applies.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```

## How it was made

moefy {record["moefy"]} ({versions}) with this recipe:

```yaml
{yaml.safe_dump(json.loads(json.dumps(recipe)), sort_keys=False)}```
{calibration}
SHA-256 of the source's files:

{hashes}
"""
