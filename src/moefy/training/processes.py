"""The processes of a run: which part of the work is whose."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from moefy.errors import UsageError
from moefy.training.checks import check_processes
from moefy.training.recipe import Parallel

_TENSOR_PLAN = {"lm_head": "replicate", "model.embed_tokens": "replicate"}
"""The output matrix stays whole: the chunked loss multiplies by it (training/output_loss.py)."""


@dataclass(frozen=True)
class Workers:
    """This process's place among all.

    Attributes:
        rank: of this process; 0 writes.
        size: processes.
        data_idx: which part of every batch this process reads.
        num_data: parts of a batch; processes that only split matrices read the same part.
        group: the processes that read all parts between them; None for one process.
        sizes: keyword arguments of transformers' DistributedConfig; None for one process.
    """

    rank: int = 0
    size: int = 1
    data_idx: int = 0
    num_data: int = 1
    group: Any = None
    sizes: dict[str, Any] | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def dense(self) -> dict[str, Any] | None:
        """Return the sizes for a model without experts, as the teacher is."""
        return None if self.sizes is None else self.sizes | {"ep_size": 1}

    def total(self, values: Float[Tensor, "*values"]) -> Float[Tensor, "*values"]:
        """Return the sum over the parts of the batch."""
        if self.group is not None:
            values = values.clone()
            dist.all_reduce(values, group=self.group)
        return values

    def of_first(self, value: Any) -> Any:
        """Return the first process's value in every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            dist.barrier()


ONE = Workers()
"""The only process."""


def join_workers(parallel: Parallel) -> Workers:
    """Join the processes that torchrun started, or return the only one.

    Raises:
        UsageError: the processes are not as many as the recipe asks for, or there are more of a
            machine's than it has GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    shard, num_data = check_processes(parallel, size)
    if size == 1:
        return ONE
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        if local >= torch.cuda.device_count():
            raise UsageError(
                f"process {local} of this machine has no GPU: there are "
                f"{torch.cuda.device_count()}; start as many processes"
            )
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    groups = [
        dist.new_group(list(range(first, size, parallel.tensor)))
        for first in range(parallel.tensor)
    ]
    return Workers(
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
            "fsdp_cpu_offload": parallel.cpu_offload,
            **({"tp_plan": _TENSOR_PLAN} if parallel.tensor > 1 else {}),
        },
    )
