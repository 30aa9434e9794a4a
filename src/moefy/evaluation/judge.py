"""A model's answers to MT-bench, and a judge's opinion of them over the OpenAI protocol."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from moefy.checkpoint.reader import fingerprint
from moefy.checkpoint.source import resolve
from moefy.data.conversations import Message
from moefy.errors import JudgeError, UsageError
from moefy.evaluation.chat import Speaker
from moefy.evaluation.questions import Question, judge_prompts, mt_bench, read_questions
from moefy.progress import Progress, ProgressFn, silent
from moefy.run_folder import RunFolder
from moefy.storage import read_records, write_records

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
        score: mean of the judge's marks (1 to 10); None where no judge was asked.
        scores: the same by category and by turn.
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
    again. Several judges may mark the same answers.

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
    client = _client(endpoint) if endpoint else None
    asked = read_questions(questions) if questions else mt_bench(report=report)
    prompts = judge_prompts(report=report)
    source = resolve(model, report=report)
    identity = {
        "model": _digest(fingerprint(source)),
        "questions": _digest([question.model_dump() for question in asked]),
        "max_new_tokens": max_new_tokens,
    }
    own = (ANSWERS, REQUESTS, JUDGEMENTS)
    with RunFolder(out, "judging", sources=(source,), resumes=True, reopens=True, own=own) as run:
        run.begin(identity)
        answers = _answers(run.work, source, str(model), asked, max_new_tokens, report)
        requests = {
            f"{question.question_id}-{turn}": {
                "model": judge_model,
                **_request(question, answers[question.question_id], prompts, turn),
            }
            for question in asked
            for turn in (1, 2)
        }
        batch = [
            {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": request}
            for name, request in requests.items()
        ]
        write_records(run.work / REQUESTS, batch)
        done = Judging(run.out, len(asked), None, {}, 0)
        if client is not None:
            with client:
                done = _summary(run.out, asked, _marks(run.work, client, requests, report))
        run.finish()
    return done


def _answers(
    folder: Path,
    source: Path,
    name: str,
    asked: list[Question],
    max_new_tokens: int,
    report: ProgressFn,
) -> dict[int, list[str]]:
    """Return the answers to both turns of every question; earlier ones are read from the folder."""
    rows = read_records(folder / ANSWERS, dict, what="answer")
    answers = {row["question_id"]: row["choices"][0]["turns"] for row in rows}
    speaker: Speaker | None = None
    for question in asked:
        number = question.question_id
        if number in answers:
            continue
        report(Progress("answer", len(answers), len(asked), question.category))
        speaker = speaker or Speaker(source)
        answers[number] = answer_both(speaker, question, max_new_tokens)
        choices = [{"index": 0, "turns": answers[number]}]
        rows.append({"question_id": number, "model_id": name, "choices": choices})
        write_records(folder / ANSWERS, rows)
    report(Progress("answer", len(asked), len(asked)))
    return answers


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
    question: Question, answers: list[str], prompts: dict[str, dict[str, str]], turn: int
) -> dict[str, Any]:
    """Return what the judge is sent about one turn."""
    name = "single-math-v1" if question.reference else "single-v1"
    prompt = prompts[name if turn == 1 else f"{name}-multi-turn"]
    fields = {"question": question.turns[0], "answer": answers[0]}
    for i in range(2):
        fields |= {f"question_{i + 1}": question.turns[i], f"answer_{i + 1}": answers[i]}
        if question.reference:
            fields[f"ref_answer_{i + 1}"] = question.reference[i]
    return {
        "messages": [
            {"role": "system", "content": prompt["system_prompt"]},
            {"role": "user", "content": prompt["prompt_template"].format(**fields)},
        ],
        "temperature": 0,
        "max_tokens": 2048,
    }


def _marks(
    folder: Path,
    client: httpx2.Client,
    requests: dict[str, dict[str, Any]],
    report: ProgressFn,
) -> dict[str, float | None]:
    """Return the judge's mark for every request; earlier ones are read from the folder."""
    rows = read_records(folder / JUDGEMENTS, dict, what="judgement")
    # The answers of a folder never change, so only the judge tells its marks apart.
    (judge_model,) = {request["model"] for request in requests.values()}
    marks = {row["custom_id"]: row["score"] for row in rows if row["judge"] == judge_model}
    for name, request in requests.items():
        if name in marks:
            continue
        report(Progress("judge", len(marks), len(requests)))
        text = _ask(client, request)
        found = re.search(r"\[\[(\d+(?:\.\d+)?)\]\]", text)  # "[[7]]", as MT-bench asks for
        mark = float(found[1]) if found else 0.0
        marks[name] = mark if 1 <= mark <= 10 else None
        row = {"custom_id": name, "judge": judge_model, "judgement": text}
        rows.append(row | {"score": marks[name]})
        write_records(folder / JUDGEMENTS, rows)
    report(Progress("judge", len(requests), len(requests)))
    return marks


