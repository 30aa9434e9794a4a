"""What `moefy bench` measured of shapes: docs/speed.md.

    moefy bench llama-1b --json > llama-1b.json    # on a quiet machine
    python benchmarks/speed.py llama-1b.json …     # into docs/speed/, and the page
    python benchmarks/speed.py                     # the page again

The page also has the speeds that benchmarks/frontier.py measured.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import frontier_quantised
from publish import read_csv, replace_block, rows_of

from moefy.report.tables import markdown, write_csv

DOCS = Path(__file__).parents[1] / "docs"
RATIOS = ("prefill / dense", "decode / dense")
ASKED = "asked"
Record = dict[str, str]
HEAD = """# How fast a split is

Written by `python benchmarks/speed.py` from docs/speed/ and docs/construction/frontier-speed.csv.
Tokens per second over the dense parent's at the same shape, random weights, one sequence; medians
of ratios within a round. *Pruned*: a dense model of the same active size. `moefy bench SHAPE`
measures any shape on your machine before anything is converted, and `moefy plan MODEL` reads the
figures of the frontier.

"""


def measured(file: Path) -> list[Record]:
    """Return a row for each model in a file that `moefy bench --json` wrote."""
    found, rows = json.loads(file.read_text()), dict[tuple[str, str, int], Record]()
    place = found["device"] if found["device"] != "cpu" else f"{found['threads']} CPU threads"
    for speed in found["speeds"]:
        runtime = f"{speed['runtime']}, {speed['dtype']}"
        about = {"shape": file.stem, "runtime": runtime, "model": speed["model"]}
        key = (runtime, speed["model"], speed["batch"])
        row = rows.setdefault(key, about | {"batch": str(speed["batch"])})
        row[f"{speed['phase']} tok/s"] = f"{speed['tokens_per_s']:.1f}"
        row[f"{speed['phase']} / dense"] = f"{speed['of_dense']:.2f}"
    scaled = f"; {found['layers']} layers, scaled" if found["layers"] else ""
    return [row | {"measured on": f"{place}{scaled}"} for row in rows.values()]


def of_frontier(row: Record) -> Record:
    return {
        "shape": row["shape"],
        "runtime": "llama.cpp, q8_0",
        "model": row["design"].replace(" of ", "/"),
        **{f"{phase} / dense": row[f"{phase} speed / dense"] for phase in ("prefill", "decode")},
        "measured on": row["measured in"].rpartition("Q8_0, ")[2],
    }


def share(model: str) -> float:
    """Return the part of the FFN that runs."""
    active, _, rest = model.removeprefix("pruned to ").partition("/")
    return int(active) / int(rest.split(",")[0])


def verdict(row: Record) -> str:
    """Say where a split is faster by more than 5%."""
    faster = [name.split()[0] for name in RATIOS if float(row[name]) > 1.05]
    return {0: "not faster", 2: "faster"}.get(len(faster), f"{''.join(faster)} alone")


def glance(records: list[Record]) -> list[Record]:
    """Return every split beside the pruned model of its active size, the fastest decoding first."""
    rows = []
    for row in records:
        if not row["model"][0].isdigit() or row.get("batch", "1") != "1":
            continue
        about = {key: row[key] for key in ("shape", "runtime", "model")}
        rivals = [
            each
            for each in records
            if each["model"].startswith("pruned")
            and all(each[key] == row[key] for key in ("shape", "runtime", "measured on"))
            and share(each["model"]) == share(row["model"])
        ]
        for name in reversed(RATIOS):
            about[name] = f"{float(row[name]):.2f}"
            about[f"pruned, {name.split()[0]}"] = f"{float(rivals[0][name]):.2f}" if rivals else "–"
        rows.append(about | {"in short": verdict(row), "measured on": row["measured on"]})
    return sorted(rows, key=lambda row: -float(row[RATIOS[1]]))


def in_short(rows: list[Record]) -> str:
    """Say how much is gained, and when not to convert; the README has it too."""
    shape, best = rows[0]["shape"], {name: max(float(row[name]) for row in rows) for name in RATIOS}
    slow = [row["model"] for row in rows if float(row[RATIOS[0]]) <= 1.05]
    ahead = [row for row in rows if row["pruned, decode"] != "–"]
    wins = [row["model"] for row in ahead if float(row[RATIOS[1]]) > float(row["pruned, decode"])]
    # the second of two columns of one name, in the last row
    clients = (DOCS / "runtimes/serving.csv").read_text().splitlines()[-1].split(",")
    decode, prefill = best[RATIOS[1]], best[RATIOS[0]]
    decoding = f"only {', '.join(wins)} decode faster" if wins else "decodes faster, too"
    return f"""At the shape of {shape} a split decodes up to {decode:.2f} times and reads
prompts up to {prefill:.2f} times as fast as the dense model. **Do not convert for speed if**

- your prompts are long: {", ".join(slow) or "no split"} do not read them noticeably faster;
- a pruned model is good enough: of the same active size it reads prompts faster than any split,
  and {decoding}. A split of its size loses less quality;
- {clients[1]} clients ask at once: together they need most of the experts, and get {clients[3]}
  times as many tokens per second as from the dense model (SmolLM2-135M, 8 of 16 slices).
"""


def shapes() -> list[Path]:
    return [file for file in sorted((DOCS / "speed").glob("*.csv")) if file.stem != ASKED]


def all_splits() -> list[Record]:
    frontier = read_csv(DOCS / "construction/frontier-speed.csv")
    measured = [row for file in shapes() for row in read_csv(file)]
    return glance([*measured, *map(of_frontier, frontier)])


def page() -> str:
    rows = all_splits()
    text = HEAD + markdown(rows_of(rows)) + "\n" + in_short(rows)
    if asked := read_csv(DOCS / f"speed/{ASKED}.csv"):
        text += "\n## What was asked, and what was found\n\n"
        text += f"By `python benchmarks/speed_asked.py WORK`.\n\n{markdown(rows_of(asked))}"
    if quantised := read_csv(frontier_quantised.RESULT):
        text += frontier_quantised.section(quantised)
    for file in shapes():
        text += f"\n## {file.stem}\n\n{markdown(rows_of(read_csv(file)))}"
    return text


def main(files: list[Path]) -> None:
    (DOCS / "speed").mkdir(exist_ok=True)
    for file in files:
        write_csv(DOCS / "speed" / f"{file.stem}.csv", rows_of(measured(file)))
    (DOCS / "speed.md").write_text(page())
    replace_block(DOCS.parent / "README.md", "speed-in-short", in_short(all_splits()))


if __name__ == "__main__":
    main([*map(Path, sys.argv[1:])])
