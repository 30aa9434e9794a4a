"""Chat templates run in a process of their own, in bounded time and memory.

A template is a stranger's program. jinja2's sandbox keeps it from files and modules, but not from
loops in loops, recursion, or a string of gigabytes, and a check of single operations would have to
know all the ways to these. The operating system knows one: limits of a process.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

from moefy.errors import UsageError

_CPU_S = 2  # of one conversation; an ordinary one takes a millisecond
_MEMORY_BYTES = 1 << 30  # of the process
_TEXT_CHARACTERS = 1 << 24

_process: subprocess.Popen[bytes] | None = None


def render(template: str, messages: list[dict[str, Any]], **variables: Any) -> str:
    """Return what a template, Jinja text, makes of messages and of other variables, as JSON.

    Raises:
        ValueError: the template refuses these messages; the error says why.
        UsageError: the template takes too much time or memory.
    """
    global _process
    request = {"chat_template": template, "conversations": [messages], **variables}
    if _process is None or _process.poll() is not None:
        paths = os.pathsep.join(path for path in sys.path if path)
        _process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": paths},
        )
    assert _process.stdin is not None
    assert _process.stdout is not None
    reply = b""
    with suppress(BrokenPipeError):
        _process.stdin.write(json.dumps(request, default=str).encode() + b"\n")
        _process.stdin.flush()
        reply = _process.stdout.readline()
    answer = json.loads(reply) if reply else {}
    if "text" in answer:
        return str(answer["text"])
    if "refused" in answer:
        raise ValueError(f"the chat template refuses the conversation: {answer['refused']}")
    _stop()
    raise UsageError(
        f"the chat template takes more than {_CPU_S} seconds, {_MEMORY_BYTES >> 30} GiB or "
        f"{_TEXT_CHARACTERS >> 20} million characters for one conversation: pass another one "
        "with --chat-template, or remove it from the model's folder"
    )


@atexit.register
def _stop() -> None:
    if _process is not None:
        _process.kill()
        _process.communicate()


def _serve() -> None:
    """Answer requests from standard input until it ends."""
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    requests, replies = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # nothing that a library prints may get between the replies
    _limit("RLIMIT_AS", _MEMORY_BYTES)
    while line := requests.readline():
        # the system ends this process then, and the parent reads the end of its pipe
        _limit("RLIMIT_CPU", int(time.process_time()) + _CPU_S)
        answer = {}
        try:
            text = render_jinja_template(**json.loads(line))[0][0]
            if len(text) <= _TEXT_CHARACTERS:
                answer["text"] = text
        except MemoryError:
            pass
        except Exception as error:  # a template raises whatever it likes
            kind = "" if type(error) is TemplateError else f"{type(error).__name__}: "
            answer["refused"] = " ".join(f"{kind}{error}".split())[:200]
        replies.write(json.dumps(answer).encode() + b"\n")
        replies.flush()


def _limit(name: str, most: int) -> None:
    """Set a limit of this process; one that it was started with may be lower."""
    try:
        import resource
    except ImportError:  # Windows has no limits
        return
    kind = getattr(resource, name)
    hard = resource.getrlimit(kind)[1]
    resource.setrlimit(kind, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


if __name__ == "__main__":
    _serve()
