"""Commands that are killed and run again, and what they must end with.

`benchmarks/kills.py` tries all of it and prints counts, tests/e2e/test_kills.py what takes minutes.
"""

from __future__ import annotations

import csv
import json
import random
import re
import shutil
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from moefy.checkpoint.source import builtin
from tests.conftest import make_place, write_tiny_llama
from tests.kills import Server

_TIMED = ("tokens_per_s", "_s", "_ms", "rss_bytes", "date", "speed")
_SPEEDS = ("prefill_of_dense", "decode_of_dense")
_TRAIN = "--set sequence_length=64 --set global_batch_size=2 --set checkpoint_every_steps=1"
_TUNE = "--set sequence_length=128 --set global_batch_size=12 --set checkpoint_every_steps=1"
COMMANDS = {
    "convert": "convert ../../dense out --experts 4 --active 2 --partition random --router random "
    "--repair none",
    "convert, searching": "convert ../../dense out --experts 4 --max-loss 9 --data ../../text "
    "--partition random --router random --repair none --set calibration_length=32",
    "prepare": "prepare ../../text out --tokenizer ../../dense --workers 1",
    "train": f"train ../../moe out --data ../../text --tokens 384 {_TRAIN}",
    "tune": f"tune ../../moe out --data ../../talks.jsonl --set epochs=1 {_TUNE}",
    "report": "report out ../../dense ../moe --data ../../text --windows 1 --sequence-length 32",
    "export gguf": "export gguf ../../known out --quantize f32",
    "export dense": "export dense ../../moe out",
    "study": "study out --model ../../narrow --data ../../text --only size --seeds 1 --tokens 32 "
    "--set sequence_length=32 --set windows=1 --set experts=4 --set active=2 "
    "--set convert.calibration_tokens=128 --set convert.calibration_length=32",
    "judge": "judge ../../moe out --questions ../../questions.jsonl --max-new-tokens 2",
}
"""`train` and `tune` do three steps, with a checkpoint behind each; `study` has five arms."""
KILLED = COMMANDS | {
    "convert, going on": "convert ../../dense out --experts 4 --active 2 --effort high "
    "--data ../../text --set calibration_tokens=256 --set calibration_length=32",
}


def make_inputs(folder: Path) -> Path:
    """Write what the commands read."""
    make_place(folder)
    write_tiny_llama(folder / "narrow", intermediate_size=40)  # few of a study's splits divide it
    write_tiny_llama(folder / "known", vocab_size=49_152)  # llama.cpp knows few tokenizers
    AutoTokenizer.from_pretrained(builtin()).save_pretrained(folder / "known")
    return folder


@dataclass
class Trials:
    """What became of a command that was killed.

    Attributes:
        name: of the command.
        kills: how many times it was killed.
        ends: how many times it was run again until it ended by itself.
        wrong: of each end that was not as if undisturbed, what was.
    """

    name: str
    kills: int = 0
    ends: int = 0
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        clean = self.ends - len(self.wrong)
        return f"{self.name}: {self.kills} kills, {self.ends} ends, {clean} as if undisturbed"


class Killer:
    """Kills one of `KILLED` and runs it again, in folders of its own."""

    def __init__(self, server: Server, place: Path, name: str) -> None:
        self._server, self._place = server, place
        self._command = KILLED[name]
        self.trials = Trials(name)
        whole = self._fresh()
        undisturbed = server.run(whole, self._command)
        assert undisturbed.code == 0, (whole.parent / "log").read_text()
        self.num_events, self._elapsed_s = undisturbed.events, undisturbed.elapsed_s
        self._expected = contents(whole)

    def at_events(self, most: int | None = None) -> Trials:
        """Kill a run before each of its file events, and let the next one end.

        `most` is a number of events to be content with, spread over all.
        """
        step = -(-self.num_events // most) if most else 1
        for event_idx in range(0, self.num_events, step):
            folder = self._fresh()
            killed = self._server.run(folder, self._command, event_idx)
            assert killed.code == -signal.SIGKILL, event_idx
            self.trials.kills += 1
            self._check_end(folder, f"event {event_idx}")
        return self.trials

    def at_random(self, kills: int, seed: int = 0) -> Trials:
        """Kill runs of one folder at random moments until one ends by itself; then begin anew."""
        draw = random.Random(seed)
        while self.trials.kills < kills:
            folder, delays = self._fresh(), []
            while self.trials.kills < kills:
                delays.append(draw.uniform(0, 1.2 * self._elapsed_s))
                end = self._server.run(folder, self._command, kill_after_s=delays[-1])
                if end.code != -signal.SIGKILL:
                    break
                self.trials.kills += 1
            self._check_end(folder, f"kills after {delays} s")
        return self.trials

    def _check_end(self, folder: Path, label: str) -> None:
        left = sorted(file.name for file in folder.rglob("*"))
        again = self._server.run(folder, self._command)
        # the machine may be busier by now: random kills must reach the end of a run all the same
        self._elapsed_s, ended = max(self._elapsed_s, again.elapsed_s), again.code
        # a run that ended before it could be killed is refused, as it should be
        log, found = (folder.parent / "log").read_text(), contents(folder)
        self.trials.ends += 1
        if ended != 0 and not ("holds a finished" in log and found == self._expected):
            self.trials.wrong.append(f"{label}: {log[-300:]} {left}")
        elif found != self._expected:
            names = found.keys() | self._expected.keys()
            differ = sorted(k for k in names if found.get(k) != self._expected.get(k))
            self.trials.wrong.append(f"{label}: differ: {differ} {left}")
        shutil.rmtree(folder.parent)

    def _fresh(self) -> Path:
        folder = self._place / f"{self.trials.name} {self.trials.ends}"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "run").mkdir(parents=True)
        shutil.copytree(self._place / "moe", folder / "moe")  # `report` writes into its card
        return folder / "run"


def contents(run: Path) -> dict[str, Any]:
    """Return what lies beside and in an output, files without times and speeds."""
    files = {file.relative_to(run).as_posix(): file for file in run.rglob("*")}
    return {name: _content(file) for name, file in files.items()}


def _content(file: Path) -> Any:
    if file.is_dir():
        return None
    if file.name in ("log.jsonl", "curve.jsonl", "moefy.json", "results.json", ".moefy.json"):
        text = file.read_text()
        return (
            [_untimed(json.loads(line)) for line in text.splitlines()]
            if (file.suffix == ".jsonl")
            else _untimed(json.loads(text))
        )
    if file.name == "grid.csv":
        rows = csv.DictReader(file.read_text().splitlines())
        return [{k: v for k, v in row.items() if k not in _SPEEDS} for row in rows]
    if file.name == "study.md":
        lines = re.sub("× [0-9.]+", "×", file.read_text()).splitlines()
        return [line for line in lines if not line.startswith(("At equal", "No pruned"))]
    # these show speeds
    if file.suffix in (".html", ".png") or file.name in ("results.md", "quality-decode.csv"):
        return "shown"
    return file.read_bytes()


def _untimed(record: Any) -> Any:
    if isinstance(record, dict):
        return {k: _untimed(v) for k, v in record.items() if not k.endswith(_TIMED)}
    return [_untimed(each) for each in record] if isinstance(record, list) else record
