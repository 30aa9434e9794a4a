"""A model's answers to MT-bench, and a judge's opinion of them over the OpenAI protocol."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moefy.checkpoint.reader import fingerprint
from moefy.checkpoint.source import resolve
from moefy.data.conversations import Message
from moefy.errors import JudgeError, OutputError, UsageError
from moefy.evaluation.chat import Speaker
from moefy.evaluation.questions import (
    JudgePrompt,
    Question,
    judge_prompts,
    mt_bench,
    read_questions,
)
from moefy.progress import Progress, ProgressFn, silent
from moefy.storage import refuse_file, replace_file, storage_errors

ANSWERS, REQUESTS, JUDGEMENTS = "answers.jsonl", "requests.jsonl", "judgements.jsonl"
_KEY = "OPENAI_API_KEY"
_ATTEMPTS = 4
_TIMEOUT_S = 300
_PAUSE_S = 1.0


@dataclass(frozen=True)
class Judging:
    """What `judge` did.

    Attributes:
        folder: holds `answers.jsonl` (FastChat's form), `requests.jsonl` (OpenAI's batch form) and,
            where a judge was asked, `judgements.jsonl`.
        questions: how many were answered, two turns each.
        score, scores: mean of the judge's marks (1 to 10) and the same by category and by turn;
            None and empty where no judge was asked.
        unscored: judgements in which no mark was found; they count nowhere.
    """

    folder: Path
    questions: int
    score: float | None
    scores: dict[str, float]
    unscored: int


def judge(
    model: str | Path,
    out: str | Path,
    *,
    questions: str | Path | None = None,
    endpoint: str | None = None,
    judge_model: str = "gpt-4",
    max_new_tokens: int = 1024,
    report: ProgressFn = silent,
) -> Judging:
    """Answer MT-bench's questions, and let a judge mark the answers from 1 to 10.

    The answers are greedy: MT-bench itself samples writing and roleplay at a temperature of 0.7,
    which gives other marks in each run. The judge is asked in MT-bench's words ("single answer
    grading"), at temperature 0. Both halves go on where they stopped when the same call is made
    again.

    Args:
        model: a folder, or any source `convert` takes; answered questions are not asked again.
        out: folder for the results.
        questions: a file; see `questions.read_questions`. None is MT-bench.
        endpoint: base address of the judge, as in http://localhost:8000/v1; None leaves it at
            `requests.jsonl`. The key in $OPENAI_API_KEY is sent where there is one.
        judge_model: the judge's name there.
        max_new_tokens: the longest answer.
        report: told about progress.

    Raises:
        UsageError: the model, the questions, the output or the key are not usable.
        JudgeError: the endpoint gives no answer.
    """
    if endpoint and not endpoint.startswith(("http://", "https://")):
        raise UsageError(
            f"--endpoint {endpoint}: write its whole address, as in http://localhost:8000/v1"
        )
    headers = _headers() if endpoint else {}
    out = Path(out).expanduser()
    refuse_file(out)
    asked = read_questions(questions) if questions else mt_bench(report=report)
    prompts = judge_prompts(report=report)
    source = resolve(model, report=report)
    key = _digest([fingerprint(source), [asdict(question) for question in asked], max_new_tokens])
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    answers = {row["question_id"]: row for row in _journal(out / ANSWERS, key)}
    missing = [question for question in asked if question.number not in answers]
    speaker = Speaker(source) if missing else None
    for question in missing:
        assert speaker is not None
        report(Progress("answer", len(answers), len(asked), question.category))
        row = {
            "question_id": question.number,
            "model_id": str(model),
            "choices": [{"index": 0, "turns": answer_both(speaker, question, max_new_tokens)}],
            "key": key,
        }
        _append(out / ANSWERS, row)
        answers[question.number] = row
    report(Progress("answer", len(asked), len(asked)))
    requests = {
        f"{question.number}-{turn}": {
            "model": judge_model,
            **_request(question, answers[question.number]["choices"][0]["turns"], prompts, turn),
        }
        for question in asked
        for turn in (1, 2)
    }
    batch = [
        {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": request}
        for name, request in requests.items()
    ]
    replace_file(out / REQUESTS, "".join(json.dumps(row) + "\n" for row in batch))
    if endpoint is None:
        return Judging(out, len(asked), None, {}, 0)
    return _summary(out, asked, _marks(out, endpoint, headers, requests, report))


def _marks(
    out: Path,
    endpoint: str,
    headers: dict[str, str],
    requests: dict[str, dict[str, Any]],
    report: ProgressFn,
) -> dict[str, float | None]:
    """Return the judge's mark for every request; what it said before is not asked again."""
    key = _digest(requests)
    marks = {row["custom_id"]: row["score"] for row in _journal(out / JUDGEMENTS, key)}
    for name, request in requests.items():
        if name in marks:
            continue
        report(Progress("judge", len(marks), len(requests)))
        text = _ask(endpoint, headers, request)
        marks[name] = _mark(text)
        row = {"custom_id": name, "judge": request["model"], "judgement": text}
        _append(out / JUDGEMENTS, row | {"score": marks[name], "key": key})
    report(Progress("judge", len(requests), len(requests)))
    return marks


