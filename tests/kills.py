"""Runs a call in a child that kills itself before a chosen file event.

    python -m tests.kills      # on standard input a line of JSON for each command, see `_serve`

The server imports everything once and forks, so that a command costs a second and not ten. It is a
process of its own because torch cannot train in a fork of a process that has trained.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir"}


def die_before(event_idx: int | None, folder: Path | None = None) -> Callable[[], int]:
    """Kill this process before its n-th file event below a folder; return a counter of events.

    An event is a file opened for writing, renamed or removed, or a folder made or removed.
    """
    seen, lock = 0, threading.Lock()
    root = folder.resolve() if folder else None

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        if event == "open":
            if not int(args[2] or 0) & os.O_ACCMODE:  # type: ignore[call-overload]
                return
        elif event not in _CHANGES:
            return
        if not isinstance(args[0], str | bytes | os.PathLike):  # a file descriptor
            return
        path = Path(os.fsdecode(args[0]))
        # shutil.rmtree names what it removes relative to an open folder
        if event in ("os.remove", "os.rmdir", "os.mkdir") and (handle := args[-1]) != -1:
            path = Path(f"/proc/self/fd/{handle}").readlink() / path
        if root is not None and root not in path.absolute().parents:
            return
        with lock:
            if seen == event_idx:
                os.kill(os.getpid(), signal.SIGKILL)
            seen += 1

    sys.addaudithook(hook)
    return lambda: seen


def killed_at(event_idx: int, work: Callable[[], None]) -> bool:
    """Run `work` in a child that kills itself before its n-th file event; say whether it was."""
    child = os.fork()
    if child == 0:
        die_before(event_idx)
        try:
            work()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def _run(arguments: list[str], event_idx: int | None) -> None:
    """Run a command of moefy in the current folder, and write how many events there were."""
    from moefy.cli import main

    log = os.open("../log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["moefy", *arguments]
    count, code = die_before(event_idx, Path.cwd()), 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        code = 99
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        with contextlib.suppress(OSError):
            os.write(3, f"{code} {count()}".encode())
        os._exit(code)


def _serve() -> None:
    """Read [folder, arguments, event or null]; answer "killed" or "EXIT_CODE EVENTS"."""
    import torch

    import moefy

    torch.set_num_threads(1)
    for verb in moefy.__all__:
        getattr(moefy, verb)
    from transformers import LlamaForCausalLM, OlmoeForCausalLM  # noqa: F401

    import moefy.cli
    import moefy.report.training_charts  # matplotlib takes a second

    for line in sys.stdin:
        folder, arguments, event_idx = json.loads(line)
        out, into = os.pipe()
        if (child := os.fork()) == 0:
            os.chdir(folder)
            os.dup2(into, 3) if into != 3 else None
            os.set_inheritable(3, False)
            _run(arguments, event_idx)
        os.close(into)
        status = os.waitpid(child, 0)[1]
        said = os.read(out, 100).decode() if not os.WIFSIGNALED(status) else "killed"
        os.close(out)
        print(said, flush=True)


if __name__ == "__main__":
    _serve()
