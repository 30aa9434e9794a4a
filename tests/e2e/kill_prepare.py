"""Run `prepare` in a child that kills itself at its N-th file operation in the output.

    python kill_prepare.py DATA OUT TOKENIZER N      # a line each; prints "killed" or "exit 0"

The parent imports everything once and forks, so one try takes a fraction of a second.
"""

from __future__ import annotations

import os
import signal
import sys

import moefy
import moefy.data.prepare

WATCHED = ("open", "os.", "shutil.")


def child(data: str, out: str, tokenizer: str, last: int) -> None:
    seen = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event.startswith(WATCHED) and any(out in str(argument) for argument in arguments):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    moefy.prepare(data, out, tokenizer=tokenizer)
    os._exit(0)


if __name__ == "__main__":
    moefy.prepare  # noqa: B018 - imports it
    moefy.data.prepare._COMMIT_EVERY_S = 0.0
    moefy.data.prepare._BATCH_BYTES = 2000
    for line in sys.stdin:
        data, out, tokenizer, last = line.split("\t")
        if (pid := os.fork()) == 0:
            child(data, out, tokenizer, int(last))
        status = os.waitpid(pid, 0)[1]
        print("killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}", flush=True)
