"""Loss on SmolLM2-135M over speed at a 1B shape, splits and pruned models: docs/construction.md.

    python benchmarks/frontier.py WORK      # 25 minutes on two quiet cores, 17 GB in WORK
    python benchmarks/frontier.py           # draws again; fit.py does so when it has new rows
    python benchmarks/frontier.py WORK --shape smollm2-135m   # a rehearsal; leaves docs/ as it is

Speed is that of Llama-3.2-1B's shape by `moefy bench`: random weights, as Q8_0 files in llama.cpp,
512 tokens of prompt, 32 decoded. Loss is that of docs/construction/fit.csv. WORK keeps the files.
Both go into the table that `moefy plan` reads.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path

from publish import read_csv, replace_block, rows_of

import moefy
from moefy.checkpoint.cost import SHAPES
from moefy.evaluation.speed import PHASES, SpeedComparison
from moefy.report.frontier import Design, at_equal, frontier_figure, pruned_loss
from moefy.report.tables import Rows, markdown, write_csv

DOCS = Path(__file__).parents[1] / "docs"
PLAN = DOCS.parent / "src/moefy/studies/speed.csv"
SHAPE = "llama-3.2-1b"
MEASURES = ("decode speed", "prefill speed")
# active slices, all slices, shared ones; all shared: pruned
SPLITS = [
    *((12, 16, 12), (8, 16, 8), (4, 16, 4)),
    *((12, 16, 0), (8, 16, 0), (4, 16, 0), (8, 16, 4), (8, 16, 6)),
    *((48, 64, 24), (32, 64, 16), (16, 64, 8)),
    *((4, 8, 2), (4, 8, 0), (2, 8, 0)),
]
EFFORTS = ["fast", "fit alone", "earlier normal", "normal", "high"]  # the worst first
Record = dict[str, str]


def name_of(active: int, experts: int, shared: int) -> str:
    """Return a design's name in fit.csv; SPLITS has those of its other shared slices."""
    if shared == active:
        return f"pruned to {active} of {experts}"
    usual = active // 2 if experts == 64 else 0
    return f"{active} of {experts}" + (f", {shared} shared" if shared != usual else "")


def measure(work: Path, shape: str, rounds: int) -> list[Record]:
    """Time all designs in turns; return the medians."""
    found = moefy.measure_speed(
        shape,
        splits=[f"{active}/{experts}+{shared}" for active, experts, shared in SPLITS],
        prompt_tokens=512,
        new_tokens=32,
        rounds=rounds,
        runtime="llama.cpp",
        dtype="q8_0",
        work=work,
    )
    rows = []
    for idx, design in enumerate(["dense", *(name_of(*split) for split in SPLITS)]):
        row = {"design": design}
        for phase in PHASES:
            each = [speed for speed in found.speeds if speed.phase == phase][idx]
            row[f"{phase} tok/s"] = f"{each.tokens_per_s:.1f}"
            row[f"{phase} speed / dense"] = f"{each.of_dense:.3f}"
            row[f"{phase}, lowest to highest"] = " to ".join(f"{end:.2f}" for end in each.spread)
        rows.append(row | {"rounds": str(rounds), "shape": shape, "measured in": machine(found)})
    return rows


def machine(found: SpeedComparison) -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in info if line.startswith("model name")]
    runtime = f"llama.cpp (xllamacpp {version('xllamacpp')}), Q8_0"
    return f"{runtime}, {found.threads} threads of {names[0]}"


def plan_table(speeds: list[Record], losses: list[Record]) -> Rows:
    """Return what `moefy plan` reads: counts, speeds over dense, and the usual effort's loss."""
    rows = [["shape", "experts", "active", "shared", *PHASES, "measured", "nats"]]
    for active, experts, shared in SPLITS:
        name = name_of(active, experts, shared)
        row = next((row for row in speeds if row["design"] == name), None)
        if row is None:  # a design that is newer than the speeds
            continue
        known = [each for each in losses if (each["design"], each["effort"]) == (name, "normal")]
        nats = [*(each["nats above dense"] for each in known), ""][0]
        counts = [row["shape"], str(experts), str(active), str(shared)]
        ratios = [row[f"{phase} speed / dense"] for phase in PHASES]
        rows.append([*counts, *ratios, row["measured in"], nats])
    return rows