def answer_both(speaker: Speaker, question: Question, max_new_tokens: int) -> list[str]:
    """Return the model's answers to both turns; the second sees the first."""
    messages: list[Message] = []
    answers = []
    for turn in question.turns:
        messages.append({"role": "user", "content": turn})
        answers.append(speaker.answer(messages, max_new_tokens=max_new_tokens, temperature=0.0))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def _request(
    question: Question,
    answers: list[str],
    prompts: dict[tuple[int, bool], JudgePrompt],
    turn: int,
) -> dict[str, Any]:
    """Return what the judge is sent about one turn."""
    fields = {
        "question": question.turns[0],
        "answer": answers[0],
        "question_1": question.turns[0],
        "question_2": question.turns[1],
        "answer_1": answers[0],
        "answer_2": answers[1],
    }
    if question.references:
        fields |= {
            "ref_answer_1": question.references[0],
            "ref_answer_2": question.references[1],
        }
    prompt = prompts[turn, question.references is not None]
    return {
        "messages": [
            {"role": "system", "content": prompt.system},
            {"role": "user", "content": prompt.template.format(**fields)},
        ],
        "temperature": 0,
        "max_tokens": 2048,
    }


def _headers() -> dict[str, str]:
    """Return what every request carries.

    Raises:
        UsageError: the key cannot be sent; the error does not show it.
    """
    headers = {"Content-Type": "application/json", "User-Agent": "moefy"}
    if key := os.environ.get(_KEY, "").strip():
        if not (key.isascii() and key.isprintable()):
            raise UsageError(
                f"${_KEY} holds characters that no key has, as line ends or umlauts: set it again"
            )
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _ask(endpoint: str, headers: dict[str, str], request: dict[str, Any]) -> str:
    """Return the judge's words; a busy or stumbling endpoint is asked again.

    Raises:
        JudgeError: it refuses, cannot be reached, or answers in another form.
    """
    url = f"{endpoint.rstrip('/')}/chat/completions"
    reason = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S * 2**attempt)
        try:
            call = urllib.request.Request(url, json.dumps(request).encode(), headers)
            with urllib.request.urlopen(call, timeout=_TIMEOUT_S) as response:
                content = response.read()
        except urllib.error.HTTPError as error:
            with error:
                body = error.read().decode("utf-8", "replace")
            reason = f"status {error.code}: {' '.join(body.split())[:200]}"
            if error.code not in (408, 429) and error.code < 500:
                break
        except (OSError, http.client.HTTPException) as error:
            reason = str(getattr(error, "reason", None) or error)
        except ValueError as error:
            reason = f"no address: {error}"
            break
        else:
            try:
                return str(json.loads(content)["choices"][0]["message"]["content"])
            except (ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"its answer has another form ({error!r})"
                break
    raise JudgeError(
        f"{url} does not judge ({reason}): give the address of an endpoint that speaks OpenAI's "
        f"protocol, as in http://localhost:8000/v1, its key in ${_KEY}, and a model it has; the "
        "answers and judgements so far are kept, and the same command goes on"
    )


def _mark(judgement: str) -> float | None:
    """Return the mark in a judgement, "[[7]]" as MT-bench asks for, or None."""
    found = re.search(r"\[\[(\d+(?:\.\d+)?)\]\]", judgement)
    mark = float(found[1]) if found else None
    return mark if mark is not None and 1 <= mark <= 10 else None


def _summary(out: Path, asked: list[Question], marks: dict[str, float | None]) -> Judging:
    groups: dict[str, list[float]] = {}
    for question in asked:
        for turn in (1, 2):
            mark = marks[f"{question.number}-{turn}"]
            if mark is not None:
                groups.setdefault(f"turn {turn}", []).append(mark)
                groups.setdefault(question.category, []).append(mark)
    found = [mark for mark in marks.values() if mark is not None]
    scores = {name: sum(group) / len(group) for name, group in groups.items()}
    mean = sum(found) / len(found) if found else None
    return Judging(out, len(asked), mean, scores, len(marks) - len(found))


def _journal(file: Path, key: str) -> Iterator[dict[str, Any]]:
    """Iterate over what an earlier call wrote; a line cut off by a kill is left out.

    Raises:
        OutputError: it belongs to another model, other questions or another judge.
    """
    if not file.is_file():
        return
    for line in file.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row.get("key") != key:
            raise OutputError(
                f"{file} belongs to another model, other questions or another judge: choose "
                "another folder"
            )
        yield row


def _append(file: Path, row: dict[str, Any]) -> None:
    with storage_errors(file), file.open("a+b") as journal:
        if journal.tell():  # a kill may have cut the last line off
            journal.seek(-1, os.SEEK_END)
            if journal.read(1) != b"\n":
                journal.write(b"\n")
        journal.write(json.dumps(row).encode() + b"\n")


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
