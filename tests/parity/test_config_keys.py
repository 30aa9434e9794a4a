"""Every key of every config.json: the split computes what transformers reads, or is not made.

The judge is plain `AutoModelForCausalLM.from_pretrained` of the dense folder.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import write_tiny_model
from tests.fuzz.model_folders import FOREIGN_KEYS, VALUES
from tests.parity.test_families import write_tiny_wrapper
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

import moefy
from moefy.checkpoint.families import FAMILIES
from moefy.errors import MoefyError
from moefy.recipe import LLAMA_MOE

EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none", "experts": 6, "active": 6}
IDS = torch.randint(0, 257, (2, 100), generator=torch.Generator().manual_seed(1))

EVERY = 11
"""One change in so many is tried here, for CI's sake; `benchmarks/config_keys.py` tries all."""

# forms of a family that other keys mean something in
FORMS: dict[str, list[dict[str, Any]]] = {
    "mistral": [{"sliding_window": 16}],
    "ministral": [{"sliding_window": 16}],
    "qwen2": [{}, {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}],
    "smollm3": [{"no_rope_layer_interval": 2, "use_sliding_window": True, "sliding_window": 16}],
    "phi3": [{}, {"sliding_window": 16}],
    "cwm": [{}, {"layer_types": ["full_attention", "full_attention"]}],
    "cohere2": [{}, {"layer_types": ["full_attention", "full_attention"]}],
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0, 2.0, 3.0, 4.0]}
ROPES: list[Any] = [
    {"type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 2.0},
    YARN,
    YARN | {"rope_theta": 500.0, "attention_factor": 0.7},
    YARN | {"partial_rotary_factor": 0.5},
    {"type": "yarn"},
    LLAMA_3,
    LLAMA_3 | {"factor": "8"},
    LONG,
    LONG | {"long_factor": [1.0]},
    {"rope_type": "default", "rope_theta": 100.0},
    {"rope_type": "default", "partial_rotary_factor": 0.5},
    {"rope_type": "default", "rope_theta": None},
    {"rope_type": "proportional"},
    {"full_attention": {"rope_type": "default"}, "sliding_attention": LLAMA_3},
    {},
]
# values with a meaning, besides `VALUES`, which are mostly of a wrong type
MEANT: dict[str, list[Any]] = {
    "_attn_implementation": ["eager", "sdpa"],
    "attention_bias": [True, False],
    "attn_implementation": ["eager", "flash_attention_2"],
    "dtype": ["float16", "bfloat16", "float64"],
    "head_dim": [4, 8, 16],
    "hidden_act": ["gelu", "silu", "swish"],
    "is_causal": [True],
    "layer_types": [
        ["full_attention", "full_attention"],
        ["sliding_attention", "full_attention"],
        ["sliding_attention", "sliding_attention"],
        ["chunked_attention", "full_attention"],
    ],
    "max_position_embeddings": [64, 128, 1024],
    "max_window_layers": [1, 2],
    "mlp_bias": [True],
    "no_rope_layer_interval": [1, 2, 3],
    "no_rope_layers": [[1, 1], [0, 1], [0, 0], [1], [1, 0, 1]],
    "num_attention_heads": [2, 8],
    "num_hidden_layers": [1, 3],
    "num_key_value_heads": [1, 3, 4],
    "original_max_position_embeddings": [32, 64],
    "pad_token_id": [0, 256, 257, -257, -258],
    "partial_rotary_factor": [0.5, 1.0],
    "return_dict": [False],
    "rms_norm_eps": [1e-3],
    "rope_parameters": ROPES,
    "rope_scaling": ROPES,
    "rope_theta": [100.0, 1_000_000],
    "sliding_window": [8, 2000],
    "tie_word_embeddings": [True, False],
    "use_sliding_window": [True, False],
    "vocab_size": [256, 258],
    "embedding_multiplier": [0.3, 2],
    "attention_multiplier": [0.3, 2],
    "residual_multiplier": [0.3, 2],
    "logits_scaling": [0.3, 2],
}
MISSING = object()
WRAPPERS = {
    "mistral3": "mistral",
    "mistral3 of ministral3": "ministral3",
    "qwen3_vl": "qwen3_vl_text",
    "qwen3_5": "qwen3_5_text",
}
"""Vision-language models whose keys are changed, and the keys of their text part."""
TEXT = "text_config"


def declared_keys(family: str) -> set[str]:
    """Return the keys that transformers' class of a family declares."""
    return {field.name for field in dataclasses.fields(CONFIG_MAPPING[family])}


def changes(family: str) -> Iterator[tuple[str, Any]]:
    """Iterate over keys that transformers reads for a family, or for every model, with values."""
    declared = declared_keys(family)
    for key in sorted(declared | MEANT.keys() | FOREIGN_KEYS.keys()):
        yield key, MISSING
        # of a key that no class declares, a few values tell whether it is read
        usual = [*VALUES.values()] if key in declared else [None, 0, 0.5, "x", [1]]
        values = [*usual, *MEANT.get(key, ())]
        if key in FOREIGN_KEYS:
            values.append(FOREIGN_KEYS[key])
        for value in values:
            yield key, value


def theirs(folder: Path, ids: torch.Tensor) -> torch.Tensor | None:
    """Return the logits of a model as transformers reads it, None where it does not or guesses."""
    is_wrapper = TEXT in json.loads((folder / "config.json").read_text())
    kind = AutoModelForImageTextToText if is_wrapper else AutoModelForCausalLM
    try:
        model, info = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        if any(info.values()):
            return None
        model.config.return_dict = True
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=ids).logits
    except Exception:
        return None
    return logits


