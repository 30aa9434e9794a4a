"""The application that the commands join, and how it ends."""

from __future__ import annotations

import os
import sys
import time
from typing import Annotated

import typer

from moefy.errors import MoefyError, UsageError
from moefy.hardware import ask_for_huge_pages

app = typer.Typer(
    name="moefy",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Turn a dense LLaMA-family model into a Mixture-of-Experts model.",
)
_LONGEST = 480  # characters of a message: what a file holds may be quoted in it
_debug = False  # set by the callback, which runs before the command

_MOVED = {
    "eval --speed": "moefy bench",
    "eval --routing": "moefy routing",
    "eval --suite": "moefy suite",
    "eval --tasks": "moefy suite --tasks",
    "convert --rescale": "moefy convert --repair",
    "leaderboard": "moefy study OUT --only methods",
}
"""Earlier spellings, and what does the same now."""


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    global _debug
    _debug = debug


def main() -> None:
    """Run the command line: exit code 0, 1 for run time errors, 2 for usage errors."""
    ask_for_huge_pages()  # before torch allocates its first tensor
    try:
        _refuse_moved(sys.argv[1:])
        app()
    except Exception as error:
        if _debug:
            raise
        if os.environ.get("RANK", "0") != "0":
            # torchrun's processes fail alike, and it ends this one when the first has said why
            time.sleep(20)
        # one line, whatever the message holds: a traceback helps nobody but us
        text = _shown(str(error))
        if not isinstance(error, MoefyError):
            text = (
                f"unexpected {type(error).__name__}: {text} (this is a bug: run `moefy --debug …` "
                "for the traceback and report it)"
            )
        print(f"moefy: {text}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 1))


def _shown(text: str) -> str:
    """Return a message in one line that a terminal only shows, its middle cut out if it is long."""
    text = "".join(
        c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split())
    )
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 120]} … {text[-100:]}"


def _refuse_moved(arguments: list[str]) -> None:
    # before Typer sees the words, because Typer would only say "no such option"
    command = next((word for word in arguments if not word.startswith("-")), None)
    # `--suite=llama-moe` is the option --suite, too
    words = {word.partition("=")[0] for word in arguments}
    for old, new in _MOVED.items():
        name, *options = old.split()
        if command == name and words.issuperset(options):
            raise UsageError(f"moefy {old} is now {new}: see {' '.join(new.split()[:2])} --help")
