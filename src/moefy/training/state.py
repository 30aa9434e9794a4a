"""A run's state on disk: enough to go on as if nothing had happened.

    OUT/checkpoint/step-00000100/   torch.distributed.checkpoint's files, written by all processes
    OUT/checkpoint/step-00000100/run.json   step, identity, mixture, and how large every file is

A checkpoint appears under its name when it is whole. Weights and optimizer are kept by the names of
the parameters, whole, so that any number of processes can read them.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from moefy.errors import OutputError, StorageError
from moefy.storage import check_same_settings, storage_errors, whole_folder
from moefy.training.processes import Workers

FOLDER = "checkpoint"
LOG = "log.jsonl"
_RECORD = "run.json"
_OPTIMIZER = re.compile(r"optimizer\.(\w+)\.(.+)")


@dataclass(frozen=True)
class Saved:
    """What a checkpoint says beside its tensors.

    Attributes:
        step: optimizer steps that were done.
        mixture: the fields of `data.mixture.MixtureState`.
    """

    step: int
    mixture: dict[str, Any]


class RunState:
    """The checkpoints of a run.

    Args:
        out: the run's folder.
        identity: what must be the same for the run to go on.
        modules: what learns, by a short name.
        optimizer: of all of them.
        workers: of the run.
        kept: how many checkpoints stay.
    """

    def __init__(
        self,
        out: Path,
        *,
        identity: dict[str, Any],
        modules: Mapping[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        workers: Workers,
        kept: int,
    ) -> None:
        self._out, self._identity, self._workers, self._kept = out, identity, workers, kept
        self._optimizer = optimizer
        self._parameters = {
            f"{prefix}.{name}": parameter
            for prefix, module in modules.items()
            for name, parameter in module.named_parameters()
        }
        self._buffers = {
            f"{prefix}.{name}": buffer
            for prefix, module in modules.items()
            for name, buffer in _kept_buffers(module)
        }

    def save(self, saved: Saved) -> None:
        """Write a checkpoint, then remove those that are more than `kept`.

        Raises:
            StorageError: the disk is full; the earlier checkpoints are still there.
        """
        tensors = {
            name: _whole_shards(t) for name, t in {**self._weights(), **self._moments()}.items()
        }
        target = self._out / FOLDER / f"step-{saved.step:08d}"
        needed_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        with _shared_folder(target, needed_bytes, self._workers) as partial, _as_one():
            save(tensors, storage_writer=FileSystemWriter(partial, sync_files=False))
            if self._workers.is_first:
                record = {
                    "step": saved.step,
                    "identity": self._identity,
                    "mixture": saved.mixture,
                    "bytes": {file.name: file.stat().st_size for file in partial.iterdir()},
                }
                (partial / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
        if self._workers.is_first:
            found = _checkpoints(self._out)
            # what is later was broken, or this run would not be here
            later = [folder for folder in found if folder.name > target.name]
            for folder in [*later, *found[len(later) + self._kept :]]:
                shutil.rmtree(folder, ignore_errors=True)

    def load(self, *, or_begin_again: bool = False) -> Saved | None:
        """Put the last whole checkpoint into modules and optimizer; None if there is none.

        A checkpoint with missing or shortened files is passed over for the one before it.

        Args:
            or_begin_again: None also where the checkpoints belong to another run or none is whole.

        Raises:
            OutputError: the checkpoint belongs to another run, cannot be read, or none of several
                is whole.
        """
        found = None
        if self._workers.is_first:
            with suppress(OutputError) if or_begin_again else nullcontext():
                found = self._last_whole()
        found = self._workers.of_first(found)
        if found is None:
            return None
        folder, record = found
        with _readable(folder), _as_one():
            present = FileSystemReader(folder).read_metadata().state_dict_metadata
            moments = {
                name: (self._parameters[of], key)
                for name in present
                if (match := _OPTIMIZER.fullmatch(name))
                for key, of in [match.groups()]
            }
            tensors = {
                **self._weights(),
                **{
                    name: torch.zeros((), dtype=torch.float32)
                    if key == "step"
                    else torch.zeros_like(parameter.detach())
                    for name, (parameter, key) in moments.items()
                },
            }
            read = {name: _whole_shards(tensor) for name, tensor in tensors.items()}
            load(read, storage_reader=FileSystemReader(folder))
        with torch.no_grad():
            for name, tensor in tensors.items():
                if read[name] is not tensor:
                    assert isinstance(tensor, DTensor)
                    tensor.copy_(read[name].redistribute(placements=tensor.placements))
        self._optimizer.state.clear()
        for name, (parameter, key) in moments.items():
            tensor = tensors[name]
            if key == "step" and parameter.device.type == "cuda":
                tensor = tensor.to(parameter.device)  # where fused AdamW counts
            self._optimizer.state[parameter][key] = tensor
        return Saved(record["step"], record["mixture"])

    def _weights(self) -> dict[str, Tensor]:
        return {name: t.detach() for name, t in {**self._parameters, **self._buffers}.items()}

    def _moments(self) -> dict[str, Tensor]:
        return {
            f"optimizer.{key}.{name}": value
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }

    def _last_whole(self) -> tuple[Path, dict[str, Any]] | None:
        broken = []
        for folder in _checkpoints(self._out):
            reason, record = _read_record(folder)
            if record is not None:
                wanted = json.loads(json.dumps(self._identity))
                check_same_settings(self._out, record["identity"], wanted)
                return folder, record
            broken.append(f"{folder.name}: {reason}")
        if broken:
            raise OutputError(
                f"no checkpoint of {self._out} is whole ({'; '.join(broken)}): copy one back, or "
                "pass --overwrite to start again"
            )
        return None


def remove_state(out: Path) -> None:
    """Delete the checkpoints of a finished run."""
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


def _checkpoints(out: Path) -> list[Path]:
    """Return the checkpoints' folders, the last first."""
    return sorted((out / FOLDER).glob("step-*"), reverse=True)


