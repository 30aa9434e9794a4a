"""Raw text to token shards: every layout, every error, restart, and what reads them."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from tests.conftest import byte_tokenizer

import moefy
from moefy.cli import main
from moefy.data import files
from moefy.data.prepare import SLIMPAJAMA_KEY, SLIMPAJAMA_NAMES
from moefy.data.records import open_domains
from moefy.data.shards import TokenShards, is_prepared
from moefy.data.tokenise import pack
from moefy.errors import CorpusError, MoefyError, OutputError, StorageError
from moefy.run_folder import MARKER


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def run(tmp_path: Path, tokenizer: Path) -> Callable[..., TokenShards]:
    """Prepare, and open the result."""

    def prepare(data: object, out: str = "tokens", **choices: Any) -> TokenShards:
        choices = {"tokenizer": tokenizer} | choices
        return TokenShards(moefy.prepare(str(data), tmp_path / out, **choices).folder)

    return prepare


def write(file: Path, rows: list[Any]) -> Path:
    content = b"".join(
        row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows
    )
    if file.suffix == ".gz":
        content = gzip.compress(content, mtime=0)
    elif file.suffix == ".zst":
        content = zstandard.compress(content)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def rows(word: str, count: int = 30) -> list[dict[str, str]]:
    return [{"text": f"{word} {number}"} for number in range(count)]


def texts(shards: TokenShards, domain: str) -> set[str]:
    """Return all documents of a domain, decoded."""
    found: set[str] = set()
    for split in ("train", "heldout"):
        ids = shards.windows(domain, 1, split)[:, 0]
        found |= set(byte_tokenizer().decode(ids.tolist()).split("<eos>"))
    return found - {""}


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file but the marker, whose identity has the name of the data."""
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != MARKER)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_sequences_are_the_windows_that_training_packs(
    corpus: Path, run: Callable[..., TokenShards], split: Any
) -> None:
    file = corpus / "ab.jsonl"
    special = [{"text": f"ends <eos> early, {number}: wörld 漢字"} for number in range(60)]
    write(file, [*special, {"text": ""}, b"\n", file.read_bytes()])
    shards = run(corpus)
    tokenizer = byte_tokenizer()
    assert shards.domains == ["ab", "xyz"]
    for domain in open_domains(corpus):
        windows = pack(domain.documents(split), tokenizer, sequence_length=64, max_windows=10**6)
        assert len(windows)
        np.testing.assert_array_equal(shards.windows(domain.name, 64, split), windows)
    record = shards.record["domains"]["ab"]
    assert record["documents"] + record["heldout_documents"] == 140
    assert record["empty"] == 1
    assert tokenizer("<eos>")["input_ids"] == [tokenizer.eos_token_id]  # pack changed nothing


