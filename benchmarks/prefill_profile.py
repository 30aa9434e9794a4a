"""Where llama.cpp spends the processor time of a prompt: docs/upstream.md, "llama.cpp".

    python benchmarks/prefill_profile.py WORK    # WORK of `speed_asked.py WORK --prepare`

Runs a prompt of 512 tokens through the 8/16 split of Llama-3.2-1B's shape and through the dense
model of its active size, as Q8_0, under Linux's `perf` (Debian: linux-perf). Seconds are of both
cores, samples of the processor's clock. Writes docs/performance/prefill-profile.csv and the table.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

from publish import publish_table, rows_of

from moefy.evaluation.contenders import contenders_of, gguf_file
from moefy.evaluation.llama_cpp import llama_cpp_seconds
from moefy.progress import silent

DOCS = Path(__file__).parents[1] / "docs"
RATE = 499  # samples a second
WHAT = {  # functions of llama.cpp by what they do
    "product, row by row": r"ggml_vec_dot_q8_0_q8_0",
    "product, in tiles": r"tinyBLAS",
    "waiting for the other thread": r"libgomp",
}
SPLIT, DENSE = "8/16", "dense (same active size)"


def main(work: Path) -> None:
    models = {each.name: each for each in contenders_of(["llama-3.2-1b"], None, [SPLIT], silent)}
    found = {}
    for name in (SPLIT, DENSE):
        seconds = Counter(dict.fromkeys([*WHAT, "all else"], 0.0))
        for line in samples(gguf_file(models[name], "q8_0", work), work):
            done = (what for what, pattern in WHAT.items() if re.search(pattern, line))
            seconds[next(done, "all else")] += 1 / RATE
        found[name] = seconds
    rows = [
        {"of a prompt's processor time, s": what, SPLIT: f"{found[SPLIT][what]:.1f}"}
        | {DENSE: f"{found[DENSE][what]:.1f}"}
        for what in found[SPLIT]
    ]
    publish_table(rows_of(rows), DOCS / "performance/prefill-profile.csv", DOCS / "upstream.md")


def samples(file: Path, work: Path) -> list[str]:
    """Return function and library of every sample in llama.cpp while a prompt runs."""
    data, once = work / "perf.data", [sys.executable, __file__, "--once", str(file)]
    record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", str(RATE), "-o", str(data), "--"]
    subprocess.run([*record, *once], check=True)
    command = ["perf", "script", "-i", str(data), "-F", "ip,sym,dso"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    return [line for line in lines if "llama" in line or "libgomp.so.1.0.0" in line]


if __name__ == "__main__":
    if sys.argv[1] == "--once":
        llama_cpp_seconds(Path(sys.argv[2]), list(range(1000, 1512)), 1, float32=False)
    else:
        main(Path(sys.argv[1]))
