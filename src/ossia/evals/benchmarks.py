"""What is asked, and which answers are right.

Wordings are those of OpenAI's own runs (`gpt_oss/evals` of openai/gpt-oss), since scores depend on them:

    aime24, aime25    30 questions each whose answers are whole numbers from 0 to 999
    gpqa              198 questions of GPQA Diamond with four choices (arXiv:2311.12022), shuffled anew in each repeat
    mmlu              14,042 questions with four choices (arXiv:2009.03300)

A benchmark is asked several times over, since an answer is drawn at random: its score is the mean.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ossia.errors import InputError
from ossia.evals.answers import letter, whole_number

_AIME = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_CHOICES = (
    "{question}\n\n(A) {choices[0]}\n(B) {choices[1]}\n(C) {choices[2]}\n(D) {choices[3]}\n\n"
    "Express your final answer as the corresponding option 'A', 'B', 'C', or 'D'."
)
_LETTERS = "ABCD"


class Question(NamedTuple):
    """One question of a benchmark. Of ``choices`` the first is right where ``answer`` is empty."""

    key: str
    text: str
    answer: str = ""
    choices: tuple[str, ...] = ()
    group: str = ""


class Asked(NamedTuple):
    """A question as it is put to the model, and its answer."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: where its questions are published, how they are read, asked and judged."""

    name: str
    title: str
    urls: tuple[str, ...]
    num_questions: int
    num_repeats: int
    row: Callable[[Mapping[str, Any]], Question]
    ask: Callable[[Question, int], Asked]
    find: Callable[[str], str | None]

    def questions(self, files: Sequence[bytes]) -> list[Question]:
        """The questions of its files: JSON lines or CSV. Raises InputError naming the row that is none."""
        found = []
        for data in files:
            for number, row in enumerate(_rows(data), start=1):
                try:
                    found.append(self.row(row))
                except (LookupError, TypeError, ValueError) as error:
                    met = f"{type(error).__name__}: {error}"
                    raise InputError(f"row {number} is no question of {self.title} ({met})") from None
        return found

    def is_right(self, said: str, answer: str) -> bool:
        """Whether what a model said is the answer."""
        return self.find(said) == answer


def _rows(data: bytes) -> list[dict[str, Any]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the questions are no UTF-8 text: {error}") from None
    if text.lstrip().startswith("{"):
        try:
            # Not splitlines: a text may hold other line ends.
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        except ValueError as error:
            raise InputError(f"the questions are no JSON lines: {error}") from None
        # The Hugging Face hub tells rows so.
        return [one["row"] for one in rows[0]["rows"]] if len(rows) == 1 and "rows" in rows[0] else rows
    return list(csv.DictReader(io.StringIO(text, newline="")))


# AIME ----------------------------------------------------------------------------------------------------------------


def _aime_row(row: Mapping[str, Any]) -> Question:
    fields = {name.lower(): value for name, value in row.items()}
    text = str(fields["question"] if "question" in fields else fields["problem"]).strip()
    # "336^\\circ" is one of 2025's.
    answer = whole_number(str(fields["answer"]))
    if answer is None:
        raise ValueError(f"the answer is {fields['answer']!r}")
    return Question(_key(text), text, str(answer))


def _ask_aime(question: Question, repeat: int) -> Asked:
    return Asked(_AIME.format(question=question.text), question.answer)


def _find_number(said: str) -> str | None:
    number = whole_number(said)
    return None if number is None else str(number)


# Choices -------------------------------------------------------------------------------------------------------------


def _gpqa_row(row: Mapping[str, Any]) -> Question:
    choices = (row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3)))
    if not all(isinstance(one, str) and one.strip() for one in choices):
        raise ValueError("a choice is empty")
    text = row["Question"].strip()
    return Question(_key(text), text, "", tuple(one.strip() for one in choices), row.get("High-level domain") or "")


def _ask_shuffled(question: Question, repeat: int) -> Asked:
    order = random.Random(f"{question.key} {repeat}").sample(range(4), 4)
    choices = [question.choices[i] for i in order]
    return Asked(_CHOICES.format(question=question.text, choices=choices), _LETTERS[order.index(0)])


def _mmlu_row(row: Mapping[str, Any]) -> Question:
    if row["Answer"] not in _LETTERS or not row["Answer"]:
        raise ValueError(f"the answer is {row['Answer']!r}")
    text = row["Question"]
    choices = tuple(row[one] for one in _LETTERS)
    return Question(_key("\n".join((text, *choices))), text, row["Answer"], choices, row.get("Subject") or "")


def _ask_as_it_is(question: Question, repeat: int) -> Asked:
    return Asked(_CHOICES.format(question=question.text, choices=question.choices), question.answer)


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_HUB = "https://huggingface.co/datasets"
_ROWS = "https://datasets-server.huggingface.co/rows"
_OPENAI = "https://openaipublic.blob.core.windows.net/simple-evals"

BENCHMARKS: Mapping[str, Benchmark] = {
    one.name: one
    for one in (
        Benchmark(
            "aime24",
            "AIME 2024",
            (f"{_ROWS}?dataset=Maxwell-Jia/AIME_2024&config=default&split=train&offset=0&length=100",),
            30,
            8,
            _aime_row,
            _ask_aime,
            _find_number,
        ),
        Benchmark(
            "aime25",
            "AIME 2025",
            tuple(f"{_HUB}/opencompass/AIME2025/resolve/main/aime2025-{part}.jsonl" for part in ("I", "II")),
            30,
            8,
            _aime_row,
            _ask_aime,
            _find_number,
        ),
        Benchmark("gpqa", "GPQA Diamond", (f"{_OPENAI}/gpqa_diamond.csv",), 198, 8, _gpqa_row, _ask_shuffled, letter),
        Benchmark("mmlu", "MMLU", (f"{_OPENAI}/mmlu.csv",), 14_042, 1, _mmlu_row, _ask_as_it_is, letter),
    )
}
