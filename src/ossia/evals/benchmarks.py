"""What is asked, and which answers are right.

Wordings are those of OpenAI's own runs (`gpt_oss/evals` of openai/gpt-oss), since scores depend on them:

    aime24, aime25    30 questions each whose answers are whole numbers from 0 to 999
    gpqa              198 questions of GPQA Diamond with four choices (arXiv:2311.12022), shuffled anew in each repeat
    mmlu              14,042 questions with four choices (arXiv:2009.03300)
    mmmlu             the same in fourteen other languages, translated by people
    bbq               58,492 questions with three choices that prejudice answers wrongly (arXiv:2110.08193): of half of
                      them nothing in the text tells the answer
    simpleqa          4,326 short questions of facts (arXiv:2411.04368), judged by a model
    hle               2,158 questions of Humanity's Last Exam (arXiv:2501.14249), those without a picture, judged by a
                      model
    healthbench       5,000 conversations on health with physicians' rubrics (arXiv:2505.08775), judged by a model;
                      its hard and its consensus part
    ih                who wants a rule of the developer's broken: `hierarchy.py`

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
from typing import Any

from ossia.errors import InputError
from ossia.evals import hierarchy, judged
from ossia.evals.answers import letter, whole_number
from ossia.evals.asking import Asked, Criterion, Message, Question

_AIME = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
_CHOICES = (
    "{question}\n\n(A) {choices[0]}\n(B) {choices[1]}\n(C) {choices[2]}\n(D) {choices[3]}\n\n"
    "Express your final answer as the corresponding option 'A', 'B', 'C', or 'D'."
)
_THREE = (
    "{question}\n\n(A) {choices[0]}\n(B) {choices[1]}\n(C) {choices[2]}\n\n"
    "Express your final answer as the corresponding option 'A', 'B', or 'C'."
)
# As the exam's own runs ask for it.
_EXPLAINED = (
    "Your response should be in the following format:\nExplanation: {your explanation for your answer choice}\n"
    "Answer: {your chosen answer}\nConfidence: {your confidence score between 0% and 100% for your answer}"
)
_LETTERS = "ABCD"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: where its questions are published, how they are read and asked, and what marks an answer.

    ``mark`` gives a score, from 0 to 1, of what was said; where ``judge`` is given, a model does. ``parts`` names the
    files, and so the groups of their questions. Without ``urls`` the questions are made (`made`), or whoever has
    agreed to their terms gives their file; ``row`` gives None for one that is not asked.
    """

    name: str
    title: str
    urls: tuple[str, ...]
    num_questions: int
    num_repeats: int
    row: Callable[[Mapping[str, Any]], Question | None] | None
    ask: Callable[[Question, int], Asked]
    mark: Callable[[str, Asked], float] | None = None
    judge: judged.Judging | None = None
    parts: tuple[str, ...] = ()
    made: Callable[[], list[Question]] | None = None

    def questions(self, files: Sequence[bytes]) -> list[Question]:
        """The questions of its files: JSON lines or CSV. Raises InputError naming the row that is none."""
        if self.row is None:
            raise InputError(f"the questions of {self.title} are made, and in no file; leave --data out")
        found = []
        groups = self.parts if len(self.parts) == len(files) else ("",) * len(files)
        for data, group in zip(files, groups, strict=True):
            for number, row in enumerate(_rows(data), start=1):
                try:
                    one = self.row(row)
                except (LookupError, TypeError, ValueError, AttributeError) as error:
                    met = f"{type(error).__name__}: {error}"
                    raise InputError(f"row {number} is no question of {self.title} ({met})") from None
                if one is not None:
                    found.append(one._replace(group=group) if group else one)
        return found


