"""Documents, held-out split and packing."""

from __future__ import annotations

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import zstandard
from tests.conftest import byte_tokenizer

import moefy
from moefy.data import files
from moefy.data.demo_text import _plain
from moefy.data.records import is_held_out, open_domains
from moefy.data.shards import TokenShards
from moefy.data.tokenise import pack, scattered
from moefy.errors import CorpusError


def test_domains_are_the_files_names(corpus: Path) -> None:
    assert [domain.name for domain in open_domains(corpus)] == ["ab", "xyz"]


def test_held_out_documents_are_never_trained_on(corpus: Path) -> None:
    for domain in open_domains(corpus):
        train, held = (set(domain.documents(side)) for side in ("train", "heldout"))
        assert train | held == set(domain.documents())
        assert 0 < len(held) < len(train)
        assert all(is_held_out(text) for text in held)
        assert not any(is_held_out(text) for text in train)


def test_one_document_in_twenty_is_held_out() -> None:
    count = sum(is_held_out(f"document {i}") for i in range(20_000))
    assert abs(count - 1000) < 4 * (20_000 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\nnot json\n', "line 2"),
        (b'{"body": "a"}\n', "line 1"),
        (b'{"text": 3}\n', "not a string"),
    ],
)
def test_broken_lines_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "book.jsonl").write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        list(open_domains(tmp_path)[0].documents())


def test_a_truncated_gzip_file_is_named(tmp_path: Path) -> None:
    whole = gzip.compress(json.dumps({"text": "a" * 10_000}).encode() * 50)
    (tmp_path / "book.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(CorpusError, match="damaged"):
        list(open_domains(tmp_path)[0].documents())


def test_a_zstandard_file_reads_like_a_plain_one(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"text": f"text {i}"}).encode() + b"\n" for i in range(500))
    (tmp_path / "book.jsonl.zst").write_bytes(zstandard.compress(lines))
    (domain,) = open_domains(tmp_path)
    assert domain.name == "book"
    assert list(domain.documents()) == [f"text {i}" for i in range(500)]
    (tmp_path / "book.jsonl.zst").write_bytes(zstandard.compress(lines)[:-30])
    with pytest.raises(CorpusError, match="damaged"):
        list(domain.documents())


def test_no_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="does not exist"):
        open_domains(tmp_path / "none")
    with pytest.raises(CorpusError, match="holds no"):
        open_domains(tmp_path)
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "a.jsonl.gz").touch()
    with pytest.raises(CorpusError, match="both the domain 'a'"):
        open_domains(tmp_path)