def _read_record(folder: Path) -> tuple[str, dict[str, Any] | None]:
    """Return a whole checkpoint's record, or why it is not whole."""
    try:
        record = json.loads((folder / _RECORD).read_text())
        for name, size in record["bytes"].items():
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found:,} of {size:,} bytes", None
    except (OSError, ValueError, KeyError) as error:
        return f"{error}", None
    return "", record


def _kept_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    kept = module.state_dict()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in kept]


def _whole_shards(tensor: Any) -> Any:
    """Return a tensor in shards of whole rows, which is all that checkpoints can describe."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = tuple(
        Shard(p.dim) if isinstance(p, Shard | _StridedShard) else p for p in tensor.placements
    )
    return tensor if placements == tensor.placements else tensor.redistribute(placements=placements)


@contextmanager
def _shared_folder(target: Path, needed_bytes: int, workers: Workers) -> Iterator[Path]:
    """Give all processes one folder to write in, which the first one puts in its place."""
    with ExitStack() as stack:
        partial, problem = None, None
        if workers.is_first:
            try:
                partial = stack.enter_context(whole_folder(target, needed_bytes=needed_bytes))
            except StorageError as error:
                problem = error
        partial, problem = workers.of_first((partial, problem))
        if problem is not None:
            raise problem
        assert partial is not None
        with storage_errors(target):
            yield partial
    workers.wait()


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Say which checkpoint is damaged without being shorter."""
    try:
        yield
    except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        first_line = str(error).partition("\n")[0]
        raise OutputError(
            f"{folder} cannot be read ({first_line}): delete it to go on from the one before it"
        ) from error


@contextmanager
def _as_one() -> Iterator[None]:
    """Let torch's checkpoints behave alike for one process and for many.

    Silences the warning that there is only one, and raises the first process's error for
    CheckpointException, which is no Exception.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")
        try:
            yield
        except CheckpointException as error:
            raise next(iter(error.failures.values()))[0] from error