def test_the_same_bytes_whatever_the_batches(
    corpus: Path, run: Callable[..., TokenShards], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = run(corpus, "one")
    monkeypatch.setattr("moefy.data.prepare._BATCH_BYTES", 3000)
    many = run(corpus, "many")
    assert contents(one.folder) == contents(many.folder)
    for shard in one.record["domains"]["ab"]["shards"]:
        content = (one.folder / shard["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == shard["sha256"]
        assert len(content) == 2 * shard["tokens"]
    files = {file["file"]: file for file in one.record["inputs"]["files"]}
    raw = (corpus / "xyz.jsonl.gz").read_bytes()
    assert files["xyz.jsonl.gz"]["sha256"] == hashlib.sha256(raw).hexdigest()


def test_a_folder_for_each_domain(tmp_path: Path, run: Callable[..., TokenShards]) -> None:
    data = tmp_path / "data"
    write(data / "web/b/2.jsonl.gz", rows("second"))
    write(data / "web/a.jsonl", rows("first"))
    write(data / "web/.cache/c.jsonl", rows("hidden"))
    (data / "web").rename(tmp_path / "elsewhere")
    (data / "web").symlink_to(tmp_path / "elsewhere")
    write(data / "code.jsonl.zst", rows("code"))
    write(data / ".cache/d.jsonl", rows("hidden"))
    (data / "notes.txt").write_text("no corpus")
    shards = run(data)
    assert shards.domains == ["code", "web"]
    assert texts(shards, "web") == {row["text"] for row in rows("first") + rows("second")}
    write(data / "code/more.jsonl", rows("x"))
    with pytest.raises(CorpusError, match="are both the domain 'code'"):
        run(data, "other")


def test_slimpajama_as_published(tmp_path: Path, run: Callable[..., TokenShards]) -> None:
    data = tmp_path / "SlimPajama-627B/train"
    stream = [
        {"text": f"{name} {number}", "meta": {"redpajama_set_name": name}}
        for number in range(40)
        for name in SLIMPAJAMA_NAMES
    ]
    write(data / "chunk1/example_train_0.jsonl.zst", stream[:100])
    write(data / "chunk2/example_train_1.jsonl.zst", stream[100:])
    shards = run(data, domain_key=SLIMPAJAMA_KEY)
    assert shards.domains == ["arxiv", "book", "c4", "cc", "github", "stackexchange", "wikipedia"]
    assert texts(shards, "wikipedia") == {f"RedPajamaWikipedia {number}" for number in range(40)}
    write(
        data / "chunk2/example_train_2.jsonl.zst",
        [{"text": "x", "meta": {"redpajama_set_name": "RedPajamaNews"}}],
    )
    with pytest.raises(CorpusError, match=r"train_2.jsonl.zst, line 1: .*'RedPajamaNews'; allowed"):
        run(data, "unknown", domain_key=SLIMPAJAMA_KEY)
    shards = run(data, "unknown", domain_key=SLIMPAJAMA_KEY, skip_broken=True)
    assert shards.record["broken_lines"] == 1
    assert "RedPajamaNews" in shards.record["broken_examples"][0]


def test_any_other_key(tmp_path: Path, run: Callable[..., TokenShards]) -> None:
    file = write(
        tmp_path / "all.jsonl",
        [{"body": f"{name} {number}", "by": name} for number in range(30) for name in "ab"],
    )
    shards = run(f"{file}#body", domain_key="by")
    assert shards.domains == ["a", "b"]
    assert len(texts(shards, "a")) == 30
    for name, message in (("../up", "cannot name a folder"), (3, ": 3 is"), (None, ": None is")):
        write(file, [{"body": "x", "by": name}])
        with pytest.raises(CorpusError, match=message):
            run(f"{file}#body", f"bad{name}".replace("/", ""), domain_key="by")
    write(file, [{"body": "x", "by": f"d{number}"} for number in range(300)])
    with pytest.raises(CorpusError, match="more than 200 domains"):
        run(f"{file}#body", "many", domain_key="by")


def test_a_hugging_face_dataset(tmp_path: Path, run: Callable[..., TokenShards]) -> None:
    import datasets

    columns = {
        "text": [None, *(f"document {number}" for number in range(40)), ""],
        "meta": [{"from": "ab"[number % 2]} for number in range(42)],
        "id": list(range(42)),
    }
    folder = tmp_path / "stories"
    datasets.Dataset.from_dict(columns).to_parquet(folder / "train.parquet")
    shards = run(f"hf:{folder}")
    assert texts(shards, "stories") == set(columns["text"][1:41])
    assert shards.record["domains"]["stories"]["empty"] == 2
    shards = run(f"hf:{folder}", "keyed", domain_key="meta.from")
    assert texts(shards, "a") == set(columns["text"][2:41:2])
    with pytest.raises(CorpusError, match=r"no column 'body', only id, meta, text"):
        run(f"hf:{folder}#body", "other")


BROKEN = {
    "no JSON": (b"not json\n", "line 2"),
    "no object": (b"[1]\n", "line 2"),
    "deep": (b"[" * 100_000 + b"\n", "line 2"),
    "no text": (b'{"body": "a"}\n', "line 2: .*'text'"),
    "text no string": (b'{"text": 3}\n', "line 2: 'text' is not a string"),
    "half a pair": (b'{"text": "\\ud800"}\n', "line 2: 'text' is no valid Unicode"),
    "no UTF-8": (b'{"text": "\xff"}\n', "line 2"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_lines_are_named_or_counted(
    tmp_path: Path,
    run: Callable[..., TokenShards],
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    monkeypatch.setattr(
        "moefy.data.prepare._BATCH_BYTES", 1
    )  # so that each line is a batch of its own
    line, message = BROKEN[kind]
    good = rows("good")
    file = write(tmp_path / "data/book.jsonl", [good[0], line, *good[1:]])
    with pytest.raises(CorpusError, match=f"book.jsonl, {message}.*--skip-broken") as error:
        run(file.parent)
    assert len(str(error.value)) < 1000
    with pytest.raises(CorpusError, match="is an unfinished corpus"):
        TokenShards(tmp_path / "tokens")
    shards = run(file.parent, skip_broken=True)  # goes on where it stopped
    assert texts(shards, "book") == {row["text"] for row in good}
    assert shards.record["broken_lines"] == shards.record["domains"]["book"]["broken_lines"] == 1
    assert re.search(message, shards.record["broken_examples"][0])
    fresh = run(file.parent, "fresh", skip_broken=True)
    assert contents(fresh.folder) == contents(shards.folder)


def test_files_that_are_no_text(
    tmp_path: Path, run: Callable[..., TokenShards], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    write(data / "a.jsonl", rows("a"))
    write(data / "b.jsonl.gz", [b"\n\n"])
    with pytest.raises(CorpusError, match=r"b.jsonl.gz is empty: pass --skip-broken"):
        run(data)
    shards = run(data, skip_broken=True)
    assert shards.domains == ["a"]
    assert [file["empty"] for file in shards.record["inputs"]["files"]] == [False, True]

    whole = write(data / "b.jsonl.gz", rows("b", 5000)).read_bytes()
    (data / "b.jsonl.gz").write_bytes(whole[:-20])
    with pytest.raises(CorpusError, match="damaged compressed file"):
        run(data, "cut")
    (data / "b.jsonl.gz").write_bytes(whole + bytes(512))  # padded, which is allowed
    assert len(texts(run(data, "padded"), "b")) == 5000
    monkeypatch.setattr(files, "_LONGEST_BYTES", 1000)
    write(data / "b.jsonl.gz", [b"x" * 2000])
    with pytest.raises(CorpusError, match="no line end in"):
        run(data, "long")
    (tmp_path / "empty").mkdir()
    for nothing in (tmp_path / "nothing", tmp_path / "empty"):
        with pytest.raises(CorpusError, match=r"does not exist|holds no \.jsonl"):
            run(nothing, "none")
    write(tmp_path / "blank/a.jsonl", [{"text": ""}])
    with pytest.raises(CorpusError, match="no document is left"):
        run(tmp_path / "blank", "blank-tokens")


def test_tokenizers_that_do_not_fit(
    corpus: Path, tmp_path: Path, run: Callable[..., TokenShards]
) -> None:
    shards = run(corpus)
    again = byte_tokenizer()
    again.chat_template = "{{ messages }}"
    again.save_pretrained(tmp_path / "again")
    shards.require_tokenizer(tmp_path / "again")
    other = byte_tokenizer()
    other.add_tokens(["th"])
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CorpusError, match=r"is another one \(257 tokens and 258 tokens\)"):
        shards.require_tokenizer(tmp_path / "other")
    other.eos_token = None
    other.save_pretrained(tmp_path / "endless")
    with pytest.raises(CorpusError, match="no end-of-text token"):
        run(corpus, "endless-tokens", tokenizer=tmp_path / "endless")
    with pytest.raises(MoefyError, match="no readable tokenizer"):
        run(corpus, "none-tokens", tokenizer=corpus)
    with pytest.raises(MoefyError, match="does not exist; a source is"):
        run(corpus, "none-tokens", tokenizer="nothing")
    assert not (tmp_path / "none-tokens").exists()


def test_a_large_vocabulary_takes_four_bytes(
    tmp_path: Path, run: Callable[..., TokenShards]
) -> None:
    large = byte_tokenizer()
    large.add_tokens([f"w{number:05d}" for number in range(70_000)])
    large.save_pretrained(tmp_path / "large")
    write(tmp_path / "data/a.jsonl", [{"text": "w69999"}, {"text": "w69998w00000"}])
    shards = run(tmp_path / "data", tokenizer=tmp_path / "large")
    assert shards.record["dtype"] == "uint32"
    assert 257 + 69_999 in shards.windows("a", 1)


def test_shards_that_are_not_whole(
    corpus: Path, tmp_path: Path, run: Callable[..., TokenShards]
) -> None:
    shards = run(corpus)
    assert is_prepared(shards.folder)
    assert not is_prepared(corpus)
    assert not len(shards.windows("ab", 10**6))
    with pytest.raises(CorpusError, match="is no prepared corpus"):
        TokenShards(corpus)
    file = shards.folder / "ab/train.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(CorpusError, match=r"has [\d,]+ bytes, [\d,]+ bytes were written"):
        TokenShards(shards.folder)
    file.unlink()
    with pytest.raises(CorpusError, match="is missing"):
        TokenShards(shards.folder)


def test_an_output_in_the_way(
    corpus: Path, tmp_path: Path, run: Callable[..., TokenShards]
) -> None:
    run(corpus)
    with pytest.raises(OutputError, match=r"holds a finished corpus.*--overwrite"):
        run(corpus)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine.txt").touch()
    with pytest.raises(OutputError, match="is not empty"):
        run(corpus, "full")
    write(tmp_path / "torn/a.jsonl", [*rows("a"), b"x\n"])
    for _ in range(2):
        with pytest.raises(CorpusError, match="start again with --overwrite"):
            run(tmp_path / "torn", overwrite=True)
        assert TokenShards(tmp_path / "tokens").domains
    run(corpus, overwrite=True)
    assert not (tmp_path / ".tokens.next").exists()
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(OutputError, match="no corpus"):
        run(corpus, "model", overwrite=True)
    with pytest.raises(OutputError, match="its own source"):
        run(corpus, "corpus", overwrite=True)
    write(tmp_path / "data/a.jsonl", [*rows("a"), b"x\n"])
    with pytest.raises(CorpusError):
        run(tmp_path / "data", "stopped")
    with pytest.raises(OutputError, match=r"other settings \(domain_key: was None, now 'x'"):
        run(tmp_path / "data", "stopped", domain_key="x")
    journal = tmp_path / "stopped/journal.json"
    journal.write_bytes(journal.read_bytes().replace(b'"after": [', b'"after": [1'))
    with pytest.raises(OutputError, match="damaged"):
        run(tmp_path / "data", "stopped")
    run(tmp_path / "data", "stopped", overwrite=True, skip_broken=True)


def test_a_full_disk_loses_nothing(
    corpus: Path, tmp_path: Path, run: Callable[..., TokenShards], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moefy.data.prepare._BATCH_BYTES", 1000)
    whole = contents(run(corpus, "whole").folder)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
        with pytest.raises(StorageError, match="the disk filled up"):
            run(corpus, "full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert contents(run(corpus, "full").folder) == whole


def test_the_command(
    corpus: Path,
    tmp_path: Path,
    tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with (corpus / "ab.jsonl").open("a") as file:
        file.write("broken\n")
    command = ["moefy", "prepare", corpus, tmp_path / "out", "--tokenizer", tokenizer]
    command += ["--workers", 1, "--skip-broken"]
    for extra in ([], ["--json", "--overwrite"]):
        monkeypatch.setattr(sys, "argv", [str(word) for word in [*command, *extra]])
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert not exit_info.value.code
    printed = capsys.readouterr()
    table, _, rest = printed.out.partition("1 broken line skipped")
    assert "xyz" in table
    then, _, record = rest.lstrip().partition("\n")
    assert then.startswith(f"What next: moefy train {tokenizer} {tmp_path / 'trained'} --data")
    assert json.loads(record)["domains"]["xyz"]["documents"] > 60
    assert "skipped: ab.jsonl, line 81" in printed.err
    assert re.search(r"prepare [\d,]+/[\d,]+", printed.err)
