"""Processes that tokenise, fed over pipes.

Plain subprocesses instead of the library's process pools: a script that calls `moefy.prepare` needs
no `if __name__ == "__main__"`, and a worker whose parent was killed reads the end of its pipe and
ends too, where a pool's workers would wait for ever.
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

from moefy.data.tokenise import Lines, Tokenised, Tokeniser
from moefy.errors import MoefyError

_AHEAD = 4


class TokeniserPool:
    """A number of processes, each with a copy of a tokeniser."""

    def __init__(self, count: int, tokeniser: Tokeniser) -> None:
        paths = os.pathsep.join(path for path in sys.path if path)
        # One process per core is asked for, so none of them may start threads of its own.
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
        self._idle: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._threads = ThreadPoolExecutor(count)  # each waits for the answer of one process
        for process in self._processes:
            _send(tokeniser, process.stdin)
            self._idle.put(process)

    def tokenise(self, source: Iterator[Lines]) -> Iterator[tuple[Lines, Tokenised]]:
        """Yield lines with what came of them, in order, reading only a little ahead.

        Raises:
            CorpusError: a line is broken.
            MoefyError: a process was killed.
        """
        pending: deque[tuple[Lines, Future[Tokenised]]] = deque()
        # Far enough ahead that no process waits, near enough that memory stays bounded.
        for lines in source:
            pending.append((lines, self._threads.submit(self._ask, lines)))
            if len(pending) > _AHEAD * len(self._processes):
                done, result = pending.popleft()
                yield done, result.result()
        for done, result in pending:
            yield done, result.result()

    def close(self) -> None:
        """Let each process finish what it has begun, and end it."""
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.communicate()

    def _ask(self, lines: Lines) -> Tokenised:
        process = self._idle.get()
        try:
            _send(lines, process.stdin)
            reply = pickle.load(process.stdout)
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


def _send(value: Any, pipe: Any) -> None:
    pickle.dump(value, pipe, pickle.HIGHEST_PROTOCOL)
    pipe.flush()


def _work() -> None:
    """Answer lines from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's; this one reads the end
    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may get between the replies
    reply: Any
    try:
        tokenise = pickle.load(requests)
        while True:
            lines = pickle.load(requests)
            try:
                reply = tokenise(lines)
            except Exception as error:
                if not isinstance(error, MoefyError):  # our bug; a traceback cannot be sent
                    error.add_note(traceback.format_exc())
                reply = error
            _send(reply, replies)
    except (EOFError, BrokenPipeError, pickle.UnpicklingError):
        os._exit(0)  # the parent ended, perhaps within a message; what is unsent interests nobody


if __name__ == "__main__":
    _work()
