"""What a corpus to be prepared consists of: streams of JSON lines, always in the same order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from moefy.data import demo_text
from moefy.data.domains import DEMO, HUB, dataset_rows
from moefy.data.jsonl import ENDINGS, Meter, blocks, field, lines
from moefy.errors import CorpusError
from moefy.progress import ProgressFn, silent
from moefy.recipe import SLIMPAJAMA_KEY


@dataclass(frozen=True)
class Input:
    """One file, or one stream that is read as if it were a file.

    Attributes:
        name: in messages and in the record: the path inside the corpus, or the stream's name.
        domain: of all its documents; None where each line says.
        num_bytes: on disk, which the meter counts up to; 0 where nobody knows.
        read: returns the content, decompressed, and feeds the meter.
    """

    name: str
    domain: str | None
    num_bytes: int
    read: Callable[[Meter], Iterator[bytes]]


def list_inputs(
    data: str | Path,
    *,
    domain_key: str | None = None,
    text_key: str = "text",
    report: ProgressFn = silent,
) -> list[Input]:
    """Return the inputs of a corpus, sorted by domain and path.

    Args:
        data: a folder that holds, for each domain, a file `<domain>.jsonl(.gz, .zst)` or a folder
            `<domain>/` with any number of such files; with `domain_key` any folder of such files,
            or one file; or `hf:NAME[:CONFIG]`, or `demo` (see `open_domains`).
        domain_key: where a line names its domain; dots lead into objects.
        text_key: where a line has its text.
        report: told about downloads.

    Raises:
        CorpusError: no such corpus, or nothing in it.
        AssetError: the demo text cannot be fetched.
    """
    if str(data) == DEMO:
        if domain_key:
            raise CorpusError(f"{DEMO} has its own domains: leave --domain-key out")
        sources = demo_text.sources(report=report)
        return [
            Input(f"{DEMO}:{name}", name, 0, partial(_encoded, partial(_texts, read)))
            for name, read in sorted(sources.items())
        ]
    if str(data).startswith(HUB):
        name, _, config = str(data).removeprefix(HUB).partition(":")
        columns = sorted({key.partition(".")[0] for key in (text_key, domain_key) if key})
        read = partial(_encoded, partial(_rows, name, config or None, columns, text_key))
        return [Input(str(data), None if domain_key else Path(name).name, 0, read)]
    path = Path(data).expanduser()
    if path.is_file():
        found = [(None if domain_key else _stem(path), path)]
        folder = path.parent
    elif path.is_dir():
        folder = path
        found = [(None, file) for file in _files(path)] if domain_key else _by_domain(path)
    else:
        raise CorpusError(
            f"{path} does not exist; the text is a folder of <domain>.jsonl(.gz, .zst) files or of "
            f"<domain>/ folders with such files, {HUB}DATASET, or {DEMO}"
        )
    if not found:
        raise CorpusError(
            f"{path} holds no .jsonl, .jsonl.gz or .jsonl.zst file, neither by itself nor in "
            "folders named for domains"
        )
    if not domain_key:
        _check_not_one_stream(found[0][1])
    return [
        Input(
            file.relative_to(folder).as_posix(), domain, file.stat().st_size, partial(blocks, file)
        )
        for domain, file in found
    ]


def _by_domain(folder: Path) -> list[tuple[str | None, Path]]:
    found: dict[str, list[Path]] = {}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        is_folder = entry.is_dir()
        files = _files(entry) if is_folder else [entry] if _is_jsonl(entry) else []
        name = entry.name if is_folder else _stem(entry)
        if files and name in found:
            raise CorpusError(
                f"{entry} and {found[name][0]} are both the domain {name!r}: remove one, or put "
                f"both into a folder {name}/"
            )
        if files:
            found[name] = files
    return [(name, file) for name in sorted(found) for file in found[name]]


def _files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if _is_jsonl(file)
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _is_jsonl(file: Path) -> bool:
    return file.name.endswith(tuple(f".jsonl{ending}" for ending in ENDINGS)) and file.is_file()


def _stem(file: Path) -> str:
    name, _, _ = file.name.rpartition(".jsonl")
    return name or file.stem


def _check_not_one_stream(file: Path) -> None:
    """Refuse SlimPajama as published when it is about to be read as domains by file or folder."""
    try:
        field(json.loads(next(lines(file), b"")), SLIMPAJAMA_KEY)
    except (ValueError, TypeError, KeyError, RecursionError):
        return
    raise CorpusError(
        f"{file} is one stream of all domains, as SlimPajama is published: pass --domain-key "
        f"{SLIMPAJAMA_KEY}"
    )


def _encoded(rows: Callable[[], Iterator[Any]], meter: Meter) -> Iterator[bytes]:
    """Write rows as JSON lines, so that every corpus takes one way through the workers."""
    for row in rows():
        line = json.dumps(row, default=str).encode() + b"\n"
        meter.add(line)
        yield line


def _texts(read: Callable[[], Iterator[str]]) -> Iterator[dict[str, str]]:
    return ({"text": text} for text in read())


def _rows(
    name: str, config: str | None, columns: list[str], text_key: str
) -> Iterator[dict[str, Any]]:
    for row in dataset_rows(name, config):
        if missing := [column for column in columns if column not in row]:
            raise CorpusError(
                f"the dataset {name!r} has no column {missing[0]!r}, only "
                f"{', '.join(sorted(row))}: name the text with --set text_key=COLUMN, the domain "
                "with --domain-key COLUMN"
            )
        kept = {column: row[column] for column in columns}
        if kept.get(text_key, "") is None:  # how a table says that there is no text
            kept[text_key] = ""
        yield kept
