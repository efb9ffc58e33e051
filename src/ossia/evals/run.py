"""A benchmark asked of a server, at one effort: many questions at once, each answer kept, gone on with.

The score is the mean over the questions of each one's mean over its repeats. Its error is that of the questions alone
(E. Miller, *Adding error bars to evals*, arXiv:2411.00640): repeats of one question are not independent.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from openai import APIError, APIStatusError, AsyncOpenAI

from ossia.errors import ConfigError, UnavailableError
from ossia.evals.benchmarks import Asked, Benchmark, Question
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


class Said(NamedTuple):
    """One answer: to a question, in a repeat."""

    key: str
    repeat: int
    right: bool
    answer: str
    said: str
    finished: bool
    """Whether the model ended by itself, and no limit cut it off."""
    output_tokens: int
    reasoning_tokens: int


class Score(NamedTuple):
    """What came out, in percent: the mean, and half of its 95 % interval."""

    mean: float
    half_width: float
    num_questions: int
    num_repeats: int
    unfinished: float
    output_tokens: float


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
            right = benchmark.is_right(text, asked.answer)
            log.add(Said(question.key, repeat, right, asked.answer, text, finished, output, reasoning))
            num_done += 1
            if progress is not None:
                progress(num_done, len(wanted))

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(work())
    except* (APIError, UnavailableError) as errors:
        raise _refused(how, errors) from None
    return score([log.said[one.key, repeat] for one, repeat in wanted])


def score(said: Iterable[Said]) -> Score:
    """The score of answers, of which every question has as many."""
    of_question: dict[str, list[Said]] = {}
    for one in said:
        of_question.setdefault(one.key, []).append(one)
    everything = [one for own in of_question.values() for one in own]
    means = [sum(one.right for one in own) / len(own) for own in of_question.values()]
    mean = sum(means) / len(means)
    variance = sum((one - mean) ** 2 for one in means) / max(1, len(means) - 1)
    return Score(
        100 * mean,
        100 * 1.959964 * math.sqrt(variance / len(means)),
        len(means),
        max(map(len, of_question.values())),
        100 * sum(not one.finished for one in everything) / len(everything),
        sum(one.output_tokens for one in everything) / len(everything),
    )


async def _answer(client: AsyncOpenAI, how: How, asked: Asked) -> tuple[str, bool, int, int]:
    """The text of an answer, whether it was finished, its tokens and of these those of reasoning."""
    given: dict[str, Any] = {"model": how.model, "temperature": how.temperature}
    if how.api == "chat":
        given |= {"messages": [{"role": "user", "content": asked.prompt}], "reasoning_effort": how.effort}
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
    given |= {"input": asked.prompt, "reasoning": {"effort": how.effort}, "max_output_tokens": how.max_tokens}
    response = await client.responses.create(**given, store=False)
    if how.python and not any(tool.type == "code_interpreter" for tool in response.tools or ()):
        raise UnavailableError(f"{how.url} offers no python tool; serve with it, or leave --python out")
    counted = response.usage
    return (
        response.output_text,
        response.status == "completed",
        counted.output_tokens if counted else 0,
        counted.output_tokens_details.reasoning_tokens if counted else 0,
    )


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