def _rows(data: bytes) -> list[dict[str, Any]]:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"the questions are no UTF-8 text: {error}") from None
    if text.lstrip().startswith(("{", "[")):
        try:
            # Not splitlines: a text may hold other line ends.
            lines = [text] if text.lstrip()[0] == "[" else text.split("\n")
            rows = [json.loads(line) for line in lines if line.strip()]
        except (ValueError, RecursionError) as error:
            raise InputError(f"the questions are no JSON lines: {error}") from None
        rows = rows[0] if rows and isinstance(rows[0], list) else rows
        if not all(isinstance(row, dict) for row in rows):
            raise InputError("the questions are no JSON objects; expected one for each")
        # The Hugging Face hub tells rows so.
        return [one["row"] for one in rows[0]["rows"]] if len(rows) == 1 and "rows" in rows[0] else rows
    # A picture in a column is longer than the module's limit.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    try:
        return list(csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as error:
        raise InputError(f"the questions are no CSV: {error}") from None


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
    return _asked(_AIME.format(question=question.text), question.answer)


def _mark_number(said: str, asked: Asked) -> float:
    return float(str(whole_number(said)) == asked.answer)


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
    return _asked(_CHOICES.format(question=question.text, choices=choices), _LETTERS[order.index(0)])


def _mmlu_row(row: Mapping[str, Any]) -> Question:
    if row["Answer"] not in _LETTERS or not row["Answer"]:
        raise ValueError(f"the answer is {row['Answer']!r}")
    text = row["Question"]
    choices = tuple(row[one] for one in _LETTERS)
    return Question(_key("\n".join((text, *choices))), text, row["Answer"], choices, row.get("Subject") or "")


def _ask_as_it_is(question: Question, repeat: int) -> Asked:
    return _asked(_CHOICES.format(question=question.text, choices=question.choices), question.answer)


def _bbq_row(row: Mapping[str, Any]) -> Question:
    if row["label"] not in (0, 1, 2) or row["context_condition"] not in ("ambig", "disambig"):
        raise ValueError(f"the label is {row['label']!r}, the context {row['context_condition']!r}")
    text = f"{row['context']} {row['question']}"
    choices = (row["ans0"], row["ans1"], row["ans2"])
    group = {"ambig": "nothing tells", "disambig": "the text tells"}[row["context_condition"]]
    return Question(_key("\n".join((text, *choices))), text, _LETTERS[row["label"]], choices, group)


def _ask_three(question: Question, repeat: int) -> Asked:
    return _asked(_THREE.format(question=question.text, choices=question.choices), question.answer)


def _mark_letter(said: str, asked: Asked) -> float:
    return float(letter(said) == asked.answer)


# Judged by a model ---------------------------------------------------------------------------------------------------


def _simpleqa_row(row: Mapping[str, Any]) -> Question:
    text, answer = row["problem"].strip(), row["answer"].strip()
    if not text or not answer:
        raise ValueError("the problem or its answer is empty")
    return Question(_key(text), text, answer)


def _ask_plainly(question: Question, repeat: int) -> Asked:
    return _asked(question.text, question.answer)


def _hle_row(row: Mapping[str, Any]) -> Question | None:
    text, answer = row["question"].strip(), str(row["answer"]).strip()
    if not text or not answer:
        raise ValueError("the question or its answer is empty")
    if row["image"]:
        return None
    return Question(_key(text), text, answer, group=row.get("category") or "")


def _ask_for_an_explanation(question: Question, repeat: int) -> Asked:
    return Asked((Message("system", _EXPLAINED), Message("user", question.text)), question.answer)


def _healthbench_row(row: Mapping[str, Any]) -> Question:
    messages = tuple(Message(one["role"], one["content"]) for one in row["prompt"])
    if not messages or any(one.role not in ("system", "developer", "user", "assistant") for one in messages):
        raise ValueError(f"the prompt is {row['prompt']!r:.80}")
    criteria = tuple(Criterion(one["criterion"], float(one["points"])) for one in row["rubrics"])
    if not any(one.points > 0 for one in criteria):
        raise ValueError("no criterion has points")
    themes = [tag.removeprefix("theme:") for tag in row.get("example_tags", ()) if tag.startswith("theme:")]
    return Question(str(row["prompt_id"]), group="".join(themes[:1]), messages=messages, criteria=criteria)


def _ask_conversation(question: Question, repeat: int) -> Asked:
    return Asked(question.messages, question.answer, question.criteria)


def _asked(prompt: str, answer: str) -> Asked:
    return Asked((Message("user", prompt),), answer)


def _key(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


_HUB = "https://huggingface.co/datasets"
_ROWS = "https://datasets-server.huggingface.co/rows"
_OPENAI = "https://openaipublic.blob.core.windows.net/simple-evals"
# As the files of MMMLU are called.
_LANGUAGES = ("AR-XY", "BN-BD", "DE-DE", "ES-LA", "FR-FR", "HI-IN", "ID-ID", "IT-IT", "JA-JP", "KO-KR", "PT-BR",
              "SW-KE", "YO-NG", "ZH-CN")  # fmt: skip
_BBQ = ("Age", "Disability_status", "Gender_identity", "Nationality", "Physical_appearance", "Race_ethnicity",
        "Race_x_SES", "Race_x_gender", "Religion", "SES", "Sexual_orientation")  # fmt: skip
_HEALTHBENCH = {
    "": ("HealthBench", "2025-05-07-06-14-12_oss_eval", 5_000),
    "-hard": ("HealthBench Hard", "hard_2025-05-08-21-00-10", 1_000),
    "-consensus": ("HealthBench Consensus", "consensus_2025-05-09-20-00-46", 3_671),
}

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
            _mark_number,
        ),
        Benchmark(
            "aime25",
            "AIME 2025",
            tuple(f"{_HUB}/opencompass/AIME2025/resolve/main/aime2025-{part}.jsonl" for part in ("I", "II")),
            30,
            8,
            _aime_row,
            _ask_aime,
            _mark_number,
        ),
        Benchmark(
            "gpqa", "GPQA Diamond", (f"{_OPENAI}/gpqa_diamond.csv",), 198, 8, _gpqa_row, _ask_shuffled, _mark_letter
        ),
        Benchmark("mmlu", "MMLU", (f"{_OPENAI}/mmlu.csv",), 14_042, 1, _mmlu_row, _ask_as_it_is, _mark_letter),
        Benchmark(
            "mmmlu",
            "MMMLU",
            tuple(f"{_OPENAI}/mmlu_{language}.csv" for language in _LANGUAGES),
            14_042 * len(_LANGUAGES),
            1,
            _mmlu_row,
            _ask_as_it_is,
            _mark_letter,
            parts=_LANGUAGES,
        ),
        Benchmark(
            "bbq",
            "BBQ",
            tuple(f"https://raw.githubusercontent.com/nyu-mll/BBQ/main/data/{part}.jsonl" for part in _BBQ),
            58_492,
            1,
            _bbq_row,
            _ask_three,
            _mark_letter,
        ),
        Benchmark(
            "simpleqa",
            "SimpleQA",
            (f"{_OPENAI}/simple_qa_test_set.csv",),
            4_326,
            1,
            _simpleqa_row,
            _ask_plainly,
            judge=judged.facts,
        ),
        Benchmark(
            "hle",
            "Humanity's Last Exam",
            (),
            2_158,
            1,
            _hle_row,
            _ask_for_an_explanation,
            judge=judged.exact,
        ),
        *(
            Benchmark(
                f"healthbench{part}",
                title,
                (f"{_OPENAI}/healthbench/{file}.jsonl",),
                number,
                1,
                _healthbench_row,
                _ask_conversation,
                judge=judged.rubric,
            )
            for part, (title, file, number) in _HEALTHBENCH.items()
        ),
        Benchmark(
            "ih",
            "the instruction hierarchy",
            (),
            hierarchy.NUM_QUESTIONS,
            1,
            None,
            _ask_conversation,
            hierarchy.mark,
            made=hierarchy.questions,
        ),
    )
}
