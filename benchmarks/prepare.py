"""How fast `moefy prepare` is against the tokenizer alone: docs/data.md.

    python benchmarks/prepare.py DATA WORK [REPEATS]    # DATA: folder of <domain>.jsonl(.gz) files

The ceiling is `encode_batch_fast` on the same documents, already in memory, in batches of a MiB
(one of everything is slower), its ids never looked at: in one process, on all cores with the
library's own threads, and with one process per core. `prepare` is timed from the call to the last
byte, its own start and the disk included. Everything alternates, and medians count. Processor time
is that of all processes together: unlike seconds it means something on a machine that is not quiet.
Writes docs/experiments/prepare.csv and the table in docs/data.md.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from publish import publish_table
from tokenizers import Tokenizer

import moefy
from moefy.checkpoint.load import load_tokenizer
from moefy.checkpoint.source import builtin
from moefy.data.records import open_domains

RESULT = Path(__file__).parents[1] / "docs" / "experiments" / "prepare.csv"
MODEL = "smollm2-135m"
Timing = tuple[float, float]
"""Seconds, and seconds of processor time."""


def in_batches(documents: list[str]) -> list[list[str]]:
    batches: list[list[str]] = [[]]
    for document in documents:
        if sum(map(len, batches[-1])) >= 1 << 20:
            batches.append([])
        batches[-1].append(document)
    return batches


def cpu_s() -> float:
    return sum(os.times()[:4])


def encode(tokenizer: Tokenizer, documents: list[str], *, threads: bool) -> Timing:
    os.environ["TOKENIZERS_PARALLELISM"] = str(threads).lower()
    batches = in_batches(documents)
    started, used = time.perf_counter(), cpu_s()
    for batch in batches:
        tokenizer.encode_batch_fast(batch, add_special_tokens=False)
    return time.perf_counter() - started, cpu_s() - used


def encode_share(backend: str, documents: list[str], ready: Any, results: Any) -> None:
    tokenizer = Tokenizer.from_str(backend)
    encode(tokenizer, documents[:2], threads=False)
    ready.wait()
    results.put(encode(tokenizer, documents, threads=False))


def encode_in_processes(backend: str, documents: list[str], count: int) -> Timing:
    """Return the mean seconds of the shares, as if they ended together, and all processor time."""
    spawn = multiprocessing.get_context("spawn")
    ready, results = spawn.Barrier(count), spawn.Queue()
    children = [
        spawn.Process(target=encode_share, args=(backend, documents[i::count], ready, results))
        for i in range(count)
    ]
    for child in children:
        child.start()
    timings = [results.get() for _ in children]
    for child in children:
        child.join()
    return statistics.mean(wall for wall, _ in timings), sum(used for _, used in timings)


def prepare(data: str, out: Path, workers: int) -> tuple[Timing, int]:
    used = cpu_s()
    os.environ["TOKENIZERS_PARALLELISM"] = str(workers > 1).lower()
    done = moefy.prepare(data, out, tokenizer=MODEL, overwrite=True)
    return (done.elapsed_s, cpu_s() - used), done.tokens


def main(data: str, work: Path, repeats: int) -> None:
    cores = len(os.sched_getaffinity(0))
    backend = load_tokenizer(builtin()).backend_tokenizer.to_str()
    tokenizer = Tokenizer.from_str(backend)
    documents = [text for domain in open_domains(data) for text in domain.documents()]
    moefy.prepare  # noqa: B018 - imports it, which is not what is measured
    tokens = 0
    found: defaultdict[tuple[str, int], list[Timing]] = defaultdict(list)
    for _ in range(repeats):
        found["tokenizer", 1].append(encode(tokenizer, documents, threads=False))
        found["tokenizer, threads", cores].append(encode(tokenizer, documents, threads=True))
        found["tokenizer, processes", cores].append(encode_in_processes(backend, documents, cores))
        for workers in (1, cores):
            timing, tokens = prepare(data, work / "tokens", workers)
            found["moefy prepare", workers].append(timing)
    shutil.rmtree(work / "tokens")
    rows = [["", "cores", "tokens/s", "of the ceiling", "tokens per processor second"]]
    rows[0].append("of the ceiling")
    medians = {
        key: [statistics.median(times) for times in zip(*timings, strict=True)]
        for key, timings in found.items()
    }
    for (name, count), timing in medians.items():
        row = [name, str(count)]
        for kind, seconds in enumerate(timing):
            ceiling = min(
                other[kind]
                for (kept, n), other in medians.items()
                if n == count and kept.startswith("tokenizer")
            )
            row += [f"{tokens / seconds:,.0f}", f"{ceiling / seconds:.2f}"]
        rows.append(row)
    publish_table(rows, RESULT, RESULT.parents[1] / "data.md")
    print(RESULT.read_text(), f"{tokens:,} tokens, {len(documents):,} documents", sep="")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 3)
