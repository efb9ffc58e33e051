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
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from ossia.errors import InputError
from ossia.harmony import Effort
from ossia.local import load
from ossia.train.rollout import Exercise, Rollout, RolloutConfig, Rollouts, rollout_seed
from ossia.train.tasks import Task, TaskMix
from ossia.train.tasks.base import Split

# Exercises that are done at once; what each samples is not touched by it.
_ROUND = 256
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


def measure(
    rollouts: Rollouts, task: Task, effort: Effort, count: int, *, seed: int = 0, split: Split = "held_out"
) -> Measured:
    """Have ``count`` exercises done. Raises InputError for a count below 1, and what rollouts raise."""
    if count < 1:
        raise InputError(f"count is {count}; expected at least 1", param="count")
    mix = TaskMix({task: 1.0}, efforts={effort: 1.0})
    done: list[Rollout] = []
    for first in range(0, count, _ROUND):
        numbers = range(first, min(first + _ROUND, count))
        done += rollouts.run(
            [Exercise(mix.draw(split, seed, number), rollout_seed(seed, number)) for number in numbers]
        )
    right = sum(one.reward.parts["exact"] == 1 for one in done)
    low, high = wilson(right, count)
    encode = rollouts.tokenizer.encode
    return Measured(
        task=task.name,
        effort=str(effort),
        num_exercises=count,
        exact=right / count,
        low=low,
        high=high,
        valid=sum(not one.transcript.is_malformed for one in done) / count,
        unfinished=sum(one.transcript.is_unfinished for one in done) / count,
        sampled=sum(one.num_sampled for one in done) / count,
        reasoning=sum(len(encode(one.transcript.reasoning)) for one in done) / count,
        parts={
            name: sum(one.reward.parts.get(name, 0.0) for one in done) / count
            for name in sorted({name for one in done for name in one.reward.parts})
        },
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
