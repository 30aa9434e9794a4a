"""No key, token or password lands in what moefy writes or prints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from tests.conftest import make_place, serving
from tests.kills import Server

SECRET = "xq7Zt0pSecret/42"  # the slash, because JSON may write it in two ways
ENVIRONMENT = {
    "HF_TOKEN": SECRET,
    "OPENAI_API_KEY": f"{SECRET}\n",  # as out of a file
    "WANDB_API_KEY": SECRET,
    "DB_PASS": SECRET,
    "PIP_INDEX_URL": f"http://bob:{SECRET.replace('/', '%2F')}@127.0.0.1:9/simple",
}
SHAPES = tuple(SECRET.replace("/", slash) for slash in ("/", "%2F", r"\/", ""))
ADDRESS = f"https://bob:{SECRET.replace('/', '%2F')}@host.invalid/model"
TOKEN = f"https://host.invalid/a.jsonl?access_token={SECRET.replace('/', '%2F')}"
SMALL = "--set sequence_length=32 --set global_batch_size=2"


class Parrot(BaseHTTPRequestHandler):
    """A judge that repeats the key, as JSON may write it."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        key = self.headers["Authorization"].replace("/", r"\/")
        self.send_response(200 if "/right/" in self.path else 401)
        self.end_headers()
        said = f'{{"choices": [{{"message": {{"content": "[[7]] {key}"}}}}]}}'
        self.wfile.write(said.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    with serving(Parrot) as address:
        yield address


@pytest.mark.usefixtures("own_cache")
def test_a_secret_lands_in_no_file_and_no_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    place = make_place(tmp_path / "place")
    named = "text?token=" + SECRET.replace("/", "")
    (place / "text").rename(place / named)
    (place / "text").symlink_to(named)
    judge = "judge moe {} --questions questions.jsonl --max-new-tokens 2 --endpoint {}"
    train = f"train moe trained --data text/ab.jsonl --tokens 256 {SMALL}"
    right = [
        "prepare text/ab.jsonl tokens --tokenizer dense --workers 1",
        "convert dense split --experts 4 --active 2 --data text/ab.jsonl"
        " --set calibration_tokens=256 --set calibration_length=16",
        train,
        "tune dense tuned --data talks.jsonl --set sequence_length=64 --set epochs=1",
        judge.format("judged", f"{endpoint}/right/v1"),
        "export dense moe back",
        "report reported dense moe --data text/ab.jsonl --windows 1 --sequence-length 16",
        "eval dense --data text/ab.jsonl --windows 1 --sequence-length 16 --no-decode --json",
    ]
    wrong = [
        judge.format("asked", f"{endpoint}/{SECRET}/v1"),
        judge.format("asked", f"{endpoint}/v1?api_key={SECRET}"),
        judge.format("asked", f"http://bob:{SECRET}@127.0.0.1:9/v1"),
        f"convert {ADDRESS} out --experts 4 --active 2",
        f"--debug convert {ADDRESS} out --experts 4 --active 2",
        f"convert {SECRET} out --experts 4 --active 2",
        f"--debug inspect {SECRET}",
        f"inspect {TOKEN}",
        f"prepare {TOKEN} out --tokenizer dense",
        f"prepare {ADDRESS} out --tokenizer dense",
        f"prepare {named} out --tokenizer dense",
        f"train moe out --data {TOKEN} --tokens 64 {SMALL}",
        f"train moe out --data {named} --tokens 64 {SMALL}",
        f"tune moe out --data {named} --set sequence_length=64",
        f"convert {named} out --experts 4 --active 2",
        f"push moe someone/{SECRET} --license mit",
        f"--debug push moe someone/{SECRET.partition('/')[0]} --license mit",
    ]
    server = Server()
    said = []
    for command in (*right, *wrong):
        end = server.run(place, command)
        said.append((place.parent / "log").read_text())
        assert (end.code == 0) == (command in right), said[-1]
        assert not any(shape in said[-1] for shape in SHAPES), command
    # a run that is killed leaves its journal, its checkpoints and its lock
    for number in (15, 30):
        assert server.run(place, train.replace("trained", f"killed-{number}"), number).code < 0
    server.close()
    assert "[$HF_TOKEN]" in "".join(said)  # what is looked for was there to be found
    assert json.loads((place / "judged/judged.jsonl").read_text().splitlines()[0])["judgements"]
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert not any(shape.encode() in file.read_bytes() for shape in SHAPES), file