def end_of(
    folder: Path, out: Path, key: str, declared: set[str], ids: torch.Tensor, place: str | None
) -> str:
    """Convert, and say how that ends: "equal", "refused", or what is wrong."""
    part = {"part": "text"} if (folder / "wrapper").exists() else {}
    for shared in (0, 2, 1):  # some families have a target for one of them alone
        shutil.rmtree(out, ignore_errors=True)
        try:
            moefy.convert(folder, out, **EXACT | {"shared": shared} | part)
            break
        except MoefyError as error:
            said = " ".join(str(error).split())
            if "no native target" not in said:
                named = key in said or re.search("config.json says|lacks|that no rule of", said)
                return "refused" if named and len(said) < 480 else f"wrong: {said}"
        except Exception as error:
            return f"wrong: {error!r}"
    else:
        return "refused" if len(said) < 480 else f"wrong: {said}"
    # Ministral 3's context is cut to that which its attention has no temperature in
    longest = json.loads((out / "config.json").read_text())["max_position_embeddings"]
    ids = ids[:, : max(longest, 1)]
    expected, found = theirs(folder, ids), theirs(out, ids)
    if expected is None and key not in declared:  # moefy reads a model without such a key
        rewritten(folder, key, MISSING, place)
        expected = theirs(folder, ids)
    if expected is None or found is None:
        return f"wrong: only {'the split' if expected is None else 'the dense model'} can be read"
    if not torch.allclose(expected, found, atol=2e-4, equal_nan=True):
        return f"wrong: the logits differ by {(expected - found).abs().max():.3g}"
    return "equal"


def rewritten(folder: Path, key: str, value: Any, place: str | None = None) -> Mapping[str, Any]:
    """Change one key of a config.json, or of a part; return the text model's.

    NaN and infinity are written as Python writes them.
    """
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    changed = config[place] if place else config
    changed.pop(key, None)
    if value is not MISSING:
        changed[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    text = config.get(TEXT)
    return text if isinstance(text, dict) else config


def ends(family: str, folder: Path, every: int) -> tuple[Counter[str], list[str]]:
    """Try one change in so many of a family; count the ends, and say what was wrong."""
    dense, out, counts, wrong = folder / "dense", folder / "moe", Counter[str](), []
    is_wrapper = family in WRAPPERS
    forms = [{}, {"place": TEXT}] if is_wrapper else FORMS.get(family, [{}])
    for number, form in enumerate(forms):
        base, place, changed = folder / f"base{number}", None, family
        if is_wrapper:
            wrapper, place = family.partition(" ")[0], form.get("place")
            changed = WRAPPERS[family] if place else wrapper
            write_tiny_wrapper(base, wrapper, WRAPPERS[family])
            (base / "wrapper").touch()
        else:
            write_tiny_model(base, family, **form)
        # what is around the text model may be damaged where its text alone is read
        declared = declared_keys(changed) if place or not is_wrapper else set()
        for key, value in islice(changes(changed), 0, None, every):
            if key == "vision_config":  # whose text alone is read
                continue
            shutil.rmtree(dense, ignore_errors=True)
            shutil.copytree(base, dense)
            config = rewritten(dense, key, value, place)
            longest = config.get("max_position_embeddings")
            length = min(100, longest) if isinstance(longest, int) and longest > 0 else 100
            end = end_of(dense, out, key, declared, IDS[:, :length], place)
            counts[end.partition(":")[0]] += 1
            if end.startswith("wrong"):
                shown = "missing" if value is MISSING else repr(value)[:80]
                wrong.append(f"{form} {key} {shown}: {end}")
    return counts, wrong


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", [*FAMILIES, *WRAPPERS])
def test_every_key_means_what_transformers_reads_or_is_refused(tmp_path: Path, family: str) -> None:
    counts, wrong = ends(family, tmp_path, EVERY)
    print(family, dict(counts))
    assert not wrong, "\n".join(wrong)
