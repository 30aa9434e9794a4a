"""Models by hub name, from a local HTTP server that stands in for the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from tests.conftest import serving, write_tiny_llama

from moefy.checkpoint.reader import DenseCheckpoint
from moefy.checkpoint.source import origin, resolve
from moefy.errors import CheckpointError

COMMIT = "c0ffee00" * 5


@contextmanager
def hub(folder: Path, fetched: list[str]) -> Iterator[str]:
    """Serve a folder as the repository `someone/model`; note the files that are fetched."""

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path, head = unquote(urlsplit(self.path).path), self.command == "HEAD"
            files = [file for file in folder.rglob("*") if file.is_file()]
            if path.startswith("/api/models/someone/model/revision/"):
                fetched.append(path.rpartition("/")[2])
                return self.answer(json.dumps({"id": "someone/model", "sha": COMMIT}).encode())
            if path == f"/api/models/someone/model/tree/{COMMIT}":
                rows = [
                    {
                        "type": "file",
                        "path": str(file.relative_to(folder)),
                        "size": file.stat().st_size,
                        "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                    }
                    for file in files
                ]
                return self.answer(json.dumps(rows).encode())
            name = path.removeprefix(f"/someone/model/resolve/{COMMIT}/")
            if folder / name not in files:
                return self.send_error(404)
            if not head:
                fetched.append(name)
            return self.answer((folder / name).read_bytes(), head=head)

        def answer(self, body: bytes, *, head: bool = False) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if not head:
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with serving(Handler) as address:
        yield address


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


def use_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Do what HF_ENDPOINT does in a fresh process."""
    template = f"{url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def as_bin(folder: Path, *, shards: int) -> None:
    """Rewrite a folder's weights as PyTorch files."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    weight_map = {}
    for number in range(shards):
        file = f"pytorch_model-{number}.bin"
        part = {name: state[name] for name in sorted(state)[number::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = json.dumps({"weight_map": weight_map})
    (folder / "pytorch_model.bin.index.json").write_text(index)


@pytest.mark.parametrize("form", ["safetensors", "both", "bin", "bin in shards"])
def test_only_the_weights_that_are_read_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    remote = write_tiny_llama(tmp_path / "remote")
    expected = load_file(remote / "model.safetensors")
    if form.startswith("bin"):
        as_bin(remote, shards=2 if "shards" in form else 1)
    if form == "both":
        (remote / "pytorch_model.bin").write_bytes(b"the same again")
        (remote / "original").mkdir()
        for name in (
            "consolidated.safetensors",
            "original/model.safetensors",
            "flax_model.msgpack",
        ):
            (remote / name).write_bytes(b"and again")
    fetched: list[str] = []
    with hub(remote, fetched) as url:
        use_hub(monkeypatch, url)
        folder = resolve("someone/model")
    beside = (".json", ".jinja", ".txt", "main")
    weights = {name for name in fetched if not name.endswith(beside)}
    wanted = {
        "bin": {"pytorch_model.bin"},
        "bin in shards": {"pytorch_model-0.bin", "pytorch_model-1.bin"},
    }
    assert weights == wanted.get(form, {"model.safetensors"})
    dense = DenseCheckpoint(folder)
    assert all(torch.equal(dense[name], tensor) for name, tensor in expected.items())
    use_hub(monkeypatch, "http://127.0.0.1:9")
    assert resolve("someone/model") == folder  # from the cache, the hub gone


def test_a_name_at_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote = write_tiny_llama(tmp_path / "remote")
    asked: list[str] = []
    with hub(remote, asked) as url:
        use_hub(monkeypatch, url)
        folder = resolve("hf:someone/model@v1.0")
    assert {name for name in asked if "." not in name.removeprefix("v1.0")} == {"v1.0"}
    assert DenseCheckpoint(folder).num_layers == 2
    assert origin("hf:someone/model@v1.0", folder)["base_model"] == "someone/model"
    for name in ("someone/model@../x", "someone/model@", "someone/model@a@b"):
        with pytest.raises(CheckpointError, match="does not exist; a source is"):
            resolve(name)


def test_a_repository_without_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = write_tiny_llama(tmp_path / "remote")
    (remote / "model.safetensors").rename(remote / "weights.ckpt")
    with hub(remote, []) as url:
        use_hub(monkeypatch, url)
        folder = resolve("someone/model")
        with pytest.raises(CheckpointError, match=r"has a config\.json but no weights"):
            DenseCheckpoint(folder)
