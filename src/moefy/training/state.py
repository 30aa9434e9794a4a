"""A run's folder and checkpoints, from which it continues as if it had not been stopped.

    OUT/checkpoint/step-00000100/00000.safetensors   weights and optimizer, about 1 GiB a file
    OUT/checkpoint/step-00000100/run.json            step and state of the samples
    OUT/checkpoint/step-00000100/log.jsonl           the log so far, and what else the run reads
    OUT/checkpoint/step-00000100/checksums.json      SHA-256 of each of these files

A checkpoint appears under its name when it is whole. Weights and optimizer are kept by the names of
the parameters, whole, so that any number of processes can read them. A resumed run reads nothing
that no checksum covers: what is damaged is passed over, and it can never be another run in silence.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from moefy.errors import MoefyError, OutputError
from moefy.run_folder import RunFolder
from moefy.storage import file_sha256, replace_file, storage_errors, sync_files
from moefy.training.processes import Processes
from moefy.training.trackers import FILES as TRACKED

FOLDER = "checkpoint"
FINISHED = ".finished"
LOG = "log.jsonl"
REFERENCE = "reference.json"  # losses that a dynamic mixture compares its own with
_JOURNALS = (LOG, REFERENCE)  # of OUT, kept in every checkpoint too
_RECORD = "run.json"
_CHECKSUMS = "checksums.json"
_FILE_BYTES = 1 << 30


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
        own=("recipe.yaml", "broken.txt", *_JOURNALS, *TRACKED),
        scratch=(FOLDER, FINISHED),
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
    """The checkpoints of a run, of which the last `kept` stay.

    Attributes:
        damaged: why each checkpoint that `load` passed over is not whole.
    """

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
        self.damaged: list[str] = []
        learned = nn.ModuleDict(modules)
        names = learned.state_dict().keys()  # without buffers that are computed again
        self._parameters = dict(learned.named_parameters())
        self._buffers = {name: b for name, b in learned.named_buffers() if name in names}

    def require_space(self, num_saved: int, model_bytes: int) -> None:
        """Raise StorageError where so many checkpoints, and the model, do not fit on the disk."""
        learned = [parameter for parameter in self._parameters.values() if parameter.requires_grad]
        one_bytes = sum(map(_num_bytes, self._weights().values()))
        one_bytes += 2 * sum(map(_num_bytes, learned))  # Adam's moments
        # a checkpoint is removed when there is one more; those of a resumed run are there already
        num_new = min(num_saved, self._kept + 1 - len(self._checkpoints()))
        self._folder.require_bytes(max(num_new, 0) * one_bytes + model_bytes)

    def save(self, step: int, samples: dict[str, Any]) -> None:
        """Write a checkpoint behind a step, with the state of the samples.

        StorageError says that the disk is full; the earlier checkpoints are still there.
        """
        moments = {
            f"optimizer.{key}.{name}": value
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
        }
        tensors = {**self._weights(), **moments}
        target = self._folder.work / FOLDER / f"step-{step:08d}"
        partial = target.with_name(".partial")

        def prepare() -> None:
            self._folder.require_bytes(sum(map(_num_bytes, tensors.values())))
            shutil.rmtree(partial, ignore_errors=True)
            with storage_errors(target):
                partial.mkdir(parents=True)

        try:
            self._processes.of_first(prepare)
            self._write(tensors, partial)
            record = {"step": step, "samples": samples}
            self._processes.of_first(lambda: self._keep(partial, target, record))
        finally:
            if self._processes.is_first:
                shutil.rmtree(partial, ignore_errors=True)

    def _write(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Write the tensors, whole, into files that the processes take in turns."""
        groups: list[list[str]] = [[]]
        room = _FILE_BYTES
        for name, tensor in tensors.items():
            if groups[-1] and _num_bytes(tensor) > room:
                groups.append([])
                room = _FILE_BYTES
            groups[-1].append(name)
            room -= _num_bytes(tensor)
        processes, failed = self._processes, None
        for idx, names in enumerate(groups):
            # every process takes part in gathering, also when its own disk is full
            whole = {name: _gathered(tensors[name]) for name in names}
            if idx % processes.size == processes.rank and failed is None:
                try:
                    with storage_errors(folder):
                        save_file(whole, folder / f"{idx:05d}.safetensors")
                except MoefyError as error:
                    failed = error
        processes.agree(failed)

    def _keep(self, partial: Path, target: Path, record: dict[str, Any]) -> None:
        """Give a written checkpoint its name, and remove those that are too many."""
        with storage_errors(target):
            (partial / _RECORD).write_text(json.dumps(record, indent=2) + "\n")
            for name in _JOURNALS:
                if (self._folder.work / name).is_file():
                    shutil.copyfile(self._folder.work / name, partial / name)
            text = json.dumps(_checksums(partial), indent=2) + "\n"
            (partial / _CHECKSUMS).write_text(text)
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

        None if there is none; OutputError if it is another run's, or none of several is whole.
        """
        found, self.damaged = self._processes.of_first(self._last_whole)
        if found is None:
            return None
        try:
            record = json.loads((found / _RECORD).read_text())
            files = [safe_open(file, "pt") for file in sorted(found.glob("*.safetensors"))]
            stored = {name: file for file in files for name in file.keys()}  # noqa: SIM118
            for name, tensor in self._weights().items():
                _assign(tensor, stored.pop(name).get_tensor(name))
            self._optimizer.state.clear()
            for name, file in stored.items():
                _, key, owner = name.split(".", 2)
                parameter = self._parameters[owner]
                value = file.get_tensor(name)
                if key == "step":  # fused AdamW counts on the GPU
                    value = value.to(parameter.device if parameter.is_cuda else "cpu")
                else:
                    value = _assign(torch.zeros_like(parameter.detach()), value)
                self._optimizer.state[parameter][key] = value
            return record["step"], record["samples"]
        except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise OutputError(
                f"{found} is no checkpoint of this run ({str(error).partition(chr(10))[0]}): "
                "delete it to go on from the one before it, or pass --overwrite to start again"
            ) from error

    def _weights(self) -> dict[str, Tensor]:
        return {name: t.detach() for name, t in {**self._parameters, **self._buffers}.items()}

    def _checkpoints(self) -> list[Path]:
        """Return the checkpoints' folders, the last first."""
        return sorted((self._folder.work / FOLDER).glob("step-*"), reverse=True)

    def _last_whole(self) -> tuple[Path | None, list[str]]:
        """Return the last whole checkpoint, its journals put back, and what is wrong with later."""
        broken = []
        for folder in self._checkpoints():
            try:
                expected, found = json.loads((folder / _CHECKSUMS).read_text()), _checksums(folder)
                wrong = [n for n in {**expected, **found} if expected.get(n) != found.get(n)]
                if wrong:
                    raise ValueError(f"{wrong[0]} is damaged or missing")
            except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
                broken.append(f"{folder.name}: {error}")
                continue
            for name in set(_JOURNALS) & set(found):
                replace_file(self._folder.work / name, (folder / name).read_text())
            return folder, broken
        if broken:
            raise OutputError(
                f"no checkpoint of {self._folder.work} is whole ({'; '.join(broken)}): copy one "
                "back, or pass --overwrite to start again"
            )
        return None, broken


