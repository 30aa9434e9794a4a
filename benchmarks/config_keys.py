"""Change every key of a family's or wrapper's config.json, and compare splits with transformers.

`python benchmarks/config_keys.py [FAMILY …] [--write]` takes about a minute and a half of processor
time for each family. `--write` puts the counts into docs/reliability/config_keys.csv and
docs/reliability.md.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.fuzz.__main__ import write_figures
from tests.parity.test_config_keys import WRAPPERS, ends

from moefy.checkpoint.families import FAMILIES

FIGURES = Path(__file__).parents[1] / "docs/reliability/config_keys.csv"
ENDS = ("equal", "refused", "wrong")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", default=[*FAMILIES, *WRAPPERS])
    parser.add_argument("--write", action="store_true")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()  # transformers warns of many a change
    for family in asked.families:
        with tempfile.TemporaryDirectory() as folder:
            counts, wrong = ends(family, Path(folder), every=1)
        print(family, dict(counts), *wrong, sep="\n    ", flush=True)
        if asked.write:
            row = [family, str(counts.total()), *(str(counts[end]) for end in ENDS)]
            write_figures(FIGURES, [["family", "changes", *ENDS], row])


if __name__ == "__main__":
    main()
