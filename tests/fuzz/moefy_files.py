"""What moefy writes and reads again: markers, records, journals, checkpoints, rows, locks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.fuzz.changes import byte_changes, value_changes
from tests.kills import Server

_TRAIN = (
    "train moe out --data text --tokens 256 --set sequence_length=32 --set global_batch_size=2 "
    "--set checkpoint_every_steps=1"
)
_PREPARE = "prepare text out --tokenizer dense --workers 1"
_JUDGE = "judge moe out --questions questions.jsonl --max-new-tokens 2"
_STUDY = (
    "study out --model dense --data text --only rescaling --tokens 64 --set sequence_length=32 "
    "--set windows=1"
)
COMMANDS = {
    "marker": "export dense moe out --overwrite",
    "marker of a run": _TRAIN,
    "record of a conversion": "export dense moe out",
    "record of a corpus": "train moe out --data tokens --tokens 64 --set sequence_length=32 "
    "--set global_batch_size=2",
    "partition": "export dense moe out",
    "journal": _PREPARE,
    "checkpoint": _TRAIN,
    "answers": _JUDGE,
    "runs": f"{_STUDY} --report-only",
    "lock": "export dense moe out",
}
_JSON = {
    "marker": ("back/.moefy.json", "out/.moefy.json"),
    "marker of a run": ("stopped/.moefy.json", "out/.moefy.json"),
    "record of a conversion": ("moe/moefy.json", "moe/moefy.json"),
    "record of a corpus": ("tokens/moefy.json", "tokens/moefy.json"),
    "answers": ("judged/judged.jsonl", "out/judged.jsonl"),
    "runs": ("studied/runs.jsonl", "out/runs.jsonl"),
}
_NEEDS = {
    "marker": ("back", "out"),
    "marker of a run": ("stopped", "out"),
    "record of a corpus": ("tokens", "tokens"),
    "journal": ("half", "out"),
    "checkpoint": ("stopped", "out"),
    "answers": ("judged", "out"),
    "runs": ("studied", "out"),
}
"""Prepared folders that a kind needs, and where it needs them."""


def mutations(folder: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    ready = _ready(folder)
    changes: list[tuple[str, str, bytes]] = []
    for kind, (source, target) in _JSON.items():
        content = (ready / source).read_bytes()
        changes += [(f"{kind}: {what}", target, new) for what, new in byte_changes(content, 60)]
        *lines, last = content.splitlines()
        whole = content if target.endswith(".json") else last
        for what, record in value_changes(json.loads(whole), 60):
            new = json.dumps(record).encode() + b"\n"
            if whole is last:
                new = b"\n".join([*lines, new])
            changes.append((f"{kind}: {what}", target, new))
    for kind, stopped in (("journal", "half"), ("checkpoint", "stopped")):
        for file in sorted((ready / stopped).rglob("*")):
            name = file.relative_to(ready / stopped).as_posix()
            if not file.is_file() or name.endswith((".moefy.json", ".yaml", ".bin")):
                continue
            for what, new in byte_changes(file.read_bytes(), 10):
                changes.append((f"{kind}: {name}, {what}", f"out/{name}", new))
            changes.append((f"{kind}: {name} is gone", f"out/{name}", b"gone"))
    for what, new in byte_changes((folder / "moe/partition.npy").read_bytes(), 40):
        changes.append((f"partition: {what}", "moe/partition.npy", new))
    lock = b'{"pid": 1, "host": "x", "since": "2026-01-01T00:00:00+00:00", "finishing": false}'
    for what, new in byte_changes(lock, 40):
        changes.append((f"lock: {what}", ".out.lock", new))
    for label, target, new in changes:
        yield label, partial(_write, ready, folder, label.partition(":")[0], target, new)


def _write(ready: Path, folder: Path, kind: str, target: str, content: bytes) -> None:
    if kind in _NEEDS:
        source, name = _NEEDS[kind]
        shutil.copytree(ready / source, folder / name)
    if content == b"gone":
        (folder / target).unlink()
    else:
        (folder / target).write_bytes(content)


def agrees(folder: Path, label: str) -> str | None:
    """Compare what a run that went on has written with an undisturbed one."""
    whole = {"checkpoint": "trained", "journal": "tokens"}.get(label.partition(":")[0])
    if whole is None:
        return None
    expected = folder.parents[1] / "ready" / whole
    names = ["model.safetensors"] if whole == "trained" else []
    names += [file.relative_to(expected).as_posix() for file in expected.rglob("*.bin")]
    for name in names:
        if (folder / "out" / name).read_bytes() != (expected / name).read_bytes():
            return f"{name} differs from an undisturbed run's"
    return None


def _ready(folder: Path) -> Path:
    """Make the prepared folders once: finished ones, and runs that were killed."""
    ready = folder.parents[1] / "ready"
    if ready.is_dir():
        return ready
    shutil.copytree(folder, ready)
    server = Server()
    finished = {
        "back": "export dense moe back",
        "tokens": _PREPARE.replace(" out ", " tokens "),
        "trained": _TRAIN.replace(" out ", " trained "),
        "judged": _JUDGE.replace(" out ", " judged "),
        "studied": _STUDY.replace(" out ", " studied "),
    }
    events = {}
    for name, command in finished.items():
        end = server.run(ready, command)
        assert end.code == 0, (ready.parent / "log").read_text()
        events[name] = end.events
    for name, whole in (("stopped", "trained"), ("half", "tokens")):
        command = finished[whole].replace(f" {whole} ", f" {name} ")
        for event_idx in range(2 * events[whole] // 3, 0, -1):  # the last moment with a journal
            assert server.run(ready, command, event_idx).code < 0
            if list((ready / name).rglob("journal.json" if name == "half" else "checksums.json")):
                break
            shutil.rmtree(ready / name)
        (ready / f".{name}.lock").unlink()
    server.close()
    return ready
