"""A model's answers to MT-bench, and a judge's opinion of them over the OpenAI protocol."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import time
from contextlib import nullcontext
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

Row = dict[str, Any]


@dataclass(frozen=True)
class Judging:
    """What `judge` did."""

    # Holds `answers.jsonl` (FastChat's form), `requests.jsonl` (OpenAI's batch form) and, where a
    # judge was asked, `judgements.jsonl`.
    folder: Path
    questions: int  # answered, two turns each
    score: float | None  # mean of the judge's marks (1 to 10); None where no judge was asked
    scores: dict[str, float]  # the same by category and by turn
    unscored: int  # judgements in which no mark was found; they count nowhere


def judge(
    model: str | Path,
    out: str | Path,
    *,
    questions: str | Path | None = None,
    endpoint: str | None = None,
    judge_model: str = "gpt-4",
    max_new_tokens: int = 1024,
    overwrite: bool = False,
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
        overwrite: an earlier result in `out` may be replaced.
        report: told about progress.

    Raises:
        UsageError: the model, the questions, the output or the key are not usable.
        JudgeError: the endpoint gives no answer.
    """
    client = _client(endpoint) if endpoint else None
    asked = read_questions(questions) if questions else mt_bench(report=report)
    prompts = judge_prompts(report=report)
    source = resolve(model, report=report)
    speaker = functools.cache(lambda: Speaker(source))  # not loaded where all answers are there
    # The judge is no part of the identity: several may mark the same answers.
    model_hash = _digest(fingerprint(source))
    questions_hash = _digest([question.model_dump() for question in asked])
    identity = {"model": model_hash, "questions": questions_hash, "max_new_tokens": max_new_tokens}
    owner = RunFolder(
        *(out, "judging"),
        overwrite=overwrite,
        sources=(source,),
        resumes=True,
        reopens=True,
        own=(ANSWERS, REQUESTS, JUDGEMENTS),
    )
    with client or nullcontext(), owner as run:
        run.begin(identity)
        answers = _kept(run.work / ANSWERS, "question_id")
        marks = _kept(run.work / JUDGEMENTS, "custom_id", "judge")
        requests, scores = [], []
        # A file is written whole after each row, so a kill loses one answer and breaks no line.
        for done, question in enumerate(asked):
            report(Progress("judge", done, len(asked)))
            number = (question.question_id,)
            if number not in answers:
                turns = answer_both(speaker(), question, max_new_tokens)
                row = {"question_id": question.question_id, "model_id": str(model)}
                answers[number] = {**row, "choices": [{"index": 0, "turns": turns}]}
                write_records(run.work / ANSWERS, answers.values())
            turns = answers[number]["choices"][0]["turns"]
            for turn in (1, 2):
                request = _request(question, turns, prompts, turn, judge_model)
                requests.append(request)
                key = (request["custom_id"], judge_model)
                if client and key not in marks:
                    marks[key] = _judge_one(client, request)
                    write_records(run.work / JUDGEMENTS, marks.values())
                if client:
                    scores.append(marks[key]["score"])
        report(Progress("judge", len(asked), len(asked)))
        write_records(run.work / REQUESTS, requests)
        run.finish()
    return _summary(run.out, asked, scores)


def _kept(file: Path, *keys: str) -> dict[tuple[Any, ...], Row]:
    """Return the rows of an earlier call by their keys."""
    return dict(read_records(file, lambda row: (tuple(row[k] for k in keys), row), what=file.stem))


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
    prompts: dict[str, dict[str, str]],
    turn: int,
    judge_model: str,
) -> Row:
    """Return what the judge is sent about one turn, in the form of OpenAI's batches."""
    name = "single-math-v1" if question.reference else "single-v1"
    prompt = prompts[name if turn == 1 else f"{name}-multi-turn"]
    fields = {"question": question.turns[0], "answer": answers[0]}
    # The prompt about the second turn shows both.
    for i in (1, 2):
        fields |= {f"question_{i}": question.turns[i - 1], f"answer_{i}": answers[i - 1]}
        if question.reference:
            fields[f"ref_answer_{i}"] = question.reference[i - 1]
    messages = [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": prompt["prompt_template"].format(**fields)},
    ]
    return {
        "custom_id": f"{question.question_id}-{turn}",
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": judge_model, "messages": messages, "temperature": 0, "max_tokens": 2048},
    }


def _judge_one(client: httpx2.Client, request: Row) -> Row:
    text = _ask(client, request["body"])
    found = re.search(r"\[\[(\d+(?:\.\d+)?)\]\]", text)  # "[[7]]", as MT-bench asks for
    mark = float(found[1]) if found else 0.0
    row = {"custom_id": request["custom_id"], "judge": request["body"]["model"]}
    return {**row, "judgement": text, "score": mark if 1 <= mark <= 10 else None}


def _client(endpoint: str) -> httpx2.Client:
    """Return a client of an OpenAI endpoint; an error shows neither the key nor a password."""
    # huggingface_hub.InferenceClient would follow redirects, refuse even localhost under
    # $HF_HUB_OFFLINE, and send the user's Hugging Face token where there is no key.
    try:
        url = httpx2.URL(endpoint)
    except httpx2.InvalidURL:
        url = httpx2.URL("")
    # The address is shown in errors and logs, so no password may be in it.
    if url.scheme not in ("http", "https") or not url.host or url.userinfo or url.query:
        raise UsageError(
            f"--endpoint {endpoint.rpartition('@')[2].partition('?')[0]}: write its whole address, "
            f"as in http://localhost:8000/v1, and put a key into ${_KEY}"
        )
    key = os.environ.get(_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UsageError(
            f"${_KEY} holds characters that no key has, as line ends or umlauts: set it again"
        )
    headers = {"User-Agent": "moefy"} | ({"Authorization": f"Bearer {key}"} if key else {})
    return httpx2.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=False)


def _ask(client: httpx2.Client, request: Row) -> str:
    """Return the judge's words; a busy or stumbling endpoint is asked again."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(_PAUSE_S * 2**attempt)
        try:
            answer = client.post("chat/completions", json=request)
        except httpx2.HTTPError as error:
            reason = str(error) or type(error).__name__
            continue
        text = answer.text
        if key := client.headers.get("Authorization", "").removeprefix("Bearer "):
            text = text.replace(key, "[key]")  # some endpoints repeat it
        if answer.is_success:
            try:
                return str(json.loads(text)["choices"][0]["message"]["content"])
            except (ValueError, KeyError, IndexError, TypeError) as error:
                reason = f"its answer has another form ({error!r})"
                break
        reason = f"status {answer.status_code}: {' '.join(text.split())[:200]}"
        # Too busy or broken for the moment; any other status will be the same the next time.
        if answer.status_code not in (408, 429) and answer.status_code < 500:
            break
    raise JudgeError(
        f"{client.base_url} does not judge ({reason}): give the address of an endpoint that speaks "
        f"OpenAI's protocol, its key in ${_KEY}, and a model it has; the answers and judgements so "
        "far are kept, and the same command goes on"
    )


def _summary(out: Path, asked: list[Question], marks: list[float | None]) -> Judging:
    groups: dict[str, list[float]] = {}
    for place, mark in enumerate(marks):
        for name in ("", f"turn {place % 2 + 1}", asked[place // 2].category):
            if mark is not None:
                groups.setdefault(name, []).append(mark)
    scores = {name: sum(group) / len(group) for name, group in groups.items()}
    unscored = len(marks) - len(groups.get("", []))
    return Judging(out, len(asked), scores.pop("", None), scores, unscored)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
