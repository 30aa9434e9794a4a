"""Run `convert` in a child that kills itself at its N-th file operation, for every N.

    python kill_convert.py SOURCE OUT N      # prints "killed" or "finished"

The parent imports everything once and forks, so one try takes milliseconds.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import torch

import moefy
import moefy.construct.convert
from moefy.errors import MoefyError
from moefy.recipe import LLAMA_MOE

EXACT: dict[str, Any] = LLAMA_MOE | {"repair": "none"}

WATCHED = ("open", "os.", "shutil.")


def child(source: str, out: str, last: int) -> None:
    seen = 0

    def hook(event: str, _arguments: object) -> None:
        nonlocal seen
        if event.startswith(WATCHED):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    try:
        moefy.convert(source, out, experts=4, active=4, **EXACT, overwrite=True)
    except MoefyError as error:
        print(error, file=sys.stderr)
        os._exit(1)
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        source, out, last = line.split("\t")
        if (pid := os.fork()) == 0:
            child(source, out, int(last))
        status = os.waitpid(pid, 0)[1]
        print("killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}", flush=True)
