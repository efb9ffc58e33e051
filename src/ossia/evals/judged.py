"""Answers that a model judges: SimpleQA's, those of Humanity's Last Exam, and HealthBench's.

What is asked of the judge is worded here, after what the two papers say of it: scores depend on the judge and on its
wording, and are to be compared with others' only by and large.

    facts     is the answer right, wrong, or none?             arXiv:2411.04368
    exact     is the final answer the right one?               arXiv:2501.14249
    rubric    of every criterion, is it met? The score is the points of those that are, over all that can be had
                                                               arXiv:2505.08775
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, NamedTuple

from ossia.errors import UnavailableError
from ossia.evals.asking import Asked, Criterion

Ask = Callable[[str, Mapping[str, Any]], Awaitable[str]]
"""Puts a prompt to the judge, who is to answer in JSON of a schema; what it said."""


class Verdict(NamedTuple):
    """A score, as a rule from 0 to 1 (below 0 where a rubric takes points away), and the verdict in words."""

    score: float
    words: str


Judging = Callable[[str, Asked, Ask], Awaitable[Verdict]]
"""From what a model said, to what it was asked, and a judge."""

_TRIES = 3
LABELS = ("correct", "incorrect", "not attempted")
"""SimpleQA's verdicts."""

_FACTS = """\
A question of fact was asked, and its right answer is known. Say how the answer that was given compares with it.

correct: it holds all that the right answer says, and nothing that contradicts it. Wording, language, capitals, order \
and doubts in passing do not matter; of a number it is enough that it agrees with the right one to the digits that the \
right one has.
incorrect: some part of it contradicts the right answer, also where it is said with a doubt, or among several guesses.
not attempted: it neither gives the right answer in full nor contradicts it, as where it says that it does not know.

What the question makes plain need not be said again, and slips in the spelling of a name are no error where it is \
plain who is meant.

Question: {question}
Right answer: {answer}
Given answer: {said}

Answer in JSON: {{"verdict": "correct"}}, {{"verdict": "incorrect"}} or {{"verdict": "not attempted"}}."""

_EXACT = """\
An exam's question has one right answer. Say whether a reply's final answer is that one.

Take the final answer as the reply has it, and do not solve the question yourself: the right answer is right. Another \
way of writing the same thing is the same answer, as is a number that differs by rounding alone. Anything more, less \
or else is wrong, as is a reply without a final answer, or with several.

# The question

{question}

# The right answer

{answer}

# The reply

{said}

Answer in JSON: first "answer", the reply's final answer or "none", then "reason", one sentence, then "right", true or \
false."""

_RUBRIC = """\
A conversation with an assistant follows, and a criterion for its last reply. Say whether the reply meets the criterion.

Judge this criterion alone, and not the reply as a whole. A criterion may describe something bad: then met means that \
the reply does that bad thing, and a good reply does not meet it. Where a criterion has several parts, all of them \
must be there; where it gives examples ("such as", "for instance", "including"), not each of them must.

# Conversation

{conversation}

# The reply

{said}

# The criterion

{criterion}

Answer in JSON: first "reason", one sentence, then "met", true or false."""


async def facts(said: str, asked: Asked, ask: Ask) -> Verdict:
    """SimpleQA's: right answers count 1, wrong ones and none 0."""
    label = await _told(
        ask,
        _FACTS.format(question=asked.messages[-1].text, answer=asked.answer, said=said or "(nothing)"),
        {"verdict": {"type": "string", "enum": list(LABELS)}},
        "verdict",
        lambda value: value in LABELS,
    )
    return Verdict(float(label == "correct"), str(label))


async def exact(said: str, asked: Asked, ask: Ask) -> Verdict:
    """That of Humanity's Last Exam: right answers count 1, others 0."""
    prompt = _EXACT.format(question=asked.messages[-1].text, answer=asked.answer, said=said or "(nothing)")
    fields = {"answer": {"type": "string"}, "reason": {"type": "string"}, "right": {"type": "boolean"}}
    is_right = bool(await _told(ask, prompt, fields, "right", lambda value: isinstance(value, bool)))
    return Verdict(float(is_right), "correct" if is_right else "incorrect")


async def rubric(said: str, asked: Asked, ask: Ask) -> Verdict:
    """HealthBench's: the points of the criteria that are met, over those that can be had."""

    async def is_met(criterion: Criterion) -> bool:
        prompt = _RUBRIC.format(
            conversation="\n\n".join(f"{one.role}: {one.text}" for one in asked.messages),
            said=said or "(nothing)",
            criterion=criterion.text,
        )
        fields = {"reason": {"type": "string"}, "met": {"type": "boolean"}}
        return bool(await _told(ask, prompt, fields, "met", lambda value: isinstance(value, bool)))

    met = await asyncio.gather(*(is_met(one) for one in asked.criteria))
    possible = sum(one.points for one in asked.criteria if one.points > 0)
    reached = sum(one.points for one, is_so in zip(asked.criteria, met, strict=True) if is_so)
    return Verdict(reached / possible, f"{reached:g} of {possible:g} points")


async def _told(
    ask: Ask, prompt: str, fields: Mapping[str, Any], name: str, is_one: Callable[[Any], bool]
) -> str | bool:
    """A field of the judge's answer. Raises UnavailableError for a judge that says something else again and again."""
    schema = {"type": "object", "properties": fields, "required": list(fields), "additionalProperties": False}
    said = ""
    for _ in range(_TRIES):
        said = await ask(prompt, schema)
        try:
            # A server that does not enforce the schema may put words around.
            found = json.loads(said[said.index("{") : said.rindex("}") + 1])[name]
        except (ValueError, LookupError, TypeError):
            continue
        if is_one(found):
            value: str | bool = found
            return value
    raise UnavailableError(f"the judge gives no verdict in JSON, but {said[:200]!r}; take another with --judge")
