"""A self-contained HTML page: no script, no font and no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from moefy.report.chart import Chart
from moefy.report.tables import Rows

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #5a5a5a; --paper: #fff; --line: #ddd;
        --box: #f5f5f5; --link: #0b57a4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --soft: #a8a8a8; --paper: #161616;
        --line: #3a3a3a; --box: #232323; --link: #7db7f5; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 80rem; padding: 1rem;
       color: var(--ink); background: var(--paper); overflow-wrap: break-word; }
a { color: var(--link); }
h1 { line-height: 1.2; margin: .5rem 0; }
h2 { margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
p, li, figcaption, details { max-width: 48rem; }
.lead { font-size: 1.15rem; }
.soft, figcaption { color: var(--soft); }
figcaption { font-size: .9rem; margin-top: .4rem; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; padding: 0; }
.charts { display: grid; grid-template-columns: repeat(6, 1fr); gap: 1.5rem; margin: 1rem 0;
          align-items: start; }
.charts figure { margin: 0; min-width: 0; grid-column: span 6; }
@media (min-width: 45rem) { .charts .small { grid-column: span 3; } }
@media (min-width: 60rem) { .charts .small { grid-column: span 2; }
                            .charts .middle { grid-column: span 3; } }
.plot { background: #fff; border-radius: 4px; overflow-x: auto; }
.plot svg { display: block; width: 100%; height: auto; margin: 0 auto; }
.large .plot svg { min-width: 42rem; }
svg image { image-rendering: pixelated; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums;
        white-space: nowrap; }
th, td { padding: .35rem .4rem; text-align: right; border-bottom: 1px solid var(--line);
         font-weight: normal; }
thead th { font-weight: 600; vertical-align: bottom; white-space: normal; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper);
                 padding-left: 0; }
tbody th.group { color: var(--soft); padding-top: 1rem; position: static; }
tbody th.group span { position: sticky; left: 0; display: inline-block; white-space: normal;
                      max-width: calc(100vw - 2rem); }
pre { background: var(--box); padding: .8rem; border-radius: 4px; font-size: .875rem;
      white-space: pre-wrap; overflow-wrap: anywhere; }
code { font-size: .9em; }
summary { cursor: pointer; }
@media (max-width: 47rem) { th:first-child { max-width: 9rem; white-space: normal; } }
"""
_SIZES = {"small": 4.6, "middle": 6.6}
"""Width of a figure in inches up to which three or two of them stand side by side."""
_PIXELS_PER_INCH = 96
_LARGEST = 1.3
"""How much larger than drawn a figure may be shown."""


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading.

    Attributes:
        name: of its anchor.
        title: plain text.
        body: HTML.
        charts: that it shows; their files lie beside the page.
    """

    name: str
    title: str
    body: str
    charts: Sequence[Chart] = ()


def html_table(rows: Rows) -> str:
    """Return rows as a table that scrolls sideways on a narrow screen.

    Args:
        rows: the header first; a row of one cell is a heading for those below it.
    """
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(_row(row, len(rows[0])) for row in rows[1:])
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll' tabindex='0'>{table}</div>"


def _row(row: list[str], width: int) -> str:
    first, *others = map(escape, row)
    if width > 1 and not others:
        return f"<tr><th class='group' colspan='{width}'><span>{first}</span></th></tr>"
    cells = "".join(f"<td>{cell}</td>" for cell in others)
    return f"<tr><th scope='row'>{first}</th>{cells}</tr>"


def html_charts(charts: Sequence[Chart]) -> str:
    """Return figures with their captions, side by side where there is room."""
    figures = []
    for chart in charts:
        width = chart.figure.get_figwidth()
        size = next((name for name, most in _SIZES.items() if width <= most), "large")
        most = round(width * _PIXELS_PER_INCH * _LARGEST)
        figures.append(
            f"<figure class='{size}' id='{chart.name}'>"
            f"<div class='plot' style='max-width: {most}px' tabindex='0'>{chart.svg()}</div>"
            f"<figcaption>{escape(chart.caption)}</figcaption></figure>"
        )
    return f"<div class='charts'>{''.join(figures)}</div>" if figures else ""


def html_page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """Return a whole document.

    Args:
        title: plain text.
        lead: what is most worth knowing, plain text.
        sections: in order.
    """
    links = "".join(f"<li><a href='#{s.name}'>{escape(s.title)}</a></li>" for s in sections)
    parts = "".join(
        f"<section id='{s.name}'><h2>{escape(s.title)}</h2>{s.body}{html_charts(s.charts)}"
        "</section>"
        for s in sections
    )
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1><p class='lead'>{escape(lead)}</p>"
        f"<nav aria-label='Contents'><ul>{links}</ul></nav>{parts}</main></body></html>\n"
    )