def joined(speeds: list[Record], losses: list[Record]) -> dict[str, list[Design]]:
    """Return the designs with loss and speed by effort, best first, where both kinds have some."""
    measured = {row["design"]: row for row in speeds}
    found: dict[str, list[Design]] = {}
    for effort in reversed(EFFORTS):
        designs = [
            Design(
                row["design"].replace("pruned to", "pruned"),
                row["design"].startswith("pruned"),
                float(row["nats above dense"]),
                {key: float(measured[row["design"]][f"{key} / dense"]) for key in MEASURES},
            )
            for row in losses
            if row["effort"] == effort and row["design"] in measured
        ]
        if len({each.pruned for each in designs}) == 2:
            found[effort] = sorted(designs, key=lambda each: (each.pruned, each.gain(MEASURES[0])))
    return found


def rows_for(efforts: dict[str, list[Design]]) -> list[Record]:
    """Return a row for each design: its loss, and that of pruning at its speeds."""
    rows = []
    for effort, designs in efforts.items():
        for each in designs:
            row = {"design": each.name, "effort": effort, "nats above dense": f"{each.nats:.3f}"}
            for measure, gain in each.gains.items():
                row[f"{measure} / dense"] = f"{gain:.2f}"
                rival = pruned_loss(designs, measure, gain)
                margin = "" if each.pruned else "none as fast"
                if rival is not None and not each.pruned:
                    margin = f"{each.nats - rival:+.3f}"
                row[f"vs. pruned, equal {measure}"] = margin
            rows.append(row)
    return rows


def sentences(efforts: dict[str, list[Design]]) -> str:
    """Return where splits or pruning win."""
    says = [
        " ".join([f"`--effort {effort}`:", *filter(None, (at_equal(designs, m) for m in MEASURES))])
        for effort, designs in efforts.items()
    ]
    return "\n\n".join(says) + "\n"


def pictures(efforts: dict[str, list[Design]]) -> str:
    shown = [
        f"![Loss over speed, {effort}](construction/{file})" for file, effort in drawn(efforts)
    ]
    return "\n" + "\n\n".join(shown) + "\n"


def drawn(efforts: dict[str, list[Design]]) -> list[tuple[str, str]]:
    """Return pictures and their efforts: the best of those with most designs, and high."""
    most = max(efforts, key=lambda effort: len(efforts[effort]))
    return [("frontier.png", most)] + [("frontier-high.png", "high")] * (
        "high" in efforts and most != "high"
    )


def publish(speeds: list[Record], place: Path, page: Path | None = None) -> None:
    """Draw the losses of fit.csv over speeds into a folder, and put them on a page."""
    efforts = joined(speeds, read_csv(DOCS / "construction/fit.csv"))
    if not efforts:
        return
    for file, effort in drawn(efforts):
        title = f"Loss of SmolLM2-135M (effort: {effort}) over speed at the shape of "
        title += f"{speeds[0]['shape']}\n{speeds[0]['measured in']}"
        figure = frontier_figure(efforts[effort], title)
        figure.savefig(place / file, dpi=150)
    rows = rows_of(rows_for(efforts))
    write_csv(place / "frontier.csv", rows)
    if page:
        replace_block(page, "frontier", markdown(rows))
        replace_block(page, "frontier-speed", markdown(rows_of(speeds)))
        replace_block(page, "frontier-says", sentences(efforts) + pictures(efforts))
        replace_block(DOCS.parent / "README.md", "frontier-in-short", sentences(efforts))
    print(sentences(efforts))


def draw() -> None:
    """Draw the published speeds again."""
    place = DOCS / "construction"
    speeds = read_csv(place / "frontier-speed.csv")
    publish(speeds, place, DOCS / "construction.md")
    write_csv(PLAN, plan_table(speeds, read_csv(place / "fit.csv")))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", nargs="?", type=Path)
    parser.add_argument("--shape", default=SHAPE, choices=list(SHAPES))
    parser.add_argument("--rounds", default=3, type=int)
    asked = parser.parse_args()
    if not asked.work:
        draw()
        return
    speeds = measure(asked.work, asked.shape, asked.rounds)
    write_csv(asked.work / "frontier-speed.csv", rows_of(speeds))
    if asked.shape != SHAPE:
        publish(speeds, asked.work)
    else:
        write_csv(DOCS / "construction/frontier-speed.csv", rows_of(speeds))
        draw()


if __name__ == "__main__":
    main()
