"""Tune, chat and judge as a user meets them: real processes, a real terminal, a real endpoint."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from tests.conftest import serving, write_tiny_llama

import moefy
from moefy.cli import main
from moefy.data.conversations import Message
from moefy.errors import CorpusError, JudgeError, OutputError, UsageError
from moefy.evaluation.chat import Speaker
from moefy.evaluation.judge import Question, answer_both, mt_bench, read_questions

MOEFY = str(Path(sys.executable).with_name("moefy"))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def run(*arguments: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [MOEFY, *map(str, arguments)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        **settings,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that has learned to say one word, by the command line."""
    folder = tmp_path_factory.mktemp("tuned")
    write_tiny_llama(folder / "dense")
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"Hallo {i}"},
                {"role": who, "content": "Servus!"},
            ]
        }
        for i in range(60)
        for who in ("assistant" if i != 7 else "nobody",)
    ]
    data = folder / "talks.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("global_batch_size=8", "precision=float32", "sequence_length=128")
    chosen = [word for setting in settings for word in ("--set", setting)]
    options = ["--epochs", 16, "--learning-rate", 0.01, *chosen]
    done = run("tune", folder / "dense", folder / "model", "--data", data, *options)
    assert f"left out: {data}, line 8: message 2 is from 'nobody', not from system" in done.stderr
    assert f"1 broken conversations left out: {folder / 'model' / 'broken.txt'}" in done.stderr
    assert "loss on the assistant's tokens 5." in done.stdout
    assert "chat template: chatml with <eos> for <|im_end|>" in done.stdout
    assert "it/s" not in done.stderr
    return folder / "model"


def test_the_benchmarks_of_a_tuned_model(tuned: Path) -> None:
    tasks = "mmlu,arc_challenge,hellaswag"
    done = run("suite", "--tasks", tasks, "--limit", 1, "--json", tuned)
    (model,) = json.loads(done.stdout)["models"]
    items = {name: score["items"] for name, score in model["scores"].items()}
    assert items == {"MMLU": 57, "ARC-c": 1, "HellaSwag": 1}


def test_chat_through_a_pipe(tuned: Path) -> None:
    done = run("chat", tuned, "--system", "Kurz.", input="Hallo 1\n\nHallo 2\n")
    assert done.stdout == "Servus!\nServus!\n"
    assert done.stderr == ""


