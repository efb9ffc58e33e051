"""A benchmark asked of a server, at one effort: many questions at once, each answer kept, gone on with.

The score is the mean over the questions of each one's mean over its repeats. Its error is that of the questions alone
(E. Miller, *Adding error bars to evals*, arXiv:2411.00640): repeats of one question are not independent.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

from openai import APIError, APIStatusError, AsyncOpenAI

from ossia.errors import ConfigError, UnavailableError
from ossia.evals.asking import Asked, Message, Question
from ossia.evals.benchmarks import Benchmark
from ossia.evals.judged import LABELS, Ask, Verdict
from ossia.kept_lines import KeptLines

Api = Literal["responses", "chat"]


class How(NamedTuple):
    """How a benchmark is asked; answers that were got otherwise are not put together."""

    benchmark: str
    url: str
    model: str
    effort: str
    api: Api = "responses"
    python: bool = False
    temperature: float = 1.0
    max_tokens: int = 131_072
    judge: str = ""
    """The judge and its server, "gpt-oss-120b at http://127.0.0.1:8000/v1", where there is one."""


class Said(NamedTuple):
    """One answer: to a question, in a repeat."""

    key: str
    repeat: int
    score: float
    """1 for a right one, 0 for a wrong one; of a rubric also what lies between, and below."""
    answer: str
    said: str
    finished: bool
    """Whether the model ended by itself, and no limit cut it off."""
    output_tokens: int
    reasoning_tokens: int
    verdict: str = ""
    """What the judge found."""


class Score(NamedTuple):
    """What came out, in percent: the mean, and half of its 95 % interval."""

    mean: float
    half_width: float
    num_questions: int
    num_repeats: int
    unfinished: float
    output_tokens: float
    groups: Mapping[str, float]
    """Of questions that belong to one."""
    verdicts: Mapping[str, float]
    """What a judge found, where it has names for it."""


class Log:
    """Answers, in memory or in a file: what stands in it is not asked again (`ossia.kept_lines`)."""

    def __init__(self, path: Path | None, how: How) -> None:
        """Raises ConfigError for a file of something else, or of answers that were got otherwise."""
        self._kept = None if path is None else KeptLines(path, how._asdict(), "a benchmark's answers")
        try:
            said = [Said(**line) for line in self._kept.lines] if self._kept is not None else []
        except TypeError:
            raise ConfigError(f"{path} is no file of a benchmark's answers; give another name") from None
        self.said = {(one.key, one.repeat): one for one in said}

    def add(self, one: Said) -> None:
        """Keep one more."""
        self.said[one.key, one.repeat] = one
        if self._kept is not None:
            self._kept.add([one._asdict()])


async def run(
    client: AsyncOpenAI,
    benchmark: Benchmark,
    questions: Sequence[Question],
    how: How,
    *,
    num_repeats: int,
    concurrency: int,
    log: Log,
    judge: Ask | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Score:
    """Ask what the log has no answer to, ``concurrency`` at once, and score all of it.

    Raises UnavailableError, saying what to do, when the server refuses or cannot be reached; answers until then are
    kept.
    """
    wanted = [(one, repeat) for repeat in range(num_repeats) for one in questions]
    missing = iter([pair for pair in wanted if (pair[0].key, pair[1]) not in log.said])
    num_done = len(wanted) - sum(1 for one, repeat in wanted if (one.key, repeat) not in log.said)

    async def work() -> None:
        nonlocal num_done
        for question, repeat in missing:
            asked = benchmark.ask(question, repeat)
            text, finished, output, reasoning = await _answer(client, how, asked)
            verdict = await _verdict(benchmark, text, asked, judge)
            made = (asked.answer, text, finished, output, reasoning, verdict.words)
            log.add(Said(question.key, repeat, verdict.score, *made))
            num_done += 1
            if progress is not None:
                progress(num_done, len(wanted))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except* (APIError, UnavailableError) as errors:
        raise _refused(how, errors) from None
    groups = {one.key: one.group for one in questions}
    return score([log.said[one.key, repeat] for one, repeat in wanted], groups)


async def _verdict(benchmark: Benchmark, text: str, asked: Asked, judge: Ask | None) -> Verdict:
    if benchmark.judge is None:
        assert benchmark.mark is not None
        return Verdict(benchmark.mark(text, asked), "")
    assert judge is not None
    return await benchmark.judge(text, asked, judge)


def score(said: Iterable[Said], groups: Mapping[str, str] = MappingProxyType({})) -> Score:
    """The score of answers, of which every question has as many; ``groups`` by the keys of questions."""
    of_question: dict[str, list[Said]] = {}
    for one in said:
        of_question.setdefault(one.key, []).append(one)
    everything = [one for own in of_question.values() for one in own]
    mean_of = {key: sum(one.score for one in own) / len(own) for key, own in of_question.items()}
    means = list(mean_of.values())
    mean = sum(means) / len(means)
    variance = sum((one - mean) ** 2 for one in means) / max(1, len(means) - 1)
    of_group: dict[str, list[float]] = {}
    for key, value in mean_of.items():
        if group := groups.get(key):
            of_group.setdefault(group, []).append(value)
    verdicts = Counter(one.verdict for one in everything if one.verdict in LABELS)
    return Score(
        _percent(mean),
        100 * 1.959964 * math.sqrt(variance / len(means)),
        len(means),
        max(map(len, of_question.values())),
        100 * sum(not one.finished for one in everything) / len(everything),
        sum(one.output_tokens for one in everything) / len(everything),
        {group: _percent(sum(own) / len(own)) for group, own in sorted(of_group.items())},
        {verdict: 100 * count / len(everything) for verdict, count in sorted(verdicts.items())},
    )


def _percent(mean: float) -> float:
    # A rubric may take more points away than it gives.
    return 100 * min(1.0, max(0.0, mean))


def make_judge(client: AsyncOpenAI, model: str, api: Api, concurrency: int) -> Ask:
    """A judge: a model at a server, asked ``concurrency`` times at once at most."""
    turns = asyncio.Semaphore(concurrency)

    async def ask(prompt: str, schema: Mapping[str, Any]) -> str:
        form = {"name": "verdict", "schema": schema, "strict": True}
        given: dict[str, Any] = {"model": model}
        async with turns:
            if api == "chat":
                given["messages"] = [{"role": "user", "content": prompt}]
                given["response_format"] = {"type": "json_schema", "json_schema": form}
                return (await client.chat.completions.create(**given)).choices[0].message.content or ""
            given |= {"input": prompt, "text": {"format": {"type": "json_schema", **form}}, "store": False}
            return str((await client.responses.create(**given)).output_text)

    return ask


async def _answer(client: AsyncOpenAI, how: How, asked: Asked) -> tuple[str, bool, int, int]:
    """The text of an answer, whether it was finished, its tokens and of these those of reasoning."""
    given: dict[str, Any] = {"model": how.model, "temperature": how.temperature}
    if how.api == "chat":
        given |= {"messages": _chat_messages(asked.messages), "reasoning_effort": how.effort}
        if _has_tool(asked):
            given |= {"tools": [{"type": "function", "function": _READ_PAGE}], "tool_choice": "none"}
        made = await client.chat.completions.create(**given, max_completion_tokens=how.max_tokens)
        choice, usage = made.choices[0], made.usage
        details = usage and usage.completion_tokens_details
        return (
            choice.message.content or "",
            choice.finish_reason != "length",
            usage.completion_tokens if usage else 0,
            (details and details.reasoning_tokens) or 0,
        )
    if how.python:
        given["tools"] = [{"type": "code_interpreter", "container": {"type": "auto"}}]
    if _has_tool(asked):
        given |= {"tools": [{"type": "function", **_READ_PAGE}], "tool_choice": "none"}
    given |= {"input": _input_items(asked.messages), "reasoning": {"effort": how.effort}}
    given["max_output_tokens"] = how.max_tokens
    response = await client.responses.create(**given, store=False)
    if how.python and not any(tool.type == "code_interpreter" for tool in response.tools or ()):
        raise UnavailableError(f"{how.url} offers no python tool; serve with it, or leave --python out")
    if response.status in ("failed", "cancelled"):
        why = response.error.message if response.error else "it does not say why"
        raise UnavailableError(f"{how.url} answered that the response has {response.status}: {why}")
    counted = response.usage
    return (
        response.output_text,
        response.status == "completed",
        counted.output_tokens if counted else 0,
        counted.output_tokens_details.reasoning_tokens if counted else 0,
    )


_READ_PAGE = {
    "name": "read_page",
    "description": "Read a page.",
    "parameters": {
        "type": "object",
        "properties": {"about": {"type": "string"}},
        "required": ["about"],
        "additionalProperties": False,
    },
    "strict": True,
}


def _has_tool(asked: Asked) -> bool:
    return any(one.role == "tool" for one in asked.messages)


def _chat_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As Chat Completions takes them; before what a function gave stands the call of it."""
    out: list[dict[str, Any]] = []
    for number, one in enumerate(messages):
        if one.role == "tool":
            function = {"name": _READ_PAGE["name"], "arguments": _arguments(messages[number - 1])}
            out += [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": f"call_{number}", "type": "function", "function": function}],
                },
                {"role": "tool", "tool_call_id": f"call_{number}", "content": one.text},
            ]
        else:
            out.append({"role": one.role, "content": one.text})
    return out


def _input_items(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """As the Responses API takes them."""
    out: list[dict[str, Any]] = []
    for number, one in enumerate(messages):
        if one.role == "tool":
            call = {
                "call_id": f"call_{number}",
                "name": _READ_PAGE["name"],
                "arguments": _arguments(messages[number - 1]),
            }
            out += [
                {"type": "function_call", **call},
                {"type": "function_call_output", "call_id": f"call_{number}", "output": one.text},
            ]
        else:
            out.append({"type": "message", "role": one.role, "content": one.text})
    return out


def _arguments(asked: Message) -> str:
    return json.dumps({"about": asked.text})


def _refused(how: How, error: BaseException) -> UnavailableError:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, UnavailableError):
        return error
    if isinstance(error, APIStatusError):
        met = f"{how.url} answers with status {error.status_code}: {error.message}"
    else:
        met = f"{how.url} cannot be asked: {error.__cause__ or error}"
    return UnavailableError(f"{met}. What was answered until then is kept with --out; the same command goes on.")