def test_packing_joins_documents_and_loses_nothing_before_the_end() -> None:
    tokenizer = byte_tokenizer()
    documents = ["hello", "wörld!", "x" * 30, *(f"document {i}" for i in range(200))]
    windows = pack(iter(documents), tokenizer, sequence_length=7, max_windows=1000)
    eos = tokenizer.eos_token_id
    stream = [
        token
        for text in documents
        for token in [*tokenizer(text, add_special_tokens=False)["input_ids"], eos]
    ]
    assert windows.ravel().tolist() == stream[: len(stream) // 7 * 7]
    assert len(stream) % 7  # the test cuts something off


def test_packing_reads_only_what_it_needs() -> None:
    read = 0

    def documents() -> object:
        nonlocal read
        while True:
            read += 1
            yield "y" * 1000

    assert pack(documents(), byte_tokenizer(), sequence_length=10, max_windows=3).shape == (3, 10)
    assert read < 1000


def test_calibration_reads_a_window_of_each_document() -> None:
    documents = [chr(ord("a") + i) * 1000 for i in range(20)]
    windows = _scattered(documents, 20)
    assert {len(set(window)) for window in windows.tolist()} == {1}
    assert len({window[0] for window in windows.tolist()}) == 20


def test_calibration_takes_another_place_with_another_seed() -> None:
    documents = ["".join(map(str, range(i, i + 500))) for i in range(5)]
    first, again, other = (_scattered(documents, 5, seed=seed).tolist() for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_calibration_reads_more_of_few_documents_and_joins_short_ones() -> None:
    documents = ["a" * 1000, "b" * 1000, *"cde"]
    windows = _scattered(documents, 1000)
    assert 2000 // 10 <= len(windows) <= 2000 // 10 + 5  # a piece ends with a token of its own
    first = {window[0] for window in windows[:40].tolist()}
    assert len(first) > 1, "both documents, from the first windows on"
    assert _scattered(["a" * 1000, "b" * 1000], 50).shape == (50, 10)


def _scattered(documents: list[str], max_windows: int, seed: int = 0) -> np.ndarray:
    return scattered(
        iter(documents),
        byte_tokenizer(),
        np.random.default_rng(seed),
        sequence_length=10,
        max_windows=max_windows,
    )


def test_wiki_markup_goes() -> None:
    source = (
        "'''Moe''' is a {{cn|a {{b}}}}[[bar (law)|bar]] in [[Springfield]].<ref>x</ref>\n== A =="
    )
    assert _plain(source) == "Moe is a bar in Springfield.\nA"


def test_a_hugging_face_dataset(tmp_path: Path) -> None:
    import datasets

    texts = [f"document {number}" for number in range(100)]
    folder = tmp_path / "stories"
    datasets.Dataset.from_dict({"text": [None, *texts, ""]}).to_parquet(folder / "train.parquet")
    (domain,) = open_domains(f"hf:{folder}")
    assert domain.name == "stories"
    assert list(domain.documents()) == texts
    held_out, train = (list(domain.documents(split)) for split in ("heldout", "train"))
    assert sorted(held_out + train) == sorted(texts)
    assert held_out

    other = tmp_path / "other"
    datasets.Dataset.from_dict({"content": ["x"]}).to_parquet(other / "train.parquet")
    with pytest.raises(CorpusError, match="no column 'text', only content"):
        list(open_domains(f"hf:{other}")[0].documents())
    with pytest.raises(CorpusError, match="cannot be read"):
        list(open_domains(f"hf:{tmp_path / 'nothing'}")[0].documents())


TEXTS = [f"text {number}: wörld" for number in range(40)]


def in_form(file: Path, texts: list[str]) -> Path:
    """Write documents in the form that the file's name stands for."""
    rows = [{"text": text, "id": number} for number, text in enumerate(texts)]
    form = file.name.removesuffix(".gz").removesuffix(".zst").partition(".")[2]
    content = "".join(json.dumps(row) + "\n" for row in rows)
    if form == "parquet":
        import pyarrow
        from pyarrow.parquet import write_table

        write_table(pyarrow.Table.from_pylist(rows), file)
        return file
    if form == "json":
        content = json.dumps(rows, indent=1, ensure_ascii=False)
    elif form == "csv":
        with io.StringIO(newline="") as table:
            csv.writer(table).writerows(
                [["id", "text"], *((i, text) for i, text in enumerate(texts))]
            )
            content = table.getvalue()
    elif form == "txt":
        content = "\n\n".join(texts)
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(file.suffix, bytes)
    file.write_bytes(packed(content.encode()))
    return file


FORMS = ["jsonl", "jsonl.gz", "jsonl.zst", "json", "json.gz", "csv", "csv.zst", "txt", "parquet"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_reads_the_same_for_every_command(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_BLOCK_BYTES", 100)  # so that records cross from block to block
    folder = tmp_path / "data"
    folder.mkdir()
    file = in_form(folder / f"book.{form}", TEXTS)
    (folder / f"._book.{form}").write_bytes(b"\0 not text")  # as macOS leaves beside each file
    (folder / "notes.md").write_text("no text of the corpus")
    for data in (file, folder):
        (domain,) = open_domains(data)
        assert (domain.name, list(domain.documents())) == ("book", TEXTS)
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    done = moefy.prepare(file, tmp_path / "out", tokenizer=tmp_path / "tokenizer", workers=1)
    record = done.record["domains"]["book"]
    assert record["documents"] + record["heldout_documents"] == len(TEXTS)
    (found,) = done.record["inputs"]["files"]
    assert found["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_folder_is_read_in_one_form(tmp_path: Path) -> None:
    in_form(tmp_path / "statistics.json", ["no text of the corpus"])
    in_form(tmp_path / "readme.txt", ["nor this"])
    assert [domain.name for domain in open_domains(tmp_path)] == ["statistics"]
    in_form(tmp_path / "book.jsonl", TEXTS)
    assert [domain.name for domain in open_domains(tmp_path)] == ["book"]


def test_json_files_that_hold_lines(tmp_path: Path) -> None:
    file = in_form(tmp_path / "c4.jsonl", TEXTS).rename(tmp_path / "c4.json")
    assert list(open_domains(file)[0].documents()) == TEXTS


MISNAMED = {
    "gzip": ("a.jsonl", gzip.compress(b'{"text": "a"}'), "compressed by gzip"),
    "zstd": ("a.txt", zstandard.compress(b"a"), "compressed by Zstandard"),
    "utf-16": ("a.jsonl", '{"text": "a"}'.encode("utf-16"), "UTF-16 text: convert it to UTF-8"),
    "utf-16 without a mark": ("a.jsonl", '{"text": "a"}'.encode("utf-16-le"), "UTF-16 text or no"),
    "xz": ("a.jsonl", lzma.compress(b'{"text": "a"}'), "compressed in a form that is not read"),
    "bz2": ("a.txt", bz2.compress(b"a"), "compressed in a form that is not read here: use gzip"),
    "zip": ("a.json", b"PK\x03\x04" + bytes(30), "is an archive: unpack it"),
    "tar": ("a.jsonl.gz", gzip.compress(b"a" * 257 + b"ustar" + b"a" * 300), "is an archive"),
    "parquet": ("a.jsonl", b"PAR1\x15\x04", "a Parquet file: let its name end in .parquet"),
    "csv without lines": ("a.csv", b"text\n" + b"a" * (1 << 25), "no line end in 16 MiB"),
    "deep line": ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: not a JSON object"),
    "not gzip": ("a.jsonl.gz", b'{"text": "a"}', "damaged compressed file"),
    "not zstd": ("a.jsonl.zst", b'{"text": "a"}', "damaged compressed file"),
    "not parquet": ("a.parquet", b'{"text": "a"}', "cannot be read as parquet"),
    "latin-1": ("a.csv", "text\nwörld".encode("latin-1"), "cannot be read as csv in UTF-8"),
    "no text column": ("a.csv", b"id,body\n1,x", "no column 'text', only body, id"),
    "cut array": ("a.json", b'[{"text": "a"}, {"text": ', "record 2: no JSON, or the array ends"),
    "no record": ("a.json", b'[{"text": "a"}, 3]', "record 2: not a JSON object"),
    "deep": ("a.json", b"[" * 100_000, "record 1: no JSON"),
    "other": ("a.pdf", b"%PDF", "is in no form that is read here"),
}


@pytest.mark.parametrize("kind", MISNAMED)
def test_a_file_of_another_form_is_named_in_one_line(kind: str, tmp_path: Path) -> None:
    name, content, message = MISNAMED[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message) as error:
        list(open_domains(tmp_path / name)[0].documents())
    assert name in str(error.value)
    assert len(str(error.value)) < 500
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["jsonl.gz", "jsonl.zst", "json.gz", "csv.zst", "txt.gz"])
def test_lines_that_expand_without_end(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line is short, so that only their number tells."""
    monkeypatch.setattr(files, "_SMALL_BYTES", 1 << 17)
    line = {"json": b" \n", "csv": b'"a"\n', "txt": b"\n"}.get(form.partition(".")[0], b"\n")
    start = {"json": b"[", "csv": b"text\n"}.get(form.partition(".")[0], b"")
    pack_it = gzip.compress if form.endswith("gz") else zstandard.compress
    file = tmp_path / f"bomb.{form}"
    file.write_bytes(pack_it(start + line * (1 << 18)))
    with pytest.raises(CorpusError, match="expands more than 200-fold"):
        list(open_domains(file)[0].documents())


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    for name, content in {"a.txt": "one\n\ntwo", "a.csv": "text\none\ntwo"}.items():
        (tmp_path / name).write_bytes(content.encode("utf-8-sig"))
        assert list(open_domains(tmp_path / name)[0].documents()) == ["one", "two"]


def test_a_parquet_file_that_names_one_text_in_every_row(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow.parquet import write_table

    text = pyarrow.DictionaryArray.from_arrays([0] * 200, ["a" * (1 << 20)])
    write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 1 << 20
    before = pyarrow.total_allocated_bytes()
    documents = open_domains(tmp_path / "a.parquet")[0].documents()
    for _ in range(100):
        next(documents)
    assert pyarrow.default_memory_pool().max_memory() - before < 1 << 26


@pytest.mark.parametrize("name", ["..", ".hidden", "a/../..", ""])
def test_no_domain_leads_out_of_a_corpus(name: str, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": "a", "by": name}))
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    made = {"tokenizer": tmp_path / "tokenizer", "workers": 1, "domain_key": "by"}
    with pytest.raises(CorpusError, match="cannot name a folder"):
        moefy.prepare(file, tmp_path / "out/x", **made)
    if name == "..":
        with pytest.raises(CorpusError, match="cannot name a folder"):
            open_domains("hf:..")
    assert not list(tmp_path.rglob("*.bin"))


def test_another_key_of_the_text(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"body": {"raw": "one"}}) + "\n")
    assert list(open_domains(f"{file}#body.raw")[0].documents()) == ["one"]
    with pytest.raises(CorpusError, match=r"no.*'text', only 'body': write DATA#KEY"):
        list(open_domains(file)[0].documents())
    (tmp_path / "c#.jsonl").write_text('{"text": "two"}')  # a name like this is no key
    assert list(open_domains(tmp_path / "c#.jsonl")[0].documents()) == ["two"]
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    made = moefy.prepare(
        f"{file}#body.raw", tmp_path / "out", tokenizer=tmp_path / "tokenizer", workers=1
    )
    assert list(made.record["domains"]) == ["a"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_expands_without_end(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_LONGEST_BYTES", 1 << 22)
    pack_it = {".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    file = tmp_path / f"bomb.jsonl{suffix}"
    file.write_bytes(pack_it(b" " * (1 << 28)))
    tracemalloc.start()
    try:
        with pytest.raises(CorpusError, match="no line end in 4 MiB"):
            next(open_domains(file)[0].documents())
        assert tracemalloc.get_traced_memory()[1] < 1 << 25
    finally:
        tracemalloc.stop()


def test_a_corpus_without_domains_is_damaged(tmp_path: Path) -> None:
    tokenizer = {"name": "x", "sha256": "x", "vocab_size": 9, "eos": 8}
    record = {"stage": "prepare", "dtype": "uint16", "tokenizer": tokenizer, "domains": {}}
    (tmp_path / "moefy.json").write_text(json.dumps(record))
    with pytest.raises(CorpusError, match=r"moefy.json is damaged \(domains: "):
        TokenShards(tmp_path)