def test_chat_with_a_model_that_has_no_template(
    tuned: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = str(tuned.with_name("dense"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hallo 1"))
    command = ["moefy", "chat", dense, "--max-new-tokens", "1", "--temperature", "0"]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 0
    assert f"{dense} has no chat template: chatml with <eos>" in capsys.readouterr().err


def test_chat_in_a_terminal(tuned: Path) -> None:
    child, terminal = pty.fork()
    if not child:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
        os.execve(MOEFY, [MOEFY, "chat", str(tuned)], ENVIRONMENT | {"TERM": "dumb"})
    shown = wait_for(terminal, b"> ")
    os.write(terminal, b"Hallo 1\n")
    shown += wait_for(terminal, b"Servus!\r\n> ")
    left = b""
    while b"\n" not in left:  # Python can miss a Ctrl-C between the prompt and the wait for a line
        os.write(terminal, b"\x03")
        if select.select([terminal], [], [], 5)[0]:
            left += os.read(terminal, 1024)
    shown += wait_for(terminal, None)
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 0, shown
    assert b"Traceback" not in shown


def wait_for(terminal: int, text: bytes | None) -> bytes:
    """Read until a text is shown, or None: until the end."""
    shown = b""
    while text is None or text not in shown:
        try:
            new = os.read(terminal, 1024)
        except OSError:  # how Linux says that the other side is closed
            new = b""
        if not new:
            assert text is None, shown
            return shown
        shown += new
    return shown


def test_an_interrupted_answer_ends_and_the_conversation_goes_on(tuned: Path) -> None:
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        if len(written) == 1:
            raise KeyboardInterrupt

    speaker = Speaker(tuned)
    messages = moefy.chat(speaker, ["Hallo 1", "Hallo 2"], write, max_new_tokens=8)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert messages[1]["content"] == written[0]
    assert messages[3]["content"] == "Servus!"
    assert speaker.answer(messages[:1], max_new_tokens=3) == "Ser"


def test_an_answer_ends_with_the_turn_whatever_the_model_says(tuned: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tuned, tmp_path / "copy")
    (copy / "generation_config.json").unlink()
    speaker = Speaker(copy)
    assert speaker.stops == [2, 256]  # config.json's, and what ends a turn
    assert speaker.answer([{"role": "user", "content": "Hallo 1"}], max_new_tokens=40) == "Servus!"


def test_the_likeliest_token_whatever_the_model_asks_for(tuned: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tuned, tmp_path / "copy")
    file = copy / "generation_config.json"
    asked = {"repetition_penalty": 1e6, "no_repeat_ngram_size": 1, "do_sample": True, "top_k": 1}
    file.write_text(json.dumps(json.loads(file.read_text()) | asked))
    talk: list[Message] = [{"role": "user", "content": "Hallo 1"}]
    speaker = Speaker(copy)
    assert speaker.answer(talk, max_new_tokens=8) != "Servus!"
    assert speaker.answer(talk, max_new_tokens=8, temperature=0.0) == "Servus!"


def test_a_template_that_wants_a_system_message(tuned: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tuned, tmp_path / "copy")
    template = copy / "chat_template.jinja"
    check = "{% if messages[0].role != 'system' %}{{ raise_exception('say who') }}{% endif %}"
    template.write_text(check + template.read_text())
    written: list[str] = []
    moefy.chat(copy, ["Hallo 1"], written.append, system="Kurz.", max_new_tokens=8)
    assert "".join(written) == "Servus!\n"
    with pytest.raises(UsageError, match="refuses the conversation: say who"):
        moefy.chat(copy, ["Hallo 1"], written.append)


def test_a_conversation_ends_where_the_model_does(tuned: Path) -> None:
    speaker = Speaker(tuned)  # reads 512 tokens, one per character
    with pytest.raises(UsageError, match=r"conversation has 6\d\d tokens and the model reads 512"):
        speaker.answer([{"role": "user", "content": "x" * 600}])


def test_the_second_question_follows_the_first_answer() -> None:
    heard: list[list[Message]] = []

    class Parrot(Speaker):
        def __init__(self) -> None:
            pass

        def answer(self, messages: list[Message], **_: Any) -> str:
            heard.append([dict(message) for message in messages])
            return f"answer {len(heard)}"

    assert answer_both(Parrot(), Question(question_id=1, category="x", turns=("a", "b")), 9) == [
        "answer 1",
        "answer 2",
    ]
    said = [("user", "a"), ("assistant", "answer 1"), ("user", "b")]
    assert heard[1] == [{"role": role, "content": text} for role, text in said]
    assert heard[0] == heard[1][:1]


class Endpoint(BaseHTTPRequestHandler):
    """Stumbles once, then marks with 7; finds no mark for answers to Frage 2, turn 2."""

    requests: list[dict[str, Any]] = []  # noqa: RUF012
    status = 200

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        if self.status == 200:
            assert self.headers["Authorization"] == "Bearer secret"
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.status != 200 or not self.requests:
            self.requests.append({})
            self.send_response(self.status if self.status != 200 else 503)
            self.send_header("Location", f"http://localhost:{self.server.server_port}/stolen")
            self.end_headers()
            self.wfile.write(f"not now, {self.headers['Authorization']}".encode())
            return
        self.requests.append(body)
        asked = body["messages"][1]["content"]
        mark = "no idea" if "Frage 2b" in asked else "Rating: [[7]]"
        answer = json.dumps({"choices": [{"message": {"role": "assistant", "content": mark}}]})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(answer.encode())

    def do_GET(self) -> None:
        raise AssertionError("a redirect was followed")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    Endpoint.requests.clear()
    Endpoint.status = 200
    with serving(Endpoint) as address:
        yield f"{address}/v1"


def test_a_judge_marks_the_answers(
    tuned: Path, tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\r\n")  # as out of a file
    questions = tmp_path / "questions.jsonl"
    rows = [
        {"question_id": 1, "category": "math", "turns": ["Hallo 1", "Frage 1b"]},
        {"question_id": 2, "category": "writing", "turns": ["Hallo {2}", "Frage 2b"]},
    ]
    rows[0] |= {"reference": ["Recht so", "{noch} mehr"]}
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "judged"
    options = {"questions": questions, "max_new_tokens": 16}
    assert moefy.judge(tuned, out, judge_model="strict", **options).score is None
    answers = [json.loads(line) for line in (out / "judged.jsonl").read_text().splitlines()]
    assert [row["question_id"] for row in answers] == [1, 2]
    assert answers[0]["answers"][0] == "Servus!"
    second = answers[1]["answers"][1]

    flags = ("--questions", questions, "--max-new-tokens", 16, "--judge-model", "strict")
    done = run("judge", tuned, out, *flags, "--endpoint", endpoint, "--json")
    found = json.loads(done.stdout)
    assert (found["score"], found["unscored"]) == (7.0, 1)
    assert found["scores"] == {"turn 1": 7.0, "turn 2": 7.0, "math": 7.0, "writing": 7.0}
    sent = Endpoint.requests[1:]  # the first got a 503
    marked = [json.loads(line) for line in (out / "judged.jsonl").read_text().splitlines()]
    assert [row["judgements"] for row in marked] == [
        ["Rating: [[7]]", "Rating: [[7]]"],
        ["Rating: [[7]]", "no idea"],
    ]
    assert all(request["model"] == "strict" for request in sent)
    words = [request["messages"][1]["content"] for request in sent]
    assert "Hallo 1" in words[0]
    assert "Servus!" in words[0]
    assert "Recht so" in words[0]
    assert "Frage 1b" not in words[0]
    assert "{noch} mehr" in words[1]
    assert "Hallo {2}" in words[2]
    assert "Reference" not in words[2]
    assert second in words[3]

    marked[1]["judgements"].pop()  # a kill
    (out / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in marked))
    again = moefy.judge(tuned, out, endpoint=endpoint, judge_model="strict", **options)
    assert vars(again) == found | {"folder": out}
    assert Endpoint.requests[5:] == sent[3:]
    with pytest.raises(OutputError, match=r"other settings .*max_new_tokens: was 16, now 8"):
        moefy.judge(tuned, out, judge_model="strict", questions=questions, max_new_tokens=8)
    with pytest.raises(OutputError, match=r"judge_model: was 'strict', now 'mild'"):
        moefy.judge(tuned, out, endpoint=endpoint, judge_model="mild", **options)
    assert "secret" not in "".join(file.read_text() for file in out.iterdir())
    moefy.judge(tuned, out, questions=questions, max_new_tokens=8, overwrite=True)
    assert '"judgements": []' in (out / "judged.jsonl").read_text()


def test_a_judge_that_refuses(
    tuned: Path, tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question_id": 1, "category": "x", "turns": ["Hallo 1", "Hallo 2"]}\n')
    Endpoint.status = 401
    with pytest.raises(JudgeError, match=r"does not judge \(status 401: .*\$OPENAI_API_KEY"):
        moefy.judge(tuned, tmp_path / "out", questions=questions, endpoint=endpoint)
    assert len(Endpoint.requests) == 1
    with pytest.raises(UsageError, match="--endpoint: write its whole address"):
        moefy.judge(tuned, tmp_path / "no", questions=questions, endpoint="localhost:8000")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hüdden")
    with pytest.raises(UsageError, match=r"put a key of plain letters into \$OPENAI_API_KEY"):
        moefy.judge(tuned, tmp_path / "no", questions=questions, endpoint=endpoint)
    assert not (tmp_path / "no").exists()
    with pytest.raises(OutputError, match=r"questions.jsonl exists and is not a plain folder"):
        moefy.judge(tuned, questions, questions=questions)


@pytest.mark.parametrize("status", [302, 401])
def test_a_key_goes_nowhere_else(
    tuned: Path, tmp_path: Path, endpoint: str, monkeypatch: pytest.MonkeyPatch, status: int
) -> None:
    """No redirect is followed, and an error does not show a key that the endpoint repeats."""
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"question_id": 1, "category": "x", "turns": ["Hallo 1", "Hallo 2"]}\n')
    monkeypatch.setenv("OPENAI_API_KEY", "sk-hidden")
    monkeypatch.setattr(Endpoint, "status", status)
    with pytest.raises(JudgeError, match=rf"\(status {status}: not now, Bearer \[key\]\)"):
        moefy.judge(tuned, tmp_path / "out", questions=questions, endpoint=endpoint)
    assert len(Endpoint.requests) == 1
    secret = endpoint.replace("http://", "http://user:password@")
    with pytest.raises(UsageError, match=r"^--endpoint: write its whole address[^@]*$"):
        moefy.judge(tuned, tmp_path / "out", questions=questions, endpoint=secret)


def test_mt_bench() -> None:
    questions = mt_bench()
    assert [question.question_id for question in questions] == list(range(81, 161))
    categories = [question.category for question in questions]
    assert all(categories.count(name) == 10 for name in set(categories))
    with_references = {q.category for q in questions if q.reference}
    assert with_references == {"reasoning", "math", "coding"}
    assert sum(q.reference is not None for q in questions) == 30


def test_questions_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text('{"question_id": 5, "category": "x", "turns": ["a", "b"]}\n')
    (question,) = read_questions(file)
    assert (question.question_id, question.turns, question.reference) == (5, ("a", "b"), None)
    file.write_text(file.read_text() * 2)
    with pytest.raises(CorpusError, match=r"two of the same question_id"):
        read_questions(file)
    file.write_text('{"question_id": 1, "category": "x", "turns": ["a"]}\n')
    with pytest.raises(
        CorpusError, match=r"q\.jsonl, line 1 is damaged \(turns.*: write question_id"
    ):
        read_questions(file)
    with pytest.raises(CorpusError, match="holds no questions"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(CorpusError, match="holds no questions"):
        read_questions(tmp_path)
