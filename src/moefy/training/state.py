"""A run's folder and checkpoints, from which it continues as if it had not been stopped.

    OUT/checkpoint/step-00000100/   torch.distributed.checkpoint's files, written by all processes
    OUT/checkpoint/step-00000100/run.json   step, state of the samples, and how large every file is

A checkpoint appears under its name when it is whole. Weights and optimizer are kept by the names of
the parameters, whole, so that any number of processes can read them.
"""

from __future__ import annotations

import json
import pickle
import re
import secrets
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
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

from moefy.errors import OutputError, UsageError
from moefy.run_folder import RunFolder
from moefy.storage import replace_file, storage_errors, sync_files
from moefy.training.processes import Processes
from moefy.training.recipe import TrainRecipe

FOLDER = "checkpoint"
FINISHED = ".finished"
LOG = "log.jsonl"
_RECORD = "run.json"
_PICKLED = {
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "pathlib": ("PosixPath", "WindowsPath"),
}
"""What torch's metadata of a checkpoint is made of, by module."""
_OPTIMIZER = re.compile(r"optimizer\.(\w+)\.(.+)")


@contextmanager
def open_folder(
    out: str | Path, processes: Processes, *, overwrite: bool, sources: Iterable[Any]
) -> Iterator[RunFolder]:
    """Hold the folder of a run until the block ends; the first process does so for all.

    `sources` are what the run reads and must not replace, of which only paths count.
    """
    folder = RunFolder(
        out,
        "model",
        overwrite=overwrite,
        sources=[path for path in sources if isinstance(path, str | Path)],
        resumes=True,
        own=(
            *("recipe.yaml", LOG, "reference.json", "broken.txt"),
            *("wandb-run", "tensorboard/*", "wandb/*"),
        ),
        # figures are drawn into the finished folder, and replaced with it
        scratch=(FOLDER, FINISHED, "*.png"),
    )
    with ExitStack() as stack:
        processes.of_first(lambda: stack.enter_context(folder) and None)
        yield folder


def begin(folder: RunFolder, identity: dict[str, Any], processes: Processes) -> bool:
    """Go on with a run of this identity or begin it; return whether it is finished already."""
    processes.of_first(lambda: folder.begin(identity))
    folder.work, was_finished = processes.of_first(lambda: (folder.work, folder.was_finished))
    return was_finished


