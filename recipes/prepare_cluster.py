"""Prepare a corpus of many files with datatrove's executors: here, on Slurm or on Ray.

    pip install 'moefy[datatrove]'
    python recipes/prepare_cluster.py DATA OUT MODEL --tasks 1000 --slurm PARTITION
    python recipes/prepare_cluster.py DATA OUT MODEL --tasks 4          # on this machine

DATA and OUT lie on a file system that all nodes see. Each task is one part of `moefy prepare`, uses
one core and writes a folder of its own in OUT.parts; a task that was stopped goes on where it was
when the same command is run again. A last task moves the parts' shards to OUT. The tokens are those
of a single `moefy prepare`, in the same order, whatever the number of tasks; only their cuts into
files differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from datatrove.executor import LocalPipelineExecutor, RayPipelineExecutor, SlurmPipelineExecutor


def part_step(options: argparse.Namespace) -> Callable[..., None]:
    """Return the pipeline step that does part `rank` of `world_size`."""
    # names of their own: what the step holds on to is pickled and sent to the nodes
    data, out, tokenizer, recipe = options.data, options.out, options.model, options.recipe

    def part(_: Any, rank: int, world_size: int) -> None:
        from moefy.data.prepare import prepare_part

        prepare_part(data, out, rank, world_size, tokenizer=tokenizer, recipe=recipe)

    return part


def gather_step(out: str) -> Callable[..., None]:
    """Return the pipeline step that puts the parts together."""

    def together(*_: Any) -> None:
        from moefy.data.prepare import gather

        gather(out)

    return together


def main() -> None:
    """Run the executor that was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("out")
    parser.add_argument("model", help="whose tokenizer; fetched once before, for nodes offline")
    parser.add_argument("--tasks", type=int, required=True, help="parts; at most one per file")
    parser.add_argument("--workers", type=int, default=-1, help="tasks at once; all by default")
    parser.add_argument("--recipe", help="YAML file: filter, domain_key, skip_broken, …")
    parser.add_argument("--slurm", metavar="PARTITION")
    parser.add_argument("--time", default="24:00:00", help="Slurm's limit per task")
    parser.add_argument("--venv", help="the nodes' virtual environment with moefy in it")
    parser.add_argument("--ray", action="store_true")
    options = parser.parse_args()

    logs = f"{options.out}.logs"
    shared: dict[str, Any] = {
        "tasks": options.tasks,
        "workers": options.workers,
        "skip_completed": False,  # a part knows by itself whether it is done
    }
    if options.slurm:
        slurm = {"time": options.time, "partition": options.slurm, "venv_path": options.venv}
        parts = SlurmPipelineExecutor(
            [part_step(options)], logging_dir=f"{logs}/parts", job_name="prepare", **shared, **slurm
        )
        SlurmPipelineExecutor(
            [gather_step(options.out)],
            tasks=1,
            logging_dir=f"{logs}/gather",
            job_name="gather",
            depends=parts,
            **slurm,
        ).run()
        return
    executor = RayPipelineExecutor if options.ray else LocalPipelineExecutor
    executor([part_step(options)], logging_dir=f"{logs}/parts", **shared).run()
    gather_step(options.out)()


if __name__ == "__main__":
    main()
