"""Where text comes from: files, folders of files, Hugging Face datasets, and the demo text.

Every command finds, names and numbers records by this file's rules. A source is read as a stream of
JSON lines, whatever it is, so that all of them take one way through the code.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from moefy.data import demo_text
from moefy.data.files import FORMS, READABLE, Meter, encode, encode_table, form_of, read_file
from moefy.errors import CorpusError
from moefy.progress import ProgressFn, silent

Side = Literal["train", "heldout", "all"]
DEMO = "demo"
HUB = "hf:"
HELD_OUT_ONE_IN = 20
# each domain becomes a folder of a prepared corpus, and none may lead out of it
_FOLDER_NAME = re.compile(r"[^./\\\x00-\x1f][^/\\\x00-\x1f]{0,99}")
_UNITS = {".jsonl": "line", ".json": "record", ".txt": "paragraph"}


@dataclass(frozen=True)
class Source:
    """One file, or one stream that is read as if it were a file."""

    name: str  # path inside the corpus, or the stream's name
    path: str  # what a person finds it by
    unit: str  # what messages call one of its records: "line", "row"
    domain: str | None  # of all its records; None where each record says
    num_bytes: int  # size on disk; 0 for a stream
    text_key: str  # key of the text in a record
    read: Callable[[Meter], Iterator[bytes]]  # returns the JSON lines and feeds the meter

    def records(self) -> Generator[tuple[str, bytes]]:
        """Iterate over the lines that are not blank, each with its place for messages."""
        for number, line in enumerate(self.read(Meter()), start=1):
            if line.strip():
                yield f"{self.path}, {self.unit} {number}", line


@dataclass(frozen=True)
class Domain:
    """The documents of one domain, lazily and always in the same order."""

    name: str
    sources: tuple[Source, ...]

    def documents(self, side: Side = "all") -> Iterator[str]:
        """Iterate over the texts of one side of the held-out split that are not empty.

        CorpusError names a file that is damaged, or a record that is broken.
        """
        for source in self.sources:
            with closing(source.records()) as records:  # a broken record must not leave files open
                for where, line in records:
                    text = record_of(line, where, source.text_key)[1]
                    if text and (side == "all" or is_held_out(text) == (side == "heldout")):
                        yield text


def open_domains(data: str | Path, *, report: ProgressFn = silent) -> list[Domain]:
    """Return the domains of a corpus (see `find_sources`), sorted by name."""
    sources = find_sources(data, report=report)
    grouped = groupby(sources, lambda source: str(source.domain))
    return [Domain(name, tuple(found)) for name, found in grouped]


def is_held_out(document: str) -> bool:
    """Say whether a document is kept out of training: one in twenty, chosen by its content.

    The choice depends on nothing but the text, so it survives reordering and resharding, and
    copies of a document are always on the same side.
    """
    digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


def find_sources(
    data: str | Path,
    *,
    whole_records: bool = False,
    domain_key: str | None = None,
    report: ProgressFn = silent,
) -> list[Source]:
    """Return the sources of a corpus, sorted by domain and path.

    Args:
        data: a file; a folder that holds, for each domain, a file `<domain>.jsonl` or a folder
            `<domain>/` with any number of files; `hf:NAME[:CONFIG]`, the training split of a
            Hugging Face dataset; or `demo`. Hidden files are never read, and a folder is read in
            the first form of FORMS that it holds. `#KEY` behind it is the key of the text, where
            that is not `text`; dots lead into objects.
        whole_records: not text is wanted but records, such as conversations: files may lie in any
            layout.
        domain_key: key of the domain; files may then lie in any layout.
        report: told about downloads.

    Raises:
        CorpusError: there is no such corpus, or nothing in it.
        AssetError: the demo text cannot be fetched.
    """
    place, key = (str(data), "") if whole_records else split_key(data)
    keys, has_key = [each for each in (key, domain_key) if each], whole_records or domain_key
    if place == DEMO:
        if has_key:
            raise CorpusError(f"{DEMO} is text with its own domains: leave --domain-key out")
        texts = sorted(demo_text.sources(report=report).items())
        return [_stream(f"{DEMO}:{name}", name, partial(_rows_of, read)) for name, read in texts]
    if place.startswith(HUB):
        name, _, config = place.removeprefix(HUB).partition(":")
        rows = partial(_dataset_rows, name, config or None, keys)
        domain = None if has_key else folder_name(Path(name).name, place)
        return [_stream(place, domain, rows, key)]
    path = Path(place).expanduser()
    if not path.exists():
        raise CorpusError(
            f"{path} does not exist; the text is a file ({READABLE}), a folder of <domain>.jsonl "
            f"files or of <domain>/ folders with files, {HUB}DATASET, or {DEMO}"
        )
    files = _files(path, FORMS if key else FORMS[:-1])  # no conversation is a .txt file
    found: list[tuple[str | None, Path]] = [(None, file) for file in files]
    if not has_key:
        found = _by_domain(path, files)
    folder = path.parent if path.is_file() else path
    return [
        Source(
            file.relative_to(folder).as_posix(),
            str(file),
            _UNITS.get(form_of(file), "row"),
            domain,
            file.stat().st_size,
            "text" if form_of(file) == ".txt" else key,
            partial(read_file, file, keys),
        )
        for domain, file in found
    ]


def split_key(data: str | Path) -> tuple[str, str]:
    """Return a corpus without the `#KEY` behind it, and the key of its text."""
    place, separator, key = str(data).rpartition("#")
    if separator and place and key and not Path(str(data)).expanduser().exists():
        return place, key
    return str(data), "text"


def folder_name(name: Any, where: str) -> str:
    """Return the name of a domain; a CorpusError if it would lead out of a folder, or be hidden."""
    if not (isinstance(name, str) and _FOLDER_NAME.fullmatch(name)):
        raise CorpusError(
            f"{where}: {name!r} is the name of a domain and cannot name a folder: change it there"
        )
    return name


def record_of(line: bytes, where: str, text_key: str = "text") -> tuple[dict[str, Any], str]:
    """Return a line's object and the text in it.

    CorpusError says, after `where`, that it is no JSON object with valid Unicode text at the key.
    """
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where}: not a JSON object ({str(error)[:200]})") from error
    try:
        text = field(record, text_key)
    except (TypeError, KeyError) as error:
        found = ", ".join(sorted(map(repr, record))) if isinstance(record, dict) else type(record)
        raise CorpusError(
            f"{where}: not a JSON object with a {text_key!r}, only {str(found)[:200]}: write "
            "DATA#KEY to read the text from another key"
        ) from error
    if not isinstance(text, str):
        raise CorpusError(f"{where}: {text_key!r} is not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair
        raise CorpusError(f"{where}: {text_key!r} is no valid Unicode ({error.reason})") from error
    return record, text


def field(record: Any, key: str) -> Any:
    """Return the value of a key, dots lead into objects; KeyError or TypeError if there is none."""
    for part in key.split("."):
        record = record[part]
    return record


def _files(path: Path, forms: tuple[str, ...]) -> list[Path]:
    if path.is_file():
        if form_of(path) not in forms:
            raise CorpusError(f"{path} is in no form that is read here: name a {READABLE} file")
        return [path]
    by_form: defaultdict[str, list[Path]] = defaultdict(list)
    # rglob does not enter links, but a domain's folder may be one.
    inside = (file for entry in path.iterdir() for file in [entry, *entry.rglob("*")])
    for file in sorted(inside):
        is_hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
        if not is_hidden and file.is_file():
            by_form[form_of(file)].append(file)
    # one form a folder: a readme.txt or a statistics.json beside the corpus is no text of it
    found = next((by_form[form] for form in forms if form in by_form), None)
    if not found:
        raise CorpusError(f"{path} holds no {READABLE} file, neither by itself nor in folders")
    return found


def _by_domain(path: Path, files: list[Path]) -> list[tuple[str | None, Path]]:
    """Name each file's domain: its stem, or the folder of the corpus that it lies in."""
    found: dict[str, list[Path]] = {}
    for file in files:
        # Files of one folder are one domain, but a file beside a folder of its name is a mistake.
        is_alone = file == path or file.parent == path
        stem = file.name[: file.name.lower().rindex(form_of(file))]
        name = folder_name(stem if is_alone else file.relative_to(path).parts[0], str(file))
        others = found.setdefault(name, [])
        if others and (is_alone or others[0].parent == path):
            raise CorpusError(
                f"{others[0]} and {file} are both the domain {name!r}: remove one, or put both "
                f"into a folder {name}/"
            )
        others.append(file)
    return [(name, file) for name in sorted(found) for file in found[name]]


def _stream(
    name: str, domain: str | None, lines: Callable[[], Iterable[bytes]], text_key: str = "text"
) -> Source:
    def read(meter: Meter) -> Iterator[bytes]:
        for line in lines():
            meter.add(line)
            yield line

    return Source(name, name, "row", domain, 0, text_key, read)


def _rows_of(read: Callable[[], Iterator[str]]) -> Iterator[bytes]:
    return (encode({"text": text}) for text in read())


def _dataset_rows(name: str, config: str | None, keys: list[str]) -> Iterator[bytes]:
    try:
        import datasets
    except ImportError:
        raise CorpusError(
            f"{HUB}{name} needs the datasets package: pip install 'moefy[datasets]'"
        ) from None
    try:
        rows = datasets.load_dataset(name, config, split="train", streaming=True)
        yield from encode_table(rows, f"the dataset {name!r}", keys)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise CorpusError(
            f"the dataset {name!r} cannot be read ({first_line}): name a dataset of the hub that "
            f"can be reached, as in {HUB}allenai/c4:en, or a local folder of one"
        ) from error
