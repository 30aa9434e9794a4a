"""Put the results of `make demo` into the README and docs/demo/.

make demo && .venv/bin/python benchmarks/publish_demo.py
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from publish import replace_block

from moefy.report.tables import markdown

ROOT = Path(__file__).parents[1]
DEMO, DOCS = ROOT / "moefy-demo", ROOT / "docs" / "demo"


def shown(results: dict[str, Any]) -> str:
    """Return the README's table of a results.json, and what it was measured on."""
    rows = [["model", "perplexity", "KL to dense", "weights used per token"]]
    for each in results["comparison"]["results"]:
        active = f"{each['cost']['active_params'] / 1e6:.1f}M"
        kl = f"{each['kl_to_reference']:.3f}"
        rows.append([each["name"], f"{each['perplexity']:,.1f}", kl, active])
    return (
        f"{markdown(rows)}\n"
        f"SmolLM2-135M, half of every FFN running per token, trained on "
        f"{results['train_recipe']['tokens']:,} tokens, measured on "
        f"{results['comparison']['tokens']:,} held-out tokens,\n"
        f"with {results['peak_rss_bytes'] / 2**30:.1f} GiB of memory, in "
        f"{results['elapsed_s'] / 60:.0f} minutes on {results['machine']['threads']} threads. "
        "[All columns](docs/demo/results.md).\n"
    )


def main() -> None:
    DOCS.mkdir(parents=True, exist_ok=True)
    for name in ("results.md", "results.json", "loss.png"):
        shutil.copyfile(DEMO / name, DOCS / name)
    results = json.loads((DOCS / "results.json").read_text())
    replace_block(ROOT / "README.md", "demo", shown(results))


if __name__ == "__main__":
    main()
