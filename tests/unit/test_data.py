"""Documents, held-out split and packing."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from tests.conftest import byte_tokenizer

from moefy.data.demo_text import _plain
from moefy.data.domains import documents_of, is_held_out, open_domains
from moefy.data.packing import pack
from moefy.errors import CorpusError


def test_domains_are_the_files_names(corpus: Path) -> None:
    assert [domain.name for domain in open_domains(corpus)] == ["ab", "xyz"]


def test_held_out_documents_are_never_trained_on(corpus: Path) -> None:
    for domain in open_domains(corpus):
        train, held = (set(documents_of(domain, side)) for side in ("train", "heldout"))
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
    held_out, train = (list(documents_of(domain, split)) for split in ("heldout", "train"))
    assert sorted(held_out + train) == sorted(texts)
    assert held_out

    other = tmp_path / "other"
    datasets.Dataset.from_dict({"content": ["x"]}).to_parquet(other / "train.parquet")
    with pytest.raises(CorpusError, match="no column 'text', only content"):
        list(open_domains(f"hf:{other}")[0].documents())
    with pytest.raises(CorpusError, match="cannot be read"):
        list(open_domains(f"hf:{tmp_path / 'nothing'}")[0].documents())
