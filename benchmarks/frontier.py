"""Loss on SmolLM2-135M over speed at a 1B shape, splits and pruned models: docs/construction.md.

    python benchmarks/frontier.py WORK           # 5 minutes for the files, 12 to measure them
    python benchmarks/frontier.py WORK --only build     # only the files, 17 GB; needs no free cores
    python benchmarks/frontier.py WORK --only measure   # leaves docs/ as it is
    python benchmarks/frontier.py                # draws again; fit.py does so when it has new rows
    python benchmarks/frontier.py WORK --shape smollm2-135m   # a rehearsal; leaves docs/ as it is

Speed is that of Llama-3.2-1B's shape with random weights, as Q8_0 files in llama.cpp: 512 tokens of
prompt, 32 decoded, the designs in turns, medians over the rounds of the ratio to the dense model in
the same round. Loss is that of docs/construction/fit.csv. What WORK has already is not made or
measured again, so the command may be stopped and goes on.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from publish import replace_block, rows_of
from runtimes import read_csv

from moefy.checkpoint.cost import SHAPES, split_config
from moefy.checkpoint.source import builtin
from moefy.evaluation.speed import PHASES, Contender, export_contender, llama_cpp_seconds
from moefy.report.frontier import Design, at_equal, frontier_figure, pruned_loss
from moefy.report.tables import markdown, write_csv

DOCS = Path(__file__).parents[1] / "docs"
SHAPE = "llama-3.2-1b"
MEASURES = ("decode speed", "prefill speed")
SIZES = (512, 32)  # tokens of the prompt, and decoded
# active slices, all slices, shared ones; all shared: pruned
SPLITS = [
    *((12, 16, 12), (8, 16, 8), (4, 16, 4)),
    *((12, 16, 0), (8, 16, 0), (4, 16, 0), (8, 16, 4)),
    *((48, 64, 24), (32, 64, 16), (16, 64, 8)),
    *((4, 8, 0), (2, 8, 0)),
]
EFFORTS = ["fast", "fit alone", "earlier normal", "normal", "high"]  # the worst first
Record = dict[str, str]


def name_of(active: int, experts: int, shared: int) -> str:
    """Return a design's name in fit.csv; SPLITS has those of its other shared slices."""
    if shared == active:
        return f"pruned to {active} of {experts}"
    usual = active // 2 if experts == 64 else 0
    return f"{active} of {experts}" + (f", {shared} shared" if shared != usual else "")


def configs_of(shape: str) -> dict[str, dict[str, Any]]:
    dense = SHAPES[shape]
    found = {"dense": dense | {"architectures": ["LlamaForCausalLM"]}}
    for active, experts, shared in SPLITS:
        split = {"experts": experts, "active": active, "shared": shared}
        found[name_of(active, experts, shared)] = split_config(dense, **split)
    return found


def build(work: Path, configs: dict[str, dict[str, Any]]) -> dict[str, Path]:
    """Write the models that are not there: one layer with transformers' initial weights, repeated.

    Speed does not depend on weights, and a layer is made and quantised in a tenth of the time.
    """
    files = {}
    for name, config in configs.items():
        files[name] = work / f"{name.replace(' ', '-').replace(',', '')}.gguf"
        if not files[name].exists():
            print("build", name, flush=True)
            torch.manual_seed(0)
            with tempfile.TemporaryDirectory(dir=work) as folder:
                layer, whole = Path(folder, "layer.gguf"), Path(folder, "whole.gguf")
                one = Contender(name, config | {"num_hidden_layers": 1})
                export_contender(one, layer, "q8_0", builtin())
                repeat_layer(layer, config["num_hidden_layers"], whole)
                whole.rename(files[name])
    return files


