"""Record the first commands in a terminal of 80 columns, as docs/demo/first-commands.gif.

    python benchmarks/record.py [--cast FILE] [--out FILE]

The commands are really run, in a pseudo-terminal, and what they print is kept with its times in an
asciicast (`--cast`; one that exists is drawn again, and nothing is run). pyte is the terminal,
Pillow draws its cells in the font that matplotlib ships. A command's run is shown in
`_MOST_S` seconds at most, however long it took, and the last picture stays. It needs pyte, which
moefy does not install, and no network if SmolLM2-135M and the demo's texts are in moefy's cache.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import pty
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pyte
from PIL import Image, ImageDraw, ImageFont

OUT = Path(__file__).parents[1] / "docs/demo/first-commands.gif"
COMMANDS = (
    "moefy convert smollm2-135m out/moe --effort fast",
    "moefy eval smollm2-135m out/moe --windows 2",
    "moefy export gguf out/moe out/moe.gguf",
)
_COLUMNS, _ROWS = 80, 30
_MOST_S, _TYPED_S, _READ_S, _LAST_S = 6.0, 1.2, 2.5, 8.0
_FRAME_S = 0.12
_CELL, _FONT_PX, _MARGIN = (10, 20), 16, 12
_GROUND, _TEXT = "#0d1117", "#e6edf3"
_COLOURS = {
    "black": "#6e7681", "red": "#ff7b72", "green": "#3fb950", "brown": "#d29922",
    "blue": "#79c0ff", "magenta": "#d2a8ff", "cyan": "#56d4dd", "white": "#e6edf3",
}  # fmt: skip

Event = tuple[float, str]


def record(commands: tuple[str, ...]) -> list[Event]:
    r"""Run the commands one after another; return what a terminal gets, with times in seconds.

    A command that is typed and one that ends are events of their own: "\0typed" and "\0ended".
    """
    events: list[Event] = []
    started = time.perf_counter()

    def tell(text: str) -> None:
        events.append((time.perf_counter() - started, text))

    with tempfile.TemporaryDirectory() as place:
        for command in commands:
            tell(f"\x1b[1;32m$\x1b[0m \x1b[1m{command}\x1b[0m\r\n")
            tell("\0typed")
            for text in _output(command, place):
                tell(text)
            tell("\r\n")
            tell("\0ended")
    return events


def _output(command: str, place: str) -> Iterator[str]:
    """Run a command of moefy in a pseudo-terminal; give what it prints as it comes."""
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", _ROWS, _COLUMNS, 0, 0))
    here = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    here |= {"TERM": "xterm-256color", "COLORTERM": ""}
    words = [sys.executable, "-m", "moefy", *command.split()[1:]]
    with subprocess.Popen(words, stdin=its, stdout=its, stderr=its, env=here, cwd=place) as run:
        os.close(its)
        while True:
            select.select([ours], [], [])
            try:
                content = os.read(ours, 1 << 16)
            except OSError:  # the other end is closed
                content = b""
            if not content:
                break
            yield content.decode(errors="replace")
        if run.wait():
            raise SystemExit(f"{command} ended with {run.returncode}")
    os.close(ours)


def frames(events: list[Event]) -> list[tuple[Image.Image, int]]:
    """Return the pictures, and how many milliseconds each is shown."""
    screen = pyte.Screen(_COLUMNS, _ROWS)
    stream = pyte.Stream(screen)
    shown: list[tuple[Image.Image, int]] = []
    runs: list[list[Event]] = [[]]
    for event in events:
        runs[-1].append(event)
        if event[1].startswith("\0"):
            runs.append([])
    for run in filter(None, runs):
        end, mark = run.pop()
        length = end - run[0][0] if run else 0.0
        faster = min(1.0, _MOST_S / length) if length else 1.0
        due = run[0][0] * faster if run else 0.0
        for at, text in run:
            while at * faster >= due + _FRAME_S:
                shown.append((_picture(screen), round(1000 * _FRAME_S)))
                due += _FRAME_S
            stream.feed(text)
        rest = _TYPED_S if mark == "\0typed" else _READ_S
        shown.append((_picture(screen), round(1000 * rest)))
    shown[-1] = (shown[-1][0], round(1000 * _LAST_S))
    return shown


def _picture(screen: pyte.Screen) -> Image.Image:
    width, height = _CELL
    size = (_COLUMNS * width + 2 * _MARGIN, _ROWS * height + 2 * _MARGIN)
    image = Image.new("RGB", size, _GROUND)
    draw = ImageDraw.Draw(image)
    for row in range(_ROWS):
        for column in range(_COLUMNS):
            cell = screen.buffer[row][column]
            if cell.data != " ":
                place = (_MARGIN + column * width, _MARGIN + row * height)
                colour = _COLOURS.get(cell.fg.removeprefix("bright"), "")
                if not colour:
                    colour = _TEXT if cell.fg == "default" else f"#{cell.fg}"
                draw.text(place, cell.data, fill=colour, font=_FONTS[cell.bold, cell.italics])
    return image


def _font(name: str) -> Any:
    folder = Path(matplotlib.get_data_path()) / "fonts/ttf"
    return ImageFont.truetype(folder / f"DejaVuSansMono{name}.ttf", _FONT_PX)


_FONTS = {
    (bold, italic): _font(("-" + "Bold" * bold + "Oblique" * italic).removesuffix("-"))
    for bold in (False, True)
    for italic in (False, True)
}


def write(shown: list[tuple[Image.Image, int]], out: Path) -> None:
    """Write an animated GIF of few colours; the same picture twice is one that stays longer."""
    pictures: list[Image.Image] = []
    times: list[int] = []
    for image, milliseconds in shown:
        small = image.quantize(48, dither=Image.Dither.NONE)
        if pictures and small.convert("RGB").tobytes() == pictures[-1].convert("RGB").tobytes():
            times[-1] += milliseconds
        else:
            pictures.append(small)
            times.append(milliseconds)
    pictures[0].save(
        out, save_all=True, append_images=pictures[1:], duration=times, loop=0, optimize=True
    )
    print(
        f"{out}: {len(pictures)} pictures, {sum(times) / 1000:.0f} s, {out.stat().st_size:,} bytes"
    )


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    arguments.add_argument("--cast", type=Path, help="asciicast to write, or to draw if it exists")
    arguments.add_argument("--out", type=Path, default=OUT)
    given = arguments.parse_args()
    if given.cast and given.cast.is_file():
        lines = given.cast.read_text().splitlines()[1:]
        events: list[Event] = [(float(at), text) for at, _, text in map(json.loads, lines)]
    else:
        events = record(COMMANDS)
        if given.cast:
            head = {"version": 2, "width": _COLUMNS, "height": _ROWS}
            rows = [head, *([at, "o", text] for at, text in events)]
            given.cast.write_text("".join(json.dumps(row) + "\n" for row in rows))
    write(frames(events), given.out)


if __name__ == "__main__":
    main()
