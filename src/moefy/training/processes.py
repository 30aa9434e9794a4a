"""The processes of a run and their shares of the work."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from moefy.errors import MoefyError, UsageError
from moefy.training.recipe import TrainRecipe, TuneRecipe

T = TypeVar("T")
_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>: a signal for this process when its parent ends
# the output matrix stays whole: the chunked loss multiplies by it (evaluation/output_loss.py)
_TENSOR_PLAN = {"lm_head": "replicate", "model.embed_tokens": "replicate"}


@dataclass(frozen=True)
class Processes:
    """This process's place among all."""

    rank: int = 0  # of this process; 0 writes
    size: int = 1  # how many there are
    data_idx: int = 0  # which part of every batch this process reads
    num_data: int = 1  # parts of a batch; processes that only split matrices read the same part
    group: Any = None  # the processes that read all parts between them; None for one process
    sizes: dict[str, Any] | None = None  # for transformers' DistributedConfig

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def total(self, values: Float[Tensor, "*values"]) -> Float[Tensor, "*values"]:
        """Return the sum over the parts of the batch."""
        if self.group is not None:
            values = values.clone()
            dist.all_reduce(values, group=self.group)
        return values

    def of_first(self, make: Callable[[], T]) -> T:
        """Return what the first process makes, or raise its error, in every process."""
        if self.size == 1:
            return make()
        made: list[Any] = [None, None]  # the value, or the error: no process may wait for ever
        if self.is_first:
            try:
                made[0] = make()
            except MoefyError as error:
                made[1] = error
        dist.broadcast_object_list(made, src=0)
        if made[1] is not None:
            raise made[1]
        value: T = made[0]
        return value

    def agree(self, error: MoefyError | None) -> None:
        """Raise in every process the error of the first process that has one."""
        errors = [error]
        if self.size > 1:
            errors *= self.size
            dist.all_gather_object(errors, error)
        for found in errors:
            if found is not None:
                raise found

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


ONE = Processes()


def check_processes(recipe: TrainRecipe | TuneRecipe, size: int) -> tuple[int, int]:
    """Return how many of `size` processes share one copy of the weights, and how many read a batch.

    UsageError says why they cannot run the recipe.
    """
    parallel = recipe.parallel
    fixed = parallel.replicate * parallel.tensor
    shard = parallel.shard or max(1, size // fixed)
    if shard * fixed != size:
        asked = parallel.model_dump(include={"shard", "replicate", "tensor"})
        factors = " × ".join(f"{name} {count}" for name, count in asked.items() if count)
        raise UsageError(
            f"the recipe's parallel ({factors}) does not make {size} process{'es' * (size > 1)}: "
            f"start {shard * fixed} with torchrun --nproc-per-node {shard * fixed} -m moefy train "
            "…, or change parallel"
        )
    expert = parallel.expert
    # experts are spread inside one copy of the weights, over whole groups of tensor parallelism
    if (shard * parallel.tensor) % expert or (expert > 1 and expert % parallel.tensor):
        raise UsageError(
            f"expert {expert} is impossible with shard {shard} and tensor {parallel.tensor}: it "
            "must be a multiple of tensor and divide shard × tensor"
        )
    num_data = size // parallel.tensor
    if recipe.global_batch_size % (num_data * recipe.micro_batch_size):
        raise UsageError(
            f"global_batch_size {recipe.global_batch_size} must be a multiple of "
            f"{num_data * recipe.micro_batch_size}: {num_data} process{'es' * (num_data > 1)} with "
            f"micro_batch_size {recipe.micro_batch_size}"
        )
    return shard, num_data


def join_processes(recipe: TrainRecipe | TuneRecipe) -> Processes:
    """Join the processes that torchrun started, or return the only one.

    UsageError says that there are not as many as the recipe asks for, or too few GPUs for them.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # ranks outlive a torchrun that is killed, and would go on writing where the next run writes
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    size = int(os.environ.get("WORLD_SIZE", "1"))
    shard, num_data = check_processes(recipe, size)
    parallel = recipe.parallel
    if size == 1:
        return ONE
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        # asked of all processes alike, so that the first one says it
        here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
        if here > gpus:
            raise UsageError(
                f"{here} processes of this machine cannot share {gpus} GPU{'s' * (gpus > 1)}: "
                "start as many as there are GPUs"
            )
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    groups = [
        dist.new_group(list(range(first, size, parallel.tensor)))
        for first in range(parallel.tensor)
    ]
    return Processes(
        rank,
        size,
        data_idx=rank // parallel.tensor,
        num_data=num_data,
        group=groups[rank % parallel.tensor],
        sizes={
            "fsdp_size": shard,
            "dp_replicate_size": parallel.replicate,
            "tp_size": parallel.tensor,
            "ep_size": parallel.expert,
            **({"tp_plan": _TENSOR_PLAN} if parallel.tensor > 1 else {}),
        },
    )
