"""Worker processes that tokenise, fed over pipes.

Plain subprocesses instead of a process pool of the library: a script that calls `moefy.prepare`
needs no `if __name__ == "__main__"`, and a worker whose parent was killed reads the end of its pipe
and ends too.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from moefy.data.tokenise import Batch, Job, Tokenised, Tokeniser
from moefy.errors import MoefyError

_AHEAD = 4


class Workers:
    """A number of processes that tokenise batches.

    Args:
        count: how many.
        job: see `Job`.
    """

    def __init__(self, count: int, job: Job) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        one_core = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | one_core | {"PYTHONPATH": paths},
            )
            for _ in range(count)
        ]
        self._idle: queue.SimpleQueue[subprocess.Popen[bytes]] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(count)
        for process in self._processes:
            _send(process, job)
            self._idle.put(process)

    def tokenise(self, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tokenised]]:
        """Yield batches with their results, in order, reading only a few batches ahead.

        Raises:
            CorpusError: a broken line.
            MoefyError: a worker was killed.
        """
        ahead = _AHEAD * len(self._processes)
        pending: deque[tuple[Batch, Future[Tokenised]]] = deque()
        for batch in batches:
            pending.append((batch, self._threads.submit(self._run, batch)))
            if len(pending) > ahead:
                batch, result = pending.popleft()
                yield batch, result.result()
        for batch, result in pending:
            yield batch, result.result()

    def _run(self, batch: Batch) -> Tokenised:
        process = self._idle.get()
        try:
            _send(process, batch)
            reply = pickle.load(process.stdout)  # type: ignore[arg-type]
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise MoefyError(
                f"a worker process ended with exit status {process.wait()} (-9 is mostly lack of "
                "memory): run the same command again, with fewer --workers"
            ) from error
        finally:
            self._idle.put(process)
        if isinstance(reply, Exception):
            raise reply
        return reply

    def close(self) -> None:
        """Let each worker finish its batch, and end them."""
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()


def _send(process: subprocess.Popen[bytes], value: Any) -> None:
    pipe = process.stdin
    pickle.dump(value, pipe, pickle.HIGHEST_PROTOCOL)  # type: ignore[arg-type]
    pipe.flush()  # type: ignore[union-attr]


def _work() -> None:
    """Answer batches from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; this one reads the end
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may get between the replies
    tokenise = Tokeniser(pickle.load(requests))
    while True:
        try:
            batch = pickle.load(requests)
        except (EOFError, pickle.UnpicklingError):  # the parent ended, perhaps within a batch
            return
        reply: Tokenised | Exception
        try:
            reply = tokenise(batch)
        except MoefyError as error:
            reply = error
        except Exception:
            reply = RuntimeError(traceback.format_exc())
        try:
            pickle.dump(reply, replies, pickle.HIGHEST_PROTOCOL)
            replies.flush()
        except BrokenPipeError:
            os._exit(0)  # a plain return would complain that the rest cannot be flushed


if __name__ == "__main__":
    _work()
