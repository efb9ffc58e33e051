"""Sums and differences at three efforts: at once, in one line of steps, or digit by digit and checked.

    low      933
    medium   7+6=13 4+8+1=13 3+5+1=9        then 933
    high     a line for each digit, then the result, then a check by the opposite operation

The answer is the number alone. ``digits`` is the most that a number may have.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from ossia.errors import ConfigError
from ossia.harmony import Channel, Effort, Message, Role
from ossia.train.tasks.base import Instance, Task

_PHRASES = (
    "What is {}?",
    "Compute {}.",
    "{} = ?",
    "How much is {}?",
    "Please work out {}.",
    "Give me the result of {}.",
)


class Arithmetic(Task):
    name = "arithmetic"

    def __init__(self, digits: int = 3) -> None:
        """Raises ConfigError for a number of digits that cannot be."""
        if not 1 <= digits <= 18:
            raise ConfigError(f"digits is {digits}; expected 1 to 18", param="digits")
        self.digits = digits

    def instance(self, rng: random.Random) -> Instance:
        a, b = (rng.randrange(10 ** rng.randint(1, self.digits)) for _ in range(2))
        sign = rng.choice("+-")
        if sign == "-" and b > a:
            a, b = b, a
        said = rng.choice(_PHRASES).format(f"{a}{sign}{b}")
        answer = a + b if sign == "+" else a - b
        # However it is asked, it is the same sum.
        return Instance(f"{a}{sign}{b}", said, str(answer), {"a": a, "b": b, "sign": sign})

    def gold(self, instance: Instance, effort: Effort) -> Sequence[Message]:
        final = Message(Role.ASSISTANT, instance.answer, channel=Channel.FINAL)
        if effort is Effort.LOW:
            return (final,)
        a, b, sign = instance.data["a"], instance.data["b"], instance.data["sign"]
        steps = written_steps(a, b, sign)
        if effort is Effort.MEDIUM:
            thought = " ".join(steps)
        else:
            opposite = "-" if sign == "+" else "+"
            back = [f"{instance.answer}{opposite}{b}={a}", *written_steps(int(instance.answer), b, opposite)]
            thought = "\n".join([*steps, f"so {instance.answer}", "check", *back])
        return (Message(Role.ASSISTANT, thought, channel=Channel.ANALYSIS), final)


class Step(NamedTuple):
    """One place: digits x and y, what the step before carried or borrowed, what this one does, and its digit."""

    x: int
    y: int
    before: int
    carry: int
    digit: int

    @classmethod
    def of(cls, x: int, sign: str, y: int, before: int) -> Step:
        value = x + y + before if sign == "+" else x - y - before
        return cls(x, y, before, int(not 0 <= value <= 9), value % 10)


def steps_of(a: int, b: int, sign: str) -> list[Step]:
    """Of a + b, or a - b with a >= b, from the last digit to the first; what a number lacks is 0."""
    tops, bottoms = str(a)[::-1], str(b)[::-1]
    steps: list[Step] = []
    for place in range(max(len(tops), len(bottoms))):
        x, y = (int(digits[place]) if place < len(digits) else 0 for digits in (tops, bottoms))
        steps.append(Step.of(x, sign, y, steps[-1].carry if steps else 0))
    return steps


def written_steps(a: int, b: int, sign: str) -> list[str]:
    """A step for each digit from the right: "7+6=13", "4+8+1=13" with the carry, "3-5-1=-3" with what was borrowed."""
    return [
        f"{one.x}{sign}{one.y}"
        + (f"{sign}{one.before}" if one.before else "")
        + f"={one.digit + (10 if sign == '+' else -10) * one.carry}"
        for one in steps_of(a, b, sign)
    ]
