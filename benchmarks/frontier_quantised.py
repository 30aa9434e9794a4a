"""Splits against quantisation: loss on SmolLM2-135M over speed at a 1B shape, by type of the file.

    python benchmarks/frontier_quantised.py WORK --losses DATA --models FOLDER
    python benchmarks/frontier_quantised.py WORK --prepare      # the files of the speeds, 20 GB
    python benchmarks/frontier_quantised.py WORK --speeds 3     # 3 more rounds, on quiet cores
    python benchmarks/frontier_quantised.py                     # draws again

FOLDER holds the models that benchmarks/fit.py made (8-of-16-normal, …). Losses are those of `moefy
eval FILE.gguf`; speeds those of `moefy bench --layers 4`, every type and design in turns, over
the dense F16 file's in the same round. What WORK has is not measured again. Writes
docs/construction/frontier-quantised.csv and the picture beside it; benchmarks/speed.py puts
them on docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from statistics import median

from fit import MODEL, results
from publish import read_csv, rows_of

import moefy
from moefy.evaluation.contenders import contenders_of, gguf_file
from moefy.evaluation.speed import PHASES
from moefy.progress import silent
from moefy.report.frontier import Design, at_equal, frontier_figure, pruned_loss
from moefy.report.tables import markdown, write_csv
from moefy.storage import replace_file

DOCS = Path(__file__).parents[1] / "docs"
RESULT = DOCS / "construction/frontier-quantised.csv"
SHAPE = "llama-3.2-1b"
TYPES = {"F16": "float16", "Q8_0": "q8_0", "Q4_K_M": "q4_k_m"}  # as `bench` calls them
# as `bench` takes them; all shared: pruned
SPLITS = {
    "8 of 16": "8/16",
    "4 of 16": "4/16",
    "32 of 64": "32/64+16",
    "pruned to 12 of 16": "12/16+12",
    "pruned to 8 of 16": "8/16+8",
    "pruned to 4 of 16": "4/16+4",
}
DESIGNS = ["dense", *SPLITS]
LAYERS = 4
Record = dict[str, str]


def losses(work: Path, data: str, models: Path) -> None:
    """Measure every file whose loss WORK does not have, of models that are there."""
    for design in DESIGNS:
        source = MODEL
        if design != "dense":
            source = str(models / f"{design.replace(' ', '-')}-normal")
        for kind in TYPES:
            found, file = work / f"{design}-{kind}.json", work / f"{design}-{kind}.gguf"
            if found.exists() or not (source == MODEL or (Path(source) / "config.json").exists()):
                continue
            moefy.export_gguf(source, file, dtype=kind.lower(), overwrite=True)
            perplexity = results([str(file)], data)[0]["perplexity"]
            replace_file(found, json.dumps({"ppl": perplexity}))
            print(design, kind, perplexity, flush=True)
            file.unlink()


def prepare(work: Path) -> None:
    """Write the files of the speeds, so that nothing is written beside a measurement."""
    work.mkdir(parents=True, exist_ok=True)
    for each in contenders_of([SHAPE], None, [*SPLITS.values()], silent):
        for kind in TYPES.values():
            for count in (1, LAYERS):
                print(gguf_file(each.with_layers(count), kind, work), flush=True)


def speeds(work: Path, rounds: int) -> None:
    """Measure so many rounds more."""
    for _ in range(rounds):
        found = moefy.measure_speed(
            SHAPE,
            splits=[*SPLITS.values()],
            prompt_tokens=256,
            new_tokens=32,
            rounds=1,
            layers=LAYERS,
            runtime="llama.cpp",
            dtype=",".join(TYPES.values()),
            work=work,
        )
        measured = {}
        for kind, dtype in TYPES.items():
            for phase in PHASES:
                rows = [s for s in found.speeds if (s.dtype, s.phase) == (dtype, phase)]
                for design, row in zip(DESIGNS, rows, strict=True):
                    measured[f"{design}, {kind}, {phase}"] = row.tokens_per_s
        with (work / "speeds.jsonl").open("a") as file:
            file.write(json.dumps(measured) + "\n")


def collected(work: Path) -> list[Record]:
    """Return a row for each design and type that has a loss and a speed."""
    runs = [json.loads(line) for line in (work / "speeds.jsonl").read_text().splitlines()]
    exact = json.loads((work / "dense-F16.json").read_text())["ppl"]
    rows = []
    for design in DESIGNS:
        for kind in TYPES:
            file = work / f"{design}-{kind}.json"
            if not file.exists():
                continue
            nats = math.log(json.loads(file.read_text())["ppl"] / exact)
            row = {"design": design, "type": kind, "nats above dense F16": f"{nats:.3f}"}
            for phase in PHASES:
                ratios = [
                    run[f"{design}, {kind}, {phase}"] / run[f"dense, F16, {phase}"] for run in runs
                ]
                row[f"{phase} speed / dense F16"] = f"{median(ratios):.2f}"
                row[f"{phase}, lowest to highest"] = f"{min(ratios):.2f} to {max(ratios):.2f}"
            rows.append(row | {"rounds": str(len(runs))})
    return rows


def designs(rows: list[Record]) -> list[Design]:
    """Return all but the dense F16 file; what is no split counts as pruned, also a dense file."""
    return [
        Design(
            f"{row['design'].replace('pruned to', 'pruned')} {row['type']}",
            " of " not in row["design"] or row["design"].startswith("pruned"),
            float(row["nats above dense F16"]),
            {f"{phase} speed": float(row[f"{phase} speed / dense F16"]) for phase in PHASES},
        )
        for row in rows
        if (row["design"], row["type"]) != ("dense", "F16")
    ]


def sentences(found: list[Design]) -> str:
    """Answer whether a split pays on top of Q4, against every dense and pruned file."""
    text = ""
    for phase in reversed(PHASES):
        measure, cases = f"{phase} speed", []
        for each in found:
            if each.pruned or not each.name.endswith("Q4_K_M"):
                continue
            rival = pruned_loss(found, measure, each.gain(measure))
            margin = "no dense or pruned file is as fast"
            if rival is not None:
                winner = "better" if each.nats < rival else "worse"
                margin = f"{abs(each.nats - rival):.2f} nats {winner}"
            cases.append(f"{each.name.removesuffix(' Q4_K_M')} {margin}")
        pays = [case for case in cases if not case.endswith("worse")]
        answer = "yes" if len(pays) == len(cases) else "no" if not pays else "in part"
        text += f"Does a split still pay on top of Q4_K_M, for {phase}? **{answer.capitalize()}**"
        text += (
            f": than dense and pruned files of any type at equal {measure}, {'; '.join(cases)}.\n\n"
        )
        text += f"All types: {at_equal(found, measure)}\n\n"
    return text


def draw(rows: list[Record]) -> None:
    found = designs(rows)
    title = f"Loss of SmolLM2-135M over speed at the shape of {SHAPE}, by type of the GGUF file"
    title += "\npruned: dense files, whole or pruned, of any type"
    frontier_figure(found, title).savefig(RESULT.with_suffix(".png"), dpi=150)
    write_csv(RESULT, rows_of(rows))
    print(sentences(found))


def section(rows: list[Record]) -> str:
    """Return what docs/speed.md says."""
    picture = f"![Loss over speed, by type](construction/{RESULT.stem}.png)"
    return f"""
## On top of quantisation

A quantised dense file is also faster and costs little. Here are losses of {MODEL} by `moefy eval
FILE.gguf` over speeds of the same design and type at the shape of {SHAPE}, all over the dense F16
file (`python benchmarks/frontier_quantised.py`).

{sentences(designs(rows))}{picture}

{markdown(rows_of(rows))}"""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", nargs="?", type=Path)
    parser.add_argument("--losses", metavar="DATA")
    parser.add_argument("--models", type=Path, default=Path())
    parser.add_argument("--prepare", action="store_true")
    parser.add_argument("--speeds", metavar="ROUNDS", type=int, default=0)
    asked = parser.parse_args()
    if asked.work is None:
        draw(read_csv(RESULT))
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.losses:
        losses(asked.work, asked.losses, asked.models)
    if asked.prepare:
        prepare(asked.work)
    if asked.speeds:
        speeds(asked.work, asked.speeds)
    if (asked.work / "speeds.jsonl").exists() and (asked.work / "dense-F16.json").exists():
        draw(collected(asked.work))


if __name__ == "__main__":
    main()
