"""Every command that writes goes on after a kill: the same command ends as if undisturbed."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import make_place, write_tiny_llama
from tests.kills import Server
from transformers import AutoTokenizer

from moefy.checkpoint.source import builtin

TIMED = ("tokens_per_s", "mfu", "_s", "_ms", "rss_bytes", "date", "speed")
TRAIN = "--set sequence_length=64 --set global_batch_size=2 --set checkpoint_every_steps=1"
TUNE = "--set sequence_length=128 --set global_batch_size=12 --set checkpoint_every_steps=1"
COMMANDS = {
    "convert": "convert ../../dense out --experts 4 --active 2 --partition random --router random "
    "--repair none",
    "prepare": "prepare ../../text out --tokenizer ../../dense --workers 1",
    "train": f"train ../../moe out --data ../../text --tokens 384 {TRAIN}",
    "tune": f"tune ../../moe out --data ../../talks.jsonl --set epochs=1 {TUNE}",
    "report": "report out ../../dense ../moe --data ../../text --windows 1 --sequence-length 32",
    "export gguf": "export gguf ../../known out --dtype f32",
    "export dense": "export dense ../../moe out",
    "judge": "judge ../../moe out --questions ../../questions.jsonl --max-new-tokens 2",
}
EARLY_KILLS = 8
"""Every event of the last third is tried (the swap and the marker). Of those before it only so many
are, evenly, or else the training commands alone would take ten minutes."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_place(tmp_path_factory.mktemp("kills"))
    write_tiny_llama(folder / "known", vocab_size=49_152)  # llama.cpp knows few tokenizers
    AutoTokenizer.from_pretrained(builtin()).save_pretrained(folder / "known")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_command_goes_on_after_a_kill_at_any_event(
    name: str, place: Path, server: Server
) -> None:
    def fresh(label: str) -> Path:
        folder = place / f"{name} {label}"
        (folder / "run").mkdir(parents=True)
        shutil.copytree(place / "moe", folder / "moe")  # `report` writes into its card
        return folder / "run"

    command, whole = COMMANDS[name], fresh("whole")
    undisturbed = server.run(whole, command)
    assert undisturbed.code == 0, log_of(whole)
    num_events = undisturbed.events
    expected = contents(whole)
    early = 2 * num_events // 3
    tried = sorted({*range(0, early, max(1, early // EARLY_KILLS)), *range(early, num_events)})
    wrong = []
    for event_idx in tried:
        folder = fresh(str(event_idx))
        assert server.run(folder, command, event_idx).code == -signal.SIGKILL, event_idx
        left = sorted(file.name for file in folder.rglob("*"))
        ended = server.run(folder, command).code
        found = contents(folder)
        if ended != 0:
            wrong.append((event_idx, log_of(folder)[-300:], left))
        elif found != expected:
            differ = {k for k in found | expected if found.get(k) != expected.get(k)}
            wrong.append((event_idx, f"differ: {sorted(differ)}", left))
        shutil.rmtree(folder.parent)
    print(f"{name}: {num_events} events, {len(tried)} tried, {len(tried) - len(wrong)} clean")
    assert not wrong


def log_of(run: Path) -> str:
    return (run.parent / "log").read_text()


def contents(run: Path) -> dict[str, Any]:
    """Return what lies beside and in an output, files without times and speeds."""
    files = {file.relative_to(run).as_posix(): file for file in run.rglob("*")}
    return {name: _content(file) for name, file in files.items()}


def _content(file: Path) -> Any:
    if file.is_dir():
        return None
    if file.name in ("log.jsonl", "moefy.json", "results.json", ".moefy.json"):
        text = file.read_text()
        return (
            [_untimed(json.loads(line)) for line in text.splitlines()]
            if (file.suffix == ".jsonl")
            else _untimed(json.loads(text))
        )
    # these show speeds
    if file.suffix in (".html", ".png") or file.name in ("results.md", "quality-decode.csv"):
        return "shown"
    return file.read_bytes()


def _untimed(record: Any) -> Any:
    if isinstance(record, dict):
        return {k: _untimed(v) for k, v in record.items() if not k.endswith(TIMED)}
    return [_untimed(each) for each in record] if isinstance(record, list) else record
