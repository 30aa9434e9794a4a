"""A run's state on disk: enough to go on as if nothing had happened."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from moefy.errors import OutputError
from moefy.storage import whole_folder

FOLDER = "checkpoint"
LOG = "log.jsonl"


def save_state(
    out: Path, *, step: int, identity: dict[str, Any], model: Any, optimizer: torch.optim.Optimizer
) -> None:
    """Write master weights and optimizer; the previous checkpoint stays until this one is whole.

    Raises:
        StorageError: the disk is full; the previous checkpoint is still there.
    """
    state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    needed_bytes = 3 * sum(p.numel() * p.element_size() for p in model.parameters())
    with whole_folder(out / FOLDER, needed_bytes=needed_bytes) as partial:
        (partial / "identity.json").write_text(json.dumps(identity, indent=2) + "\n")
        torch.save(state, partial / "state.pt")


def load_state(
    out: Path, *, identity: dict[str, Any], model: Any, optimizer: torch.optim.Optimizer
) -> int:
    """Put the last checkpoint's state into model and optimizer and return its step.

    Returns 0 when there is no checkpoint yet.

    Raises:
        OutputError: the checkpoint belongs to another run.
    """
    folder = out / FOLDER
    if not (folder / "state.pt").is_file():
        return 0
    found = json.loads((folder / "identity.json").read_text())
    if found != identity:
        changed = [
            f"{key}: was {found.get(key)!r}, now {identity.get(key)!r}"
            for key in sorted({*found, *identity})
            if found.get(key) != identity.get(key)
        ]
        raise OutputError(
            f"{out} holds an unfinished run with other settings ({'; '.join(changed)}): give the "
            "same ones to continue it, or --overwrite to start again"
        )
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def remove_state(out: Path) -> None:
    """Delete the checkpoint of a finished run."""
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def read_log(out: Path) -> list[dict[str, Any]]:
    """Return the steps of a run, the first first; a line cut off by a kill is left out."""
    steps = []
    for line in (out / LOG).read_text().splitlines():
        try:
            steps.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return steps
