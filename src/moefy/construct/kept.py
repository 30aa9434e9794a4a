"""Layers of an unfinished conversion, kept in files so that a killed one goes on behind them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from moefy.checkpoint.targets import RouterScore
from moefy.construct.ffn import FitError, Partition, Routing, SplitFfn
from moefy.hardware import device
from moefy.storage import replace_file


def keep_layer(file: Path, split: SplitFfn) -> None:
    """Write a fitted layer; `load_layer` returns the same one.

    Raises:
        StorageError: the disk is full.
    """
    file.parent.mkdir(exist_ok=True)
    tensors = {
        "shared": torch.from_numpy(split.partition.shared),
        "routed": torch.from_numpy(split.partition.routed),
        "router": split.routing.router,
        "gate": split.gate,
        "up": split.up,
        "down": split.down,
    }
    about = {"fitted": split.fitted, "error": asdict(split.error) if split.error else None}
    placed = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    replace_file(file, save(placed, {"about": json.dumps(about)}))


def load_layer(file: Path, active: int, score: RouterScore) -> SplitFfn | None:
    """Return the layer that was kept; None where there is no whole file.

    Args:
        file: where `keep_layer` wrote it.
        active: routed experts that run for a token.
        score: how the router's logits become weights.
    """
    try:
        with safe_open(file, "pt") as stored:
            found = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            about = json.loads(stored.metadata()["about"])
    except (FileNotFoundError, SafetensorError):
        return None
    gate, up, down, router = (found[name].to(device()) for name in ("gate", "up", "down", "router"))
    error = FitError(**about["error"]) if about["error"] else None
    return SplitFfn(
        Partition(found["shared"].numpy(), found["routed"].numpy()),
        Routing(router, active, score),
        gate,
        up,
        down,
        fitted=about["fitted"],
        error=error,
    )
