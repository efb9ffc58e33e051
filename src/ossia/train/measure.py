"""What a model can do, measured on tasks: the share of exercises done right, by effort, with its interval.

    with open_rollouts("gpt-oss-20b", RolloutConfig(temperature=0)) as rollouts:
        measured = measure(rollouts, make("sums"), Effort.HIGH, count=1000)
    print(measured.exact, measured.low, measured.high)

Exercises are held out: none of them is drawn in training. Answers are those of the engine that serves, with its tools
in the loop. Intervals are Wilson's at 95 % (E. B. Wilson, *Probable inference, the law of succession, and statistical
inference*, 1927).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ossia.errors import ConfigError, InputError
from ossia.harmony import Effort, Tokenizer
from ossia.kept_lines import KeptLines
from ossia.local import load
from ossia.train.rollout import Exercise, Rollout, RolloutConfig, Rollouts, rollout_seed
from ossia.train.tasks import Task, TaskMix
from ossia.train.tasks.base import Split

# Exercises that are done at once; what each samples is not touched by it.
_ROUND = 256
# Fewer where they are kept: what was done since is lost when it is broken off.
_LOGGED_ROUND = 32
_Z = 1.959964


class Measured(NamedTuple):
    """Shares and means over ``num_exercises`` exercises of a task at one effort."""

    task: str
    effort: str
    num_exercises: int
    exact: float
    """Share of exercises that are right in every part, between ``low`` and ``high`` with 95 % confidence."""
    low: float
    high: float
    valid: float
    """Share of transcripts that keep to the format from the first token to the last."""
    unfinished: float
    """Share of those that had kept to it until the limit of tokens ended them."""
    sampled: float
    """Tokens that the model samples, and of these its reasoning: means."""
    reasoning: float
    parts: dict[str, float]
    """Means of the parts of the reward."""
    defects: dict[str, float]
    """What broke the format (`Transcript.defects`), and the share of transcripts in which it did."""


class Done(NamedTuple):
    """One exercise that was done."""

    number: int
    right: bool
    valid: bool
    unfinished: bool
    sampled: int
    reasoning: int
    parts: dict[str, float]
    defects: list[str]
    text: str
    """All of it, from the prompt's first token to the last one sampled."""


class Log:
    """Exercises that were done, in a file: what stands in it is not done again (`ossia.kept_lines`)."""

    def __init__(self, path: Path, how: Mapping[str, Any]) -> None:
        """Raises ConfigError for a file of something else, or of exercises that were done otherwise."""
        self._kept = KeptLines(path, how, "measured exercises")
        self._done: dict[tuple[str, str], dict[int, Done]] = {}
        try:
            for line in self._kept.lines:
                self._note(line)
        except (LookupError, TypeError):
            raise ConfigError(f"{path} is no file of measured exercises; give another name") from None

    def done(self, task: str, effort: Effort) -> Mapping[int, Done]:
        """Those of a task at an effort, by their numbers."""
        return self._done.get((task, str(effort)), {})

    def add(self, task: str, effort: Effort, done: Iterable[Done]) -> None:
        """Keep more of them."""
        lines = [{"task": task, "effort": str(effort), **one._asdict()} for one in done]
        self._kept.add(lines)
        for line in lines:
            self._note(line)

    def _note(self, line: Mapping[str, Any]) -> None:
        one = Done(**{name: line[name] for name in Done._fields})
        self._done.setdefault((line["task"], line["effort"]), {})[one.number] = one


def measure(
    rollouts: Rollouts,
    task: Task,
    effort: Effort,
    count: int,
    *,
    seed: int = 0,
    split: Split = "held_out",
    log: Log | None = None,
) -> Measured:
    """Have ``count`` exercises done, but for those in the ``log``, which the others are added to.

    Raises InputError for a count below 1, and what rollouts raise.
    """
    if count < 1:
        raise InputError(f"count is {count}; expected at least 1", param="count")
    mix = TaskMix({task: 1.0}, efforts={effort: 1.0})
    done = {n: one for n, one in log.done(task.name, effort).items() if n < count} if log is not None else {}
    missing = [number for number in range(count) if number not in done]
    num_at_once = _ROUND if log is None else _LOGGED_ROUND
    for first in range(0, len(missing), num_at_once):
        numbers = missing[first : first + num_at_once]
        ran = rollouts.run([Exercise(mix.draw(split, seed, n), rollout_seed(seed, n)) for n in numbers])
        more = {n: _done(n, one, rollouts.tokenizer) for n, one in zip(numbers, ran, strict=True)}
        if log is not None:
            log.add(task.name, effort, more.values())
        done |= more
    right = sum(one.right for one in done.values())
    low, high = wilson(right, count)

    def mean(values: Iterable[float]) -> float:
        return sum(values) / count

    return Measured(
        task=task.name,
        effort=str(effort),
        num_exercises=count,
        exact=right / count,
        low=low,
        high=high,
        valid=mean(one.valid for one in done.values()),
        unfinished=mean(one.unfinished for one in done.values()),
        sampled=mean(one.sampled for one in done.values()),
        reasoning=mean(one.reasoning for one in done.values()),
        parts={
            name: mean(one.parts.get(name, 0.0) for one in done.values())
            for name in sorted({name for one in done.values() for name in one.parts})
        },
        defects={
            name: mean(name in one.defects for one in done.values())
            for name in sorted({name for one in done.values() for name in one.defects})
        },
    )


def _done(number: int, rollout: Rollout, tokenizer: Tokenizer) -> Done:
    transcript = rollout.transcript
    return Done(
        number,
        right=rollout.reward.parts["exact"] == 1,
        valid=not transcript.is_malformed,
        unfinished=transcript.is_unfinished,
        sampled=rollout.num_sampled,
        reasoning=len(tokenizer.encode(transcript.reasoning)),
        parts=dict(rollout.reward.parts),
        defects=list(transcript.defects),
        text=tokenizer.decode(rollout.token_ids_L.tolist()),
    )


def wilson(right: int, count: int) -> tuple[float, float]:
    """Wilson's interval for a share, at 95 %."""
    share = right / count
    middle = share + _Z**2 / (2 * count)
    half = _Z * math.sqrt(share * (1 - share) / count + _Z**2 / (4 * count**2))
    scale = 1 + _Z**2 / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


@contextmanager
def open_rollouts(
    model: str | Path, config: RolloutConfig, *, adapter: str | Path | None = None, **settings: Any
) -> Iterator[Rollouts]:
    """Rollouts of a checkpoint on the engine, through an adapter's folder if one is given; ``settings`` are those of
    `ossia.load`.
    """
    local = load(model, **settings)
    name = None if adapter is None else local.load_adapter(adapter)
    with Rollouts(local.engine, local.tokenizer, config, adapter=name) as rollouts:
        yield rollouts
