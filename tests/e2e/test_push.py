"""`moefy push` to a local HTTP server that stands in for the hub: what arrives, and what fails."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from huggingface_hub import constants
from huggingface_hub.utils import _http
from tests.conftest import logits, serving, write_tiny_llama

import moefy
from moefy.checkpoint.card import steps_of
from moefy.cli import main
from moefy.errors import CheckpointError, UsageError

# huggingface_hub's way to send a file is deprecated in httpx
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
TOKEN = "hf_Xq7Zt0pSecret42"
NAME = "someone/moe"
KEPT = ("config.json", "moefy.json", "README.md", "partition.npy", "model.safetensors")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


class Hub(BaseHTTPRequestHandler):
    """The endpoints that huggingface_hub calls to make a repository and to commit to it.

    A large file goes to an address that the LFS endpoint names, and is then part of the commit by
    its hash. `fails` names a part of a path and what happens to requests for it: a status, or "cut"
    for a connection that is closed in the middle.
    """

    protocol_version = "HTTP/1.1"
    url = ""
    is_public = False
    there: ClassVar[list[str]] = []  # files of an earlier push
    fails: ClassVar[dict[str, int | str]] = {}
    asked: ClassVar[list[str]] = []
    stored: ClassVar[dict[str, bytes]] = {}  # large files by hash
    commits: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        files = [{"rfilename": name} for name in self.there]
        self.answer({"id": NAME, "private": not self.is_public, "siblings": files})

    def do_PUT(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        path, size = self.path.partition("?")[0], int(self.headers["Content-Length"] or 0)
        self.asked.append(path)
        how = next((how for part, how in self.fails.items() if part in path), None)
        if how == "cut":
            self.rfile.read(size // 2)
            self.close_connection = True
            return self.connection.close()
        body = self.rfile.read(size)
        if how is not None:  # what it says repeats the token, which must not be shown
            words = {"error": f"no: {self.headers['Authorization']}"}
            return self.answer(words, status=int(how))
        if path.endswith("/batch"):
            objects = json.loads(body)["objects"]
            for each in objects:
                each["actions"] = {"upload": {"href": f"{self.url}/put/{each['oid']}"}}
            return self.answer({"transfer": "basic", "objects": objects})
        if path.startswith("/put/"):
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            self.stored[path.rpartition("/")[2]] = body
        if "/preupload/" in path:
            files = json.loads(body)["files"]
            for each in files:
                is_large = each["path"].endswith((".safetensors", ".npy"))
                each |= {"uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False}
            return self.answer({"files": files})
        if "/commit/" in path:
            return self.commit([json.loads(line) for line in body.splitlines()])
        return self.answer({"url": f"{self.url}/{NAME}", "warnings": [], "errors": []})

    def commit(self, lines: list[dict[str, Any]]) -> None:
        made: dict[str, Any] = {"deleted": [], "files": {}}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                made["files"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                made["files"][value["path"]] = self.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                made["deleted"].append(value["path"])
        self.commits.append(made)
        oid = "c0ffee00" * 5
        self.answer({"commitUrl": f"{self.url}/{NAME}/commit/{oid}", "commitOid": oid})

    def answer(self, content: dict[str, Any], *, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[type[Hub]]:
    """A running stand-in, and a home with no token but that of the environment."""

    class Own(Hub):
        there, asked, commits = [], [], []
        fails, stored = {}, {}

    with serving(Own) as Own.url:
        monkeypatch.setattr(constants, "ENDPOINT", Own.url)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its servers have no stand-in
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(_http.time, "sleep", lambda _: None)  # between tries
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield Own


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model and a trained one, of a dense model with a licence and a template."""
    place = tmp_path_factory.mktemp("made")
    dense = write_tiny_llama(place / "dense")
    (dense / "README.md").write_text("---\nlicense: mit\n---\n")
    (dense / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    how: dict[str, Any] = {"partition": "random", "router": "random", "repair": "none"}
    moefy.convert(dense, place / "moe", experts=4, active=2, **how)
    (place / "text.jsonl").write_text('{"text": "some words of a text"}\n' * 80)
    text, how = place / "text.jsonl", {"sequence_length": 32, "global_batch_size": 1, "tokens": 64}
    moefy.train(place / "moe", place / "trained", data=text, teacher=str(dense), **how)
    short: dict[str, Any] = {"windows": 1, "sequence_length": 32, "split": "all"}
    moefy.write_report(place / "report", [dense, place / "trained"], data=text, **short)
    return place


@pytest.mark.parametrize("name", ["moe", "trained"])
def test_the_model_has_what_travels_with_it_and_may_be_read_as_any_new_file(
    name: str, made: Path
) -> None:
    (made / "new").touch()
    for file in (made / name).iterdir():
        assert file.stat().st_mode == (made / "new").stat().st_mode, file
    for each in (*TOKENIZER, "chat_template.jinja", "generation_config.json"):
        assert (made / name / each).read_bytes() == (made / "dense" / each).read_bytes()
    for step in steps_of(json.loads((made / name / "moefy.json").read_text())):
        assert step["moefy"] == moefy.__version__


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def pushed(monkeypatch: pytest.MonkeyPatch, capsys: Any, *words: str) -> tuple[int, str, str]:
    """Run the command here; return its exit code and what it printed."""
    monkeypatch.setattr(sys, "argv", ["moefy", "push", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0), *capsys.readouterr()


@pytest.mark.parametrize("name", ["moe", "trained"])
def test_what_arrives_is_the_model_and_nothing_else(
    name: str, made: Path, hub: type[Hub], tmp_path: Path
) -> None:
    hub.there = ["model-00001-of-00002.safetensors", "model.safetensors", "mine.safetensors"]
    before = bytes_of(made)
    done = moefy.push(made / name, NAME)
    (commit,) = hub.commits
    kept = [part for part in KEPT if part != "partition.npy" or name == "moe"]
    generation = ["generation_config.json", "chat_template.jinja"]
    assert set(done.files) == set(commit["files"]) == {*kept, *TOKENIZER, *generation}
    assert {each: len(content) for each, content in commit["files"].items()} == done.files
    assert commit["deleted"] == ["model-00001-of-00002.safetensors"]
    assert (done.url, done.license) == (f"{hub.url}/{NAME}", "mit")
    front = yaml.safe_load(commit["files"]["README.md"].decode().split("---\n")[1])
    assert (front["license"], front["library_name"]) == ("mit", "transformers")
    assert "moe" in front["tags"]
    if name == "trained":
        assert b"documents of text.jsonl" in commit["files"]["README.md"]
        assert b"--data text.jsonl" in commit["files"]["README.md"]
        assert b"teacher: dense" in commit["files"]["README.md"]
    for each, content in commit["files"].items():
        assert str(made).encode() not in content, each  # where things lie here is nobody's business
        (tmp_path / each).write_bytes(content)
    assert (logits(tmp_path) == logits(made / name)).all()
    assert bytes_of(made) == before


def test_the_command_says_what_it_does_on_a_terminal_of_80_columns(
    made: Path, hub: type[Hub]
) -> None:
    set_here = {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    command = [sys.executable, "-m", "moefy", "push", str(made / "moe"), NAME]
    here = os.environ | set_here
    done = subprocess.run(command, env=here, capture_output=True, text=True, check=True)
    assert "model.safetensors (" in done.stderr
    assert f"{hub.url}/{NAME}: 9 files, 0 MB, mit" in done.stdout
    assert f"What next: moefy eval {NAME}" in done.stdout
    assert TOKEN not in done.stdout + done.stderr
    as_json = subprocess.run(
        [*command, "--json"], env=here, capture_output=True, text=True, check=True
    )
    assert json.loads(as_json.stdout)["license"] == "mit"


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ({"/": 401}, "does not know the token: log in again with `hf auth login`"),
        ({"/": 403}, "does not let this token write there: give it write access"),
        ({"/preupload/": 404}, "has no such place for this token: check OWNER"),
        ({"repos/create": 500}, "answers 500 ("),
        ({"/commit/": 500}, "answers 500 ("),
        ({"/put/": 503}, "answers 503 ("),
        ({"/put/": "cut"}, "the upload failed ("),
        ({"/commit/": "cut"}, "the upload failed ("),
        ({"validate-yaml": 400}, "the upload failed (Invalid metadata in README.md.)"),
    ],
    ids=str,
)
@pytest.mark.parametrize("debug", [False, True])
def test_a_refusal_and_a_lost_connection_are_one_sentence(
    fails: dict[str, int | str],
    message: str,
    debug: bool,
    made: Path,
    hub: type[Hub],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "token").write_text(TOKEN)  # as `hf auth login` writes it
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    hub.fails, before = fails, bytes_of(made)
    words = ["--debug"] * debug + ["push", str(made / "moe"), NAME]
    monkeypatch.setattr(sys, "argv", ["moefy", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert stop.value.code == 1
    assert message in err
    assert TOKEN not in out + err
    assert (bytes_of(made), hub.commits) == (before, [])
    if not debug:
        assert len(err.splitlines()) == 2  # what would be sent, and what happened
        assert len(err.splitlines()[-1]) < 400


def test_no_token_no_network_and_no_private_place(
    made: Path,
    hub: type[Hub],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hub.is_public = True
    code, _, err = pushed(monkeypatch, capsys, str(made / "moe"), NAME, "--private")
    assert (code, f"{NAME} exists and is public" in err) == (2, True)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    code, _, err = pushed(monkeypatch, capsys, str(made / "moe"), NAME)
    assert (code, "the upload failed (" in err, TOKEN in err) == (1, True, False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, _, err = pushed(monkeypatch, capsys, str(made / "moe"), NAME)
    assert (code, "offline mode" in err) == (1, True)
    monkeypatch.delenv("HF_TOKEN")
    code, _, err = pushed(monkeypatch, capsys, str(made / "moe"), NAME)
    assert (code, "needs a token: log in with `hf auth login`" in err) == (1, True)
    code, _, err = pushed(monkeypatch, capsys, str(made / "moe"), "../moe/x")
    assert (code, "is no place on the hub: write OWNER/MODEL" in err) == (2, True)
    assert hub.commits == []


def test_the_licence_is_the_cards_or_the_arguments(
    tmp_path: Path, hub: type[Hub], made: Path
) -> None:
    with pytest.raises(UsageError, match="says that the licence is mit: leave --license gpl-3"):
        moefy.push(made / "moe", NAME, license="gpl-3.0")
    dense = write_tiny_llama(tmp_path / "dense")
    how: dict[str, Any] = {"partition": "random", "router": "random", "repair": "none"}
    moefy.convert(dense, tmp_path / "moe", experts=4, active=2, **how)
    with pytest.raises(UsageError, match="names no licence: pass that of the dense model"):
        moefy.push(tmp_path / "moe", NAME)
    assert hub.asked == []
    assert moefy.push(tmp_path / "moe", NAME, license="apache-2.0").license == "apache-2.0"
    assert b"license: apache-2.0" in hub.commits[0]["files"]["README.md"]
    assert "license:" not in (tmp_path / "moe/README.md").read_text()


def test_only_a_whole_folder_of_ours_is_sent(tmp_path: Path, hub: type[Hub]) -> None:
    dense = write_tiny_llama(tmp_path / "dense")
    with pytest.raises(CheckpointError, match="is no model that moefy wrote"):
        moefy.push(dense, NAME, license="mit")
    how: dict[str, Any] = {"partition": "random", "router": "random", "repair": "none"}
    folder = moefy.convert(dense, tmp_path / "moe", experts=4, active=2, **how).folder
    for name in (".git/config", "checkpoints/1/optimizer.safetensors", "notes.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    with pytest.raises(
        UsageError, match=r"did not write: move \.git/config, checkpoints/1/optimiz"
    ):
        moefy.push(folder, NAME, license="mit")
    for name in (".git/config", "checkpoints/1/optimizer.safetensors", "notes.txt"):
        (folder / name).unlink()
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-10])
    with pytest.raises(CheckpointError):
        moefy.push(folder, NAME, license="mit")
    (folder / "model.safetensors").write_bytes(whole)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not whole: tokenizer\.json is missing"):
        moefy.push(folder, NAME, license="mit")
    marker = json.loads((folder / ".moefy.json").read_text())
    (folder / ".moefy.json").write_text(json.dumps(marker | {"state": "unfinished"}))
    with pytest.raises(CheckpointError, match="is unfinished: the command that began it"):
        moefy.push(folder, NAME, license="mit")
    assert hub.asked == []
