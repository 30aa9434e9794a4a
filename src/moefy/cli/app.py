"""The application that the commands join, and how it ends."""

from __future__ import annotations

import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.models import CommandFunctionType

from moefy.cli.output import warn
from moefy.errors import MoefyError, UsageError, without_secrets
from moefy.hardware import ask_for_huge_pages
from moefy.version import __version__

_FIRST_SCREEN = """\
moefy turns a dense language model into a Mixture-of-Experts model.

  moefy convert MODEL out/moe               split it; MODEL: a folder or name
  moefy eval MODEL out/moe                  what it lost, and how fast both are
  moefy export gguf out/moe out/moe.gguf    a file for llama.cpp

moefy demo tries all of it on a small model; moefy --help lists the commands."""


class _FlagsWithoutType:
    """A command that does not show `<bool>` behind its flags in --help."""

    def get_params(self, ctx: Any) -> list[Any]:
        found = super().get_params(ctx)  # type: ignore[misc]
        for parameter in found:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return found


class _Command(_FlagsWithoutType, TyperCommand):
    pass


class _Group(_FlagsWithoutType, TyperGroup):
    pass


class App(typer.Typer):
    """Typer's application with our kind of commands."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(cls=_Group, **settings)

    def command(
        self, name: str | None = None, **settings: Any
    ) -> Callable[[CommandFunctionType], CommandFunctionType]:
        """Return Typer's decorator."""
        return super().command(name, cls=_Command, **settings)


app = App(
    name="moefy",
    invoke_without_command=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Turn a dense language model into a Mixture-of-Experts model.",
)
_LONGEST = 480  # characters of a message
_SECRET = re.compile(
    r"KEY|TOKEN|SECRET|PASS|AUTH|CREDENTIAL", re.IGNORECASE
)  # in a variable's name
_SHORTEST_SECRET = 8  # characters; a shorter value may be a word of the message
_STOPPED = 130  # what Typer makes of Ctrl-C
_debug = False  # set by the callback, which runs before the command

_MOVED = {
    "eval --speed": "moefy bench",
    "eval --routing": "moefy routing",
    "eval --suite": "moefy suite",
    "eval --tasks": "moefy suite --tasks",
    "convert --rescale": "moefy convert --repair",
    "demo --out": "moefy demo OUT",
    "leaderboard": "moefy study OUT --only methods",
}
"""Earlier spellings, and what does the same now."""


@app.callback()
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    global _debug
    _debug = debug
    if version:
        print(f"moefy {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(_FIRST_SCREEN)


def main() -> None:
    """Run the command line: exit code 0, 1 for run time errors, 2 for usage errors."""
    ask_for_huge_pages()  # before torch allocates its first tensor
    try:
        _refuse_moved(sys.argv[1:])
        # not standalone: Typer would draw a box around a usage error of its own
        code = app(prog_name="moefy", standalone_mode=False) or 0
        if code == _STOPPED:
            warn("moefy: stopped; the same command goes on where it can, and else begins again")
        sys.exit(code)
    except Exception as error:
        if _debug:
            print(_masked(traceback.format_exc()), file=sys.stderr)
            sys.exit(_explained(error)[1])
        if type(error).__name__ == "NoArgsIsHelpError":  # a class of Typer's own click
            print(error)
            sys.exit(2)
        if os.environ.get("RANK", "0") != "0":
            # torchrun's processes fail alike, and it ends this one when the first has said why
            time.sleep(20)
        # one line, whatever the message holds: a traceback helps nobody but us
        text, code = _explained(error)
        warn(f"moefy: {_shown(text)}")
        sys.exit(code)


def _explained(error: Exception) -> tuple[str, int]:
    """Return what an error says to a person, and its exit code."""
    if isinstance(error, MoefyError):
        return str(error), error.exit_code
    if isinstance(error, typer.Abort):
        return "stopped", 1
    if hasattr(error, "format_message"):  # of Typer: a word of the command line is wrong
        context = getattr(error, "ctx", None)
        path = context.command_path if context else "moefy"
        below = getattr(context.command, "commands", {}) if context and context.parent else {}
        ways = " or ".join(f"`{path} {name} --help`" for name in below)
        return f"{error.format_message().rstrip('.')}: see {ways or f'`{path} --help`'}", 2
    if isinstance(error, ImportError):
        parts = "and the extras that you use, as in 'moefy[gguf]'"
        return f"the installation lacks a part ({error}): pip install --upgrade moefy, {parts}", 1
    if isinstance(error, OSError) and error.errno:
        # the system's and not ours: a file that disappeared, a disk that fails, a lost network
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}: check the place, and run the command again", 2
    bug = "this is a bug: run it again with --debug behind moefy, and report the traceback"
    return f"unexpected {type(error).__name__}: {error} ({bug})", 1


def _shown(text: str) -> str:
    """Return a message in one line that a terminal only shows.

    Its middle is cut out if it is long, as what a file holds may be quoted in it.
    """
    text = _masked(" ".join(text.split()))
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 120]} … {text[-100:]}"


def _masked(text: str) -> str:
    """Return a text without secrets of addresses, and without what the environment keeps secret."""
    text = without_secrets(text)
    secrets = [each for each in os.environ.items() if _SECRET.search(each[0])]
    if hub := sys.modules.get("huggingface_hub"):  # its token may lie in a file
        secrets.append(("HF_TOKEN", hub.get_token() or ""))
    for name, value in secrets:
        # a value out of a file may end with a line end
        if len(value := value.strip()) >= _SHORTEST_SECRET:
            text = text.replace(value, f"[${name}]")
    return text


def _refuse_moved(arguments: list[str]) -> None:
    # before Typer sees the words, because Typer would only say "no such option"
    command = next((word for word in arguments if not word.startswith("-")), None)
    # `--suite=llama-moe` is the option --suite, too
    words = {word.partition("=")[0] for word in arguments}
    for old, new in _MOVED.items():
        name, *options = old.split()
        if command == name and words.issuperset(options):
            raise UsageError(f"moefy {old} is now {new}: see {' '.join(new.split()[:2])} --help")
