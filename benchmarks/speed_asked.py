"""What issue 24 asks of speed, beside what is found: docs/speed/asked.csv.

    python benchmarks/speed_asked.py WORK --prepare   # GGUF files, 9 GB, and a model of 7B's shape
    python benchmarks/speed_asked.py WORK             # 15 minutes on two quiet cores
    python benchmarks/speed_asked.py WORK --only llama.cpp --rounds 7
    python benchmarks/speed_asked.py WORK --shape smollm2-135m   # rehearsal; leaves docs/

Parts: llama.cpp, transformers, quick, copy. WORK keeps what each found, and a part that is named
again is measured again. Ratios are to the dense model of the same active size, medians of those
within a round. The loss that Q8_0 costs is read from docs/construction/frontier-quantised.csv.
`python benchmarks/speed.py` then puts the table on docs/speed.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryFile

import streaming
from publish import read_csv, rows_of

import moefy
from moefy.checkpoint.expert_layers import LEAN
from moefy.evaluation.contenders import contenders_of, gguf_file
from moefy.progress import silent
from moefy.report.tables import markdown, write_csv

DOCS = Path(__file__).parents[1] / "docs"
SHAPE = "llama-3.2-1b"
SPLITS = ["8/16", "4/16"]
ASKED = {  # runtime, dtype, split, phase
    **{
        ("llama.cpp", dtype, split, phase): least
        for dtype in ("q8_0", "q4_0")
        for split, phase, least in (
            ("8/16", "decode", 0.97),
            ("8/16", "prefill", 0.85),
            ("4/16", "decode", 0.92),
            ("4/16", "prefill", 0.75),
        )
    },
    ("transformers", "float32", "8/16", "prefill"): 0.95,
    ("transformers", "float32", "8/16", "decode"): 0.95,
    ("transformers", "bfloat16", "8/16", "prefill"): 0.85,
    ("transformers", "bfloat16", "8/16", "decode"): 0.90,
}
Record = dict[str, str]


def row(what: str, asked: str, found: str, holds: bool, spread: str = "") -> Record:
    return {"what": what, "asked": asked, "found": found, "range": spread} | {
        "": "holds" if holds else "missed"
    }


def ratios(work: Path, shape: str, runtime: str, rounds: int) -> list[Record]:
    """Measure splits beside dense models of their active size, a round at a time."""
    wanted = {key: least for key, least in ASKED.items() if key[0] == runtime}
    found: dict[tuple[str, ...], list[float]] = {key: [] for key in wanted}
    in_transformers = runtime == "transformers"
    for _ in range(rounds):
        done = moefy.measure_speed(
            shape,
            splits=list({split for _, _, split, _ in wanted}),
            prompt_tokens=256,
            new_tokens=16 if in_transformers else 32,
            rounds=1,
            layers=4 if in_transformers else None,
            runtime=runtime,
            dtype=",".join(dict.fromkeys(dtype for _, dtype, _, _ in wanted)),
            work=work,
        )
        for speed in done.speeds:
            key = (speed.runtime, speed.dtype, speed.model, speed.phase)
            if key in found and speed.of_active_size:
                # what moefy hands over, not the fastest that was tried
                of_fastest = speed.tried.get(LEAN, speed.tokens_per_s) / speed.tokens_per_s
                found[key].append(speed.of_active_size * of_fastest)
    rows = []
    for (_, dtype, split, phase), each in found.items():
        each.sort()
        middle, least = each[len(each) // 2], wanted[runtime, dtype, split, phase]
        what = f"{runtime}, {dtype}: {phase} of {split} / dense of its active size"
        spread = f"{each[0]:.2f} to {each[-1]:.2f}"
        rows.append(row(what, f"≥ {least:.2f}", f"{middle:.2f}", middle >= least, spread))
    return rows


def quick(shape: str) -> list[Record]:
    """Run `moefy bench --quick` twice: minutes, memory, and how far its ratios repeat."""
    runs, minutes, peak = [], 0.0, 0.0
    for _ in range(2):
        started = time.monotonic()
        with TemporaryFile("w+") as out:
            command = [sys.executable, "-m", "moefy", "bench", shape, "--quick", "--json"]
            child = subprocess.Popen(command, stdout=out)
            _, status, usage = os.wait4(child.pid, 0)
            assert status == 0
            minutes = max(minutes, (time.monotonic() - started) / 60)
            peak = max(peak, usage.ru_maxrss / 2**20)
            out.seek(0)
            runs.append([each["of_dense"] for each in json.load(out)["speeds"]])
    apart = max(abs(a / b - 1) for a, b in zip(*runs, strict=True))
    return [
        row("moefy bench --quick, minutes", "≤ 5", f"{minutes:.1f}", minutes <= 5),
        row("moefy bench --quick, GiB", "≤ 8", f"{peak:.1f}", peak <= 8),
        row("its ratios on a second run, furthest", "≤ 5%", f"{apart:.0%}", apart <= 0.05),
    ]


def model_7b(work: Path, layers: int) -> Path:
    source = work / f"llama-2-7b-{layers}"
    if not source.exists():
        streaming.make_model(source, layers)
    return source


def copy(work: Path, layers: int, repeats: int = 3) -> list[Record]:
    """Convert a 7B shape by weights alone, and copy its files, in turns."""
    source = model_7b(work, layers)
    parts, peak = [], 0.0
    for _ in range(repeats):
        copied, _ = streaming.run(streaming.COPY, source, work / "copy")
        converted, used = streaming.run(streaming.CONVERT, source, work / "moe")
        parts.append(converted / copied)
        peak = max(peak, used / 2**30)
    parts.sort()
    what = f"weight-only conversion of LLaMA-2-7B's shape, {layers} layers"
    middle, spread = parts[len(parts) // 2], f"{parts[0]:.2f} to {parts[-1]:.2f}"
    return [
        row(f"{what}, of copying's time", "≤ 1.0", f"{middle:.2f}", middle <= 1, spread),
        row(f"{what}, GiB", "≤ 2", f"{peak:.1f}", peak <= 2),
    ]


def q8_losses() -> list[Record]:
    """Return what Q8_0 costs over F16, of the worst design whose loss was measured."""
    nats = {
        (each["design"], each["type"]): float(each["nats above dense F16"])
        for each in read_csv(DOCS / "construction/frontier-quantised.csv")
    }
    costs = [nats[design, "Q8_0"] - nats[design, "F16"] for design, kind in nats if kind == "Q8_0"]
    what = "GGUF Q8_0 over F16, nats, the worst design"
    return [row(what, "≤ 0.010", f"{max(costs):.3f}", max(costs) <= 0.01)] if costs else []


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--shape", default=SHAPE)
    parser.add_argument("--rounds", default=5, type=int)
    parser.add_argument("--layers", default=8, type=int, help="of the 7B shape that is converted")
    parser.add_argument("--only", default="llama.cpp,transformers,copy,quick")
    parser.add_argument("--prepare", action="store_true")
    asked = parser.parse_args()
    work = asked.work
    work.mkdir(parents=True, exist_ok=True)
    if asked.prepare:
        for each in contenders_of([asked.shape], None, SPLITS, silent):
            for dtype in ("q8_0", "q4_0"):
                print(gguf_file(each, dtype, work), flush=True)
        print(model_7b(work, asked.layers))
        return
    parts = {
        "llama.cpp": lambda: ratios(work, asked.shape, "llama.cpp", asked.rounds),
        "transformers": lambda: ratios(work, asked.shape, "transformers", asked.rounds),
        "copy": lambda: copy(work, asked.layers),
        "quick": lambda: quick(asked.shape),
    }
    for name in asked.only.split(","):
        rows = parts[name]()
        (work / f"asked-{name}.json").write_text(json.dumps(rows))
        print(markdown(rows_of(rows)), flush=True)
    known = [work / f"asked-{name}.json" for name in parts]
    rows = [each for file in known if file.exists() for each in json.loads(file.read_text())]
    rows += q8_losses()
    if asked.shape == SHAPE:
        (DOCS / "speed").mkdir(exist_ok=True)
        write_csv(DOCS / "speed/asked.csv", rows_of(rows))
    print(markdown(rows_of(rows)))


if __name__ == "__main__":
    main()