def read_log(out: Path) -> list[dict[str, Any]]:
    """Return the lines of a run's log in order, without one that was cut off by a kill.

    OutputError names a line that is damaged.
    """
    steps = []
    for number, text in enumerate((out / LOG).read_text(errors="replace").splitlines(True), 1):
        try:
            line = json.loads(text)
            if not {"loss", "heldout_loss"} & {*line} or not isinstance(line["step"], int):
                raise ValueError("a key is missing")
            steps.append(line)
        except (ValueError, KeyError, TypeError) as error:
            if not text.endswith("\n"):  # the run is writing it, or was killed then
                break
            raise OutputError(
                f"{out / LOG}, line {number} is damaged ({error}): remove the line"
            ) from error
    return steps


def log_step(folder: Path, line: Mapping[str, Any]) -> None:
    """Add a step to the log of a run; raise StorageError if the disk is full."""
    with storage_errors(folder / LOG), (folder / LOG).open("a") as file:
        file.write(json.dumps(line) + "\n")


def _checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a checkpoint, by name."""
    files = [file for file in sorted(folder.iterdir()) if file.name != _CHECKSUMS]
    with ThreadPoolExecutor() as pool:
        return dict(zip([file.name for file in files], pool.map(file_sha256, files), strict=True))


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gathered(tensor: Tensor) -> Tensor:
    """Return a tensor in one piece, to which all processes that hold parts of it contribute."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).contiguous()


def _assign(tensor: Tensor, whole: Tensor) -> Tensor:
    """Copy a whole tensor, or this process's part of it, into another; return that one."""
    if tensor.shape != whole.shape or tensor.dtype != whole.dtype:
        raise ValueError(f"a tensor is {whole.dtype} {tuple(whole.shape)}")
    if isinstance(tensor, DTensor):
        # FSDP over tensor parallelism leaves strides, which nothing can be cut into directly
        plain = [Shard(p.dim) if isinstance(p, _StridedShard) else p for p in tensor.placements]
        parts = distribute_tensor(whole, tensor.device_mesh, plain, src_data_rank=None)
        whole = parts.redistribute(placements=tensor.placements)
    with torch.no_grad():
        return tensor.copy_(whole)