def repeat_layer(file: Path, layers: int, out: Path) -> None:
    """Write a GGUF file of one layer as one of many, all of them the same."""
    reader = GGUFReader(file)
    writer = GGUFWriter(out, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name != "general.architecture" and not field.name.startswith("GGUF."):
            kind = field.types[0]
            value = layers if field.name.endswith(".block_count") else field.contents()
            inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, value, kind, sub_type=inner)
    tensors = [
        (tensor.name.replace("blk.0.", f"blk.{layer}."), tensor)
        for layer in range(layers)
        for tensor in reader.tensors
        if layer == 0 or tensor.name.startswith("blk.0.")
    ]
    for name, tensor in tensors:
        data, kind = tensor.data, tensor.tensor_type
        writer.add_tensor_info(name, data.shape, data.dtype, data.nbytes, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in tensors:
        writer.write_tensor_data(tensor.data)
    writer.close()


def measure(work: Path, shape: str, rounds: int) -> list[Record]:
    """Time all designs in turns, as many rounds as are missing; return the medians."""
    configs, journal = configs_of(shape), work / "rounds.jsonl"
    files = build(work, configs)
    lines = journal.read_text().splitlines() if journal.exists() else []
    found = [json.loads(line) for line in lines]
    for number in range(len(found), rounds):
        timed = {}
        # another one begins each round: what is measured at the same place is disturbed alike
        names, first = list(files), 5 * number % len(files)
        for name in names[first:] + names[:first]:
            vocab = configs[name]["vocab_size"]
            prefill, decode = llama_cpp_seconds(files[name], vocab, SIZES, float32=False)
            timed[name] = {"prefill": SIZES[0] / prefill, "decode": 1 / decode}
            print(f"round {number + 1}, {name}: {timed[name]}", flush=True)
        found.append(timed)
        with journal.open("a") as out:  # a round is kept whole: ratios are those within it
            out.write(json.dumps(timed) + "\n")
    rows = []
    for name, file in files.items():
        row = {"design": name, "GGUF, GB": f"{file.stat().st_size / 1e9:.2f}"}
        for phase in PHASES:
            speeds = [each[name][phase] for each in found]
            ratios = [each[name][phase] / each["dense"][phase] for each in found]
            row[f"{phase} tok/s"] = f"{statistics.median(speeds):.1f}"
            row[f"{phase} speed / dense"] = f"{statistics.median(ratios):.3f}"
            row[f"{phase}, lowest to highest"] = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append(row | {"rounds": str(len(found)), "shape": shape, "measured in": machine()})
    return rows


def machine() -> str:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(": ")[2] for line in info if line.startswith("model name")]
    runtime = f"llama.cpp (xllamacpp {version('xllamacpp')}), Q8_0"
    return f"{runtime}, {torch.get_num_threads()} threads of {names[0]}"


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
    """Return where splits or pruning win, and the pictures: that of most designs, and *high*."""
    says = [
        f"*{effort}*: {' '.join(filter(None, (at_equal(designs, each) for each in MEASURES)))}"
        for effort, designs in efforts.items()
    ]
    says += [
        f"![Loss over speed, {effort}](construction/{file})" for file, effort in drawn(efforts)
    ]
    return "\n\n".join(says) + "\n"


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
        replace_block(page, "frontier-says", sentences(efforts))
    print(sentences(efforts))


def draw() -> None:
    """Draw the published speeds again."""
    place = DOCS / "construction"
    publish(read_csv(place / "frontier-speed.csv"), place, DOCS / "construction.md")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", nargs="?", type=Path)
    parser.add_argument("--only", choices=["build", "measure"])
    parser.add_argument("--shape", default=SHAPE, choices=list(SHAPES))
    parser.add_argument("--rounds", default=3, type=int)
    asked = parser.parse_args()
    if not asked.work:
        draw()
        return
    asked.work.mkdir(parents=True, exist_ok=True)
    if asked.only == "build":
        build(asked.work, configs_of(asked.shape))
        return
    speeds = measure(asked.work, asked.shape, asked.rounds)
    write_csv(asked.work / "frontier-speed.csv", rows_of(speeds))
    if asked.shape != SHAPE or asked.only:
        publish(speeds, asked.work)
    else:
        write_csv(DOCS / "construction/frontier-speed.csv", rows_of(speeds))
        draw()


if __name__ == "__main__":
    main()
