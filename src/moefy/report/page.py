"""A self-contained HTML page: no script, no font and no picture from elsewhere."""

from __future__ import annotations

from html import escape

from moefy.report.tables import Rows

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem;
       padding: 0 1rem; color: #1a1a1a; background: #fff; }
h1 { line-height: 1.2; } figure { margin: 1.5rem 0; } figcaption { color: #555; }
svg { max-width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
pre { background: #f5f5f5; padding: .8rem; overflow-x: auto; white-space: pre-wrap;
      overflow-wrap: anywhere; }
"""


def html_table(rows: Rows) -> str:
    """Return rows as a table that scrolls sideways on a narrow screen."""
    head = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in rows[0])
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f"<div class='scroll' tabindex='0'>{table}</div>"


def html_figure(svg: str, caption: str) -> str:
    """Return an SVG element with its caption."""
    return f"<figure>{svg}<figcaption>{escape(caption)}</figcaption></figure>"


def html_page(title: str, parts: list[str]) -> str:
    """Return a whole document.

    Args:
        title: plain text.
        parts: HTML, in order.
    """
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{''.join(parts)}</main></body></html>\n"
    )
