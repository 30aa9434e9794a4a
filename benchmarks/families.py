"""What every dense family is written as, and what is refused: the tables of docs/runtimes.md.

`python benchmarks/families.py --write` asks moefy for the target of a tiny model of each form in
tests/parity/test_families.py, with no, one and two shared slices.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))

from publish import replace_table
from tests.conftest import tiny_config
from tests.parity.test_families import FORMS

from moefy.checkpoint.families import FAMILIES, NOT_CARRIED, dense_config
from moefy.checkpoint.targets import native_target
from moefy.errors import ArchitectureError
from moefy.report.tables import Rows, markdown
from moefy.split import Split

PAGE = Path(__file__).parents[1] / "docs/runtimes.md"
MODELS = {
    "llama": "Llama 1, 2, 3.x, SmolLM2, TinyLlama",
    "mistral": "Mistral 7B",
    "ministral": "Ministral 8B of 2024",
    "qwen2": "Qwen2, Qwen2.5",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "cwm": "Code World Model",
    "granite": "Granite 3.x dense",
    "seed_oss": "Seed-OSS",
    "ministral3": "Ministral 3, up to the context before YaRN",
    "hunyuan_v1_dense": "Hunyuan dense",
    "ernie4_5": "ERNIE 4.5 0.3B",
    "lfm2": "LFM2",
    "olmo2": "OLMo 2",
    "cohere2": "Command R7B, Command A",
    "qwen3_5_text": "the text model of Qwen3.5",
    "phi3": "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
}


def families() -> Rows:
    """Return a row for every form of every family."""
    rows: Rows = [["family", "models", "no shared slice", "one", "several"]]
    shown = set()
    for family, settings, *_ in FORMS:
        dense = dense_config(tiny_config(family, **settings), family)
        targets = []
        for shared in (0, 1, 2):
            try:
                targets.append(native_target(dense, Split(8, 4, shared)).model_type)
            except ArchitectureError:
                targets.append("refused")
        if (family, *targets) in shown:
            continue
        shown.add((family, *targets))
        told = ", ".join(key for key in settings if key not in ("head_dim", "rms_norm_eps"))
        rows.append([f"`{family}`" + (f" with {told}" if told else ""), MODELS[family], *targets])
    assert MODELS.keys() == FAMILIES.keys()
    return rows


def tables() -> dict[str, Rows]:
    """Return both tables by their marks on the page."""
    refused = [[f"`{name}`", why] for name, why in NOT_CARRIED.items()]
    return {"families": families(), "not_carried": [["family", "why"], *refused]}


def main() -> None:
    for mark, rows in tables().items():
        print(markdown(rows))
        if "--write" in sys.argv:
            replace_table(PAGE, mark, rows)


if __name__ == "__main__":
    main()
