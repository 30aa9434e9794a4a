"""What the calibration text buys: one split from several texts, on held-out text of all domains.

    python benchmarks/calibration_text.py WORK DATA [TEXT...]    # DATA: ../shared/data/pretrain
    python benchmarks/calibration_text.py WORK                   # the table of what WORK has

A TEXT is `domains` (all of DATA), a domain of DATA, `demo`, `self` (the dense model writes it), or
two of these, half of each: `github+domains`. Each is a `moefy convert` of 8 of 16 slices that reads
the same number of tokens. What WORK has already is not run again. Writes
docs/construction/calibration-text.csv.
"""

from __future__ import annotations

import gzip
import itertools
import json
import math
import sys
from pathlib import Path

import fit
from publish import publish_table

from moefy.calibrate.text import SELF, self_windows
from moefy.checkpoint.load import load_tokenizer
from moefy.checkpoint.source import resolve
from moefy.recipe import ConvertRecipe

DESIGN, EFFORT = "8 of 16", "normal"
ALL = "domains"
TEXTS = [ALL, "demo", SELF, f"{SELF}+{ALL}", "github", f"github+{ALL}"]


def main(work: Path, data: Path | None, texts: list[str]) -> None:
    for text in (texts or TEXTS) if data else ():
        place = work / text
        place.mkdir(parents=True, exist_ok=True)
        assert data is not None
        fit.convert(place, calibration_data(text, data, work), DESIGN, EFFORT)
        evaluate(place, data)
    found = {text: work / text / "by-domain.json" for text in TEXTS}
    losses = {text: json.loads(file.read_text()) for text, file in found.items() if file.exists()}
    domains = list(next(iter(losses.values())))
    rows = [["calibration text", *domains]]
    rows += [[text, *(f"{loss:.3f}" for loss in by.values())] for text, by in losses.items()]
    publish_table(
        rows, fit.DOCS / "construction/calibration-text.csv", fit.DOCS / "construction.md"
    )


def calibration_data(text: str, data: Path, work: Path) -> str:
    """Return what `--data` is told, and write the file or folder of a text that needs one."""
    if text in ("demo", SELF):
        return text
    if text == ALL:
        return str(data)
    if "+" not in text:
        return str(data / f"{text}.jsonl.gz")
    one, other = text.split("+")
    folder = work / f"{text}-text"
    folder.mkdir(exist_ok=True)
    for name in (one, other):
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            file.writelines(lines_of(name, data))
    return str(folder)


def lines_of(name: str, data: Path) -> list[str]:
    """Return the records of a domain, of all domains in turn, or of what the dense model writes."""
    if name == SELF:
        model = resolve(fit.MODEL)
        tokens = ConvertRecipe(effort=EFFORT).for_model(1536).calibration_tokens
        windows = self_windows(model, tokens=tokens, sequence_length=512)
        texts = load_tokenizer(model).batch_decode(windows, skip_special_tokens=True)
        return [json.dumps({"text": text}) + "\n" for text in texts]
    files = sorted(data.glob("*.jsonl.gz")) if name == ALL else [data / f"{name}.jsonl.gz"]
    domains = []
    for each in files:
        with gzip.open(each, "rt") as file:
            domains.append(file.readlines())
    return [line for turn in itertools.zip_longest(*domains) for line in turn if line]


def evaluate(place: Path, data: Path) -> None:
    """Measure the model in `place`, in nats above the dense model by domain."""
    result = place / "by-domain.json"
    if result.exists():
        return
    model = place / f"{DESIGN.replace(' ', '-')}-{EFFORT}"
    dense, split = fit.results([fit.MODEL, str(model)], str(data))
    before, after = dense["domain_perplexity"], split["domain_perplexity"]
    losses = {"all": split["excess_loss"]["value"]}
    losses |= {domain: math.log(after[domain] / before[domain]) for domain in before}
    result.write_text(json.dumps(losses) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None, sys.argv[3:])