def _client(endpoint: str) -> httpx2.Client:
    """Return a client of an OpenAI endpoint, with the key if there is one.

    Raises:
        UsageError: the address or the key cannot be used; the error shows neither key nor password.
    """
    # huggingface_hub.InferenceClient would follow redirects, refuse even localhost under
    # $HF_HUB_OFFLINE, and send the user's Hugging Face token where there is no key.
    try:
        url = httpx2.URL(endpoint)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    if url.scheme not in ("http", "https") or not url.host:
        raise UsageError(
            f"--endpoint {endpoint.rpartition('@')[2]}: write its whole address, as in "
            "http://localhost:8000/v1"
        )
    key = os.environ.get(_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(
            f"${_KEY} holds characters that no key has, as line ends or umlauts: set it again"
        )
    headers = {"User-Agent": "moefy"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    elif url.userinfo:
        login = base64.b64encode(f"{url.username}:{url.password}".encode()).decode()
        headers["Authorization"] = f"Basic {login}"
    # The client logs its addresses, so the password must not be in them.
    bare = url.copy_with(username="", password="", query=None)
    return httpx2.Client(base_url=bare, headers=headers, timeout=_TIMEOUT_S, follow_redirects=False)


def _ask(client: httpx2.Client, request: dict[str, Any]) -> str:
    """Return the judge's words; a busy or stumbling endpoint is asked again.

    Raises:
        JudgeError: it refuses, cannot be reached, or answers in another form.
    """
    reason = ""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S * 2**attempt)
        try:
            answer = client.post("chat/completions", json=request)
        except httpx2.HTTPError as error:
            reason = str(error) or type(error).__name__
            continue
        if answer.is_success:
            try:
                return _hidden(client, str(answer.json()["choices"][0]["message"]["content"]))
            except (ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"its answer has another form ({error!r})"
                break
        reason = f"status {answer.status_code}: {' '.join(answer.text.split())}"
        if answer.status_code not in (408, 429) and answer.status_code < 500:
            break
    raise JudgeError(
        f"{client.base_url} does not judge ({_hidden(client, reason)[:200]}): give the address of "
        f"an endpoint that speaks OpenAI's protocol, as in http://localhost:8000/v1, its key in "
        f"${_KEY}, and a model it has; the answers and judgements so far are kept, and the same "
        "command goes on"
    )


def _hidden(client: httpx2.Client, text: str) -> str:
    """Return what an endpoint said without the key, which some repeat."""
    secret = client.headers.get("Authorization", "").rpartition(" ")[2]
    return text.replace(secret, "[key]") if secret else text


def _summary(out: Path, asked: list[Question], marks: dict[str, float | None]) -> Judging:
    groups: dict[str, list[float]] = {}
    for question in asked:
        for turn in (1, 2):
            mark = marks[f"{question.question_id}-{turn}"]
            if mark is not None:
                for name in ("", f"turn {turn}", question.category):
                    groups.setdefault(name, []).append(mark)
    scores = {name: sum(group) / len(group) for name, group in groups.items()}
    unscored = 2 * len(asked) - len(groups.get("", []))
    return Judging(out, len(asked), scores.pop("", None), scores, unscored)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
