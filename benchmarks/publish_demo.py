"""Put the results of `make demo` into the README and docs/demo/.

make demo && .venv/bin/python benchmarks/publish_demo.py
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
DEMO, DOCS = ROOT / "moefy-demo", ROOT / "docs" / "demo"


def main() -> None:
    DOCS.mkdir(parents=True, exist_ok=True)
    for name in ("results.md", "results.json", "loss.png"):
        shutil.copyfile(DEMO / name, DOCS / name)
    results = json.loads((DOCS / "results.json").read_text())
    tokens = results["comparison"]["tokens"]
    facts = (
        f"SmolLM2-135M, half of every FFN running per token, trained on "
        f"{results['train_recipe']['tokens']:,} tokens, measured on {tokens:,} held-out tokens: "
        f"`make demo`, {results['elapsed_s'] / 60:.1f} minutes and "
        f"{results['peak_rss_bytes'] / 2**30:.1f} GiB on {results['machine']['threads']} CPU cores."
    )
    picture = "![Training loss](docs/demo/loss.png)"
    block = f"{(DOCS / 'results.md').read_text()}\n{facts}\n\n{picture}\n"
    readme = ROOT / "README.md"
    marks = "<!-- demo -->\n", "<!-- /demo -->"
    text = re.sub(
        f"{marks[0]}.*?{marks[1]}", lambda _: block.join(marks), readme.read_text(), flags=re.S
    )
    readme.write_text(text)


if __name__ == "__main__":
    main()
