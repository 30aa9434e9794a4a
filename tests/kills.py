"""Runs a call in a child that kills itself before a chosen file event.

`Server` runs whole commands so. It imports everything once and forks, so that a command costs a
second and not ten. It is a process of its own because torch cannot train in a fork of a process
that has trained.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
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


def lose(path: Path, read_idx: int) -> None:
    """Rename a file or folder away before its n-th file is opened for reading."""
    seen = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal seen
        if event != "open" or not isinstance(args[0], str | bytes | os.PathLike):
            return
        opened = Path(os.fsdecode(args[0])).absolute()
        if path in (opened, *opened.parents):
            if seen == read_idx:
                path.rename(path.with_name(f"{path.name} lost"))
            seen += 1

    sys.addaudithook(hook)


def fill(folder: Path, free_bytes: int) -> None:
    """Leave so many bytes on the disk of a folder, by a file `filler` in it."""
    with (folder / "filler").open("wb") as file:
        size = shutil.disk_usage(folder).free - free_bytes
        os.posix_fallocate(file.fileno(), 0, max(size, 1))


def fill_before(pattern: str, free_bytes: int) -> None:
    """Fill the current folder's disk before a matching file is opened for writing."""

    def hook(event: str, args: tuple[object, ...]) -> None:
        if event != "open" or not int(args[2] or 0) & os.O_ACCMODE:  # type: ignore[call-overload]
            return
        opened = os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else ""
        if Path(opened).match(pattern) and not Path("filler").exists():
            fill(Path(), free_bytes)

    sys.addaudithook(hook)


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


@dataclass(frozen=True)
class End:
    """How a command ended.

    Attributes:
        code: its exit code; of one that a signal ended, minus the signal's number.
        events: the file events below its folder; 0 where a signal ended it.
        elapsed_s: wall time.
        cpu_s: processor time, that of its own children included.
        peak_bytes: the most memory that it held, what it shares with the server included.
        note: what `agrees` of a module of tests/fuzz said of a success.
    """

    code: int
    events: int
    elapsed_s: float
    cpu_s: float
    peak_bytes: int
    note: str | None


class Server:
    """Runs commands in children of a process that has imported everything."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kills"],
            cwd=Path(__file__).parents[1],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_COLOR": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(
        self,
        folder: Path,
        command: str | list[str],
        event_idx: int | None = None,
        *,
        kill_after_s: float | None = None,
        limits: dict[str, int] | None = None,
        loses: tuple[Path, int] | None = None,
        fills: tuple[str, int] | None = None,
        check: tuple[str, str] | None = None,
    ) -> End:
        """Run a command of moefy in a folder; what it prints is in `log` beside the folder.

        Args:
            folder: current folder of the command.
            command: words behind `moefy`.
            event_idx: file event before which it kills itself.
            kill_after_s: seconds after which it is killed.
            limits: of `resource.setrlimit` by name, and `seconds`.
            loses: input that disappears, and before which of its files is read.
            fills: file before which the disk fills up, and how many bytes are left then.
            check: a module and the label that its function `agrees` gets after a success.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        words = command.split() if isinstance(command, str) else command
        lost = (str(loses[0].resolve()), loses[1]) if loses else None
        told = [str(folder), words, event_idx, kill_after_s, limits or {}, lost, fills, check]
        stdin.write(json.dumps(told) + "\n")
        stdin.flush()
        return End(**json.loads(stdout.readline()))

    def close(self) -> None:
        self._process.communicate()


def _run(arguments: list[str], event_idx: int | None, check: list[str] | None) -> None:
    """Run a command of moefy in the current folder, and write how many events there were."""
    from moefy.cli import main

    log = os.open("../log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.argv = ["moefy", *arguments]
    count, code, note = die_before(event_idx, Path.cwd()), 0, None
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        code = 99
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        events = count()
        if code == 0 and check is not None:
            agrees = getattr(importlib.import_module(check[0]), "agrees", None)
            note = agrees(Path.cwd(), check[1]) if agrees else None
        with contextlib.suppress(OSError):
            os.write(3, json.dumps([events, note]).encode())
        os._exit(code)


def _serve() -> None:
    """Read a line with what `Server.run` was told; answer the fields of `End`."""
    import torch

    import moefy

    torch.set_num_threads(1)
    for verb in moefy.__all__:
        getattr(moefy, verb)
    from transformers import LlamaForCausalLM, OlmoeForCausalLM  # noqa: F401

    import moefy.cli
    import moefy.report.charts  # matplotlib takes a second

    for line in sys.stdin:
        folder, arguments, event_idx, kill_after_s, limits, lost, fills, check = json.loads(line)
        out, into = os.pipe()
        started = time.monotonic()
        if (child := os.fork()) == 0:
            os.setsid()
            os.chdir(folder)
            os.dup2(into, 3) if into != 3 else None
            os.set_inheritable(3, False)
            # the alarm's signal ends the process: nothing can catch it by accident
            signal.alarm(limits.pop("seconds", 0))
            for name, limit in limits.items():
                resource.setrlimit(getattr(resource, name), (limit, limit))
            if lost is not None:
                lose(Path(lost[0]), lost[1])
            if fills is not None:
                fill_before(*fills)
            _run(arguments, event_idx, check)
        os.close(into)
        killer = threading.Timer(kill_after_s or 0, os.kill, (child, signal.SIGKILL))
        if kill_after_s is not None:
            killer.start()
        _, status, usage = os.wait4(child, 0)
        killer.cancel()
        elapsed_s = time.monotonic() - started
        with contextlib.suppress(ProcessLookupError):  # workers that it left
            os.killpg(child, signal.SIGKILL)
        events, note = json.loads(os.read(out, 10_000) or b"[0, null]")
        os.close(out)
        code, peak_bytes = os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024
        cpu_s = usage.ru_utime + usage.ru_stime
        end = End(code, events, elapsed_s, cpu_s, peak_bytes, note)
        print(json.dumps(vars(end)), flush=True)


if __name__ == "__main__":
    _serve()