class RunState:
    """The checkpoints of a run, of which the last `kept` stay."""

    def __init__(
        self,
        folder: RunFolder,
        modules: dict[str, nn.Module],
        optimizer: torch.optim.Optimizer,
        processes: Processes,
        *,
        kept: int,
    ) -> None:
        self._folder, self._processes, self._kept = folder, processes, kept
        self._optimizer = optimizer
        learned = nn.ModuleDict(modules)
        names = learned.state_dict().keys()  # without buffers that are computed again
        self._parameters = dict(learned.named_parameters())
        self._buffers = {name: b for name, b in learned.named_buffers() if name in names}

    def save(self, step: int, samples: dict[str, Any]) -> None:
        """Write a checkpoint behind a step, with the state of the samples.

        StorageError says that the disk is full; the earlier checkpoints are still there.
        """
        moments = {
            f"optimizer.{key}.{name}": value
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }
        tensors = {name: _whole_shards(t) for name, t in {**self._weights(), **moments}.items()}
        needed_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        self._processes.of_first(lambda: self._folder.require_bytes(needed_bytes))
        target = self._folder.work / FOLDER / f"step-{step:08d}"
        partial = target.with_name(".partial")
        self._processes.of_first(lambda: shutil.rmtree(partial, ignore_errors=True))
        try:
            with storage_errors(target), _as_one():
                save(tensors, storage_writer=FileSystemWriter(partial, sync_files=False))
            record = {"step": step, "samples": samples}
            self._processes.of_first(lambda: self._keep(partial, target, record))
        finally:
            if self._processes.is_first:
                shutil.rmtree(partial, ignore_errors=True)

    def _keep(self, partial: Path, target: Path, record: dict[str, Any]) -> None:
        """Give a written checkpoint its name, and remove those that are too many."""
        with storage_errors(target):
            # the sizes tell a checkpoint that lost its end, as in a power cut or a copy
            record["bytes"] = {file.name: file.stat().st_size for file in partial.iterdir()}
            (partial / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
            sync_files(partial)
            shutil.rmtree(target, ignore_errors=True)  # one that was not whole
            partial.rename(target)
        found = self._checkpoints()
        # what is later was broken, or this run would not be here
        later = [folder for folder in found if folder.name > target.name]
        for folder in [*later, *found[len(later) + self._kept :]]:
            shutil.rmtree(folder, ignore_errors=True)

    def load(self) -> tuple[int, dict[str, Any]] | None:
        """Put the last whole checkpoint into modules and optimizer; return its step and samples.

        None if there is none; OutputError if it cannot be read, or none of several is whole.
        """
        found = self._processes.of_first(self._last_whole)
        if found is None:
            return None
        folder, record = found
        with _readable(folder), _as_one():
            with (folder / ".metadata").open("rb") as file:
                present = _Metadata(file).load().state_dict_metadata
            matches = [match for name in present if (match := _OPTIMIZER.fullmatch(name))]
            moments = {match[0]: (self._parameters[match[2]], match[1]) for match in matches}
            tensors = self._weights()  # read into in place
            for name, (parameter, key) in moments.items():
                like = torch.zeros(()) if key == "step" else torch.zeros_like(parameter.detach())
                tensors[name] = like
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
        return record["step"], record["samples"]

    def _weights(self) -> dict[str, Tensor]:
        return {name: t.detach() for name, t in {**self._parameters, **self._buffers}.items()}

    def _checkpoints(self) -> list[Path]:
        """Return the checkpoints' folders, the last first."""
        return sorted((self._folder.work / FOLDER).glob("step-*"), reverse=True)

    def _last_whole(self) -> tuple[Path, dict[str, Any]] | None:
        broken = []
        for folder in self._checkpoints():
            try:
                record = json.loads((folder / _RECORD).read_text())
                for name, size in record["bytes"].items():
                    if (found := (folder / name).stat().st_size) != size:
                        raise ValueError(f"{name} has {found:,} of {size:,} bytes")
                return folder, record
            except (OSError, ValueError, KeyError) as error:
                broken.append(f"{folder.name}: {error}")
        if broken:
            raise OutputError(
                f"no checkpoint of {self._folder.work} is whole ({'; '.join(broken)}): copy one "
                "back, or pass --overwrite to start again"
            )
        return None


def read_log(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log in order, without one that was cut off by a kill."""
    steps = []
    for line in (out / LOG).read_text().splitlines():
        try:
            steps.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return steps


class RunLog:
    """Writes the log of a run that continues after `first_step`; used by the first process."""

    def __init__(self, folder: Path, first_step: int, recipe: TrainRecipe) -> None:
        self._file = folder / LOG
        lines = read_log(folder) if first_step else []
        kept = [line for line in lines if line["step"] <= first_step]  # later ones are done again
        replace_file(self._file, "".join(json.dumps(line) + "\n" for line in kept))
        self._trackers = [_tracker(name, folder, first_step, recipe) for name in recipe.trackers]

    def write(self, line: dict[str, Any]) -> None:
        """Add a step; raise StorageError if the disk is full."""
        with storage_errors(self._file), self._file.open("a") as file:
            file.write(json.dumps(line) + "\n")
        for tracker in self._trackers:
            tracker.log(dict(_numbers(line)), step=line["step"])

    def close(self) -> None:
        """Let the trackers finish."""
        for tracker in self._trackers:
            tracker.finish()


def check_trackers(recipe: TrainRecipe) -> None:
    """Raise UsageError for a tracker that is not installed."""
    for name in recipe.trackers:
        if find_spec(name) is None:
            raise UsageError(
                f"trackers: {name} is not installed: pip install {name}, or leave it out (every "
                f"step is in {LOG} anyway)"
            )


def _whole_shards(tensor: Any) -> Any:
    """Return a tensor in shards of whole rows, which is all that checkpoints can describe."""
    if not isinstance(tensor, DTensor):
        return tensor
    placements = tuple(
        Shard(p.dim) if isinstance(p, Shard | _StridedShard) else p for p in tensor.placements
    )
    return tensor if placements == tensor.placements else tensor.redistribute(placements=placements)


class _Metadata(pickle.Unpickler):
    """Reads a checkpoint's metadata; a pickle of anything else could run any code."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _PICKLED.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} is no part of a checkpoint")
        return super().find_class(module, name)


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Raise OutputError for a checkpoint that is damaged but has its full size."""
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


def _numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield every number of a log line under a name as `domain_loss/wiki`; lists are left out."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}/")
        elif isinstance(value, int | float):
            yield f"{prefix}{key}", float(value)


def _tracker(name: str, folder: Path, first_step: int, recipe: TrainRecipe) -> Any:
    from accelerate.state import PartialState
    from accelerate.tracking import TensorBoardTracker, WandBTracker

    PartialState()  # which accelerate's trackers ask whether they are the first process's
    if name == "tensorboard":
        # steps that are done again replace those that were written before the run stopped
        tracker = TensorBoardTracker(name, logging_dir=folder, purge_step=first_step + 1)
    else:
        mark = folder / "wandb-run"
        if not (first_step and mark.is_file()):
            replace_file(mark, secrets.token_hex(8))
        tracker = WandBTracker(
            "moefy",
            name=folder.name,
            id=mark.read_text(),
            resume="allow",  # a run that was stopped goes on in the same plot
            dir=folder,
            config=recipe.model_dump(mode="json"),
        )
    tracker.start()
    return tracker
