"""Sums and differences at three efforts: at once, in one line of steps, or digit by digit and checked.

    low      933
    medium   7+6=13 4+8+1=13 3+5+1=9        then 933
    high     a line for each digit, then the result, then a check by the opposite operation

The answer is the number alone. ``digits`` is the most that a number may have.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

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


def written_steps(a: int, b: int, sign: str) -> list[str]:
    """A step for each digit from the right: "7+6=13", "4+8+1=13" with the carry, "3-5-1=-3" with what was borrowed."""
    top, bottom = str(a)[::-1], str(b)[::-1]
    steps, carry = [], 0
    for i in range(max(len(top), len(bottom))):
        x, y = (int(digits[i]) if i < len(digits) else 0 for digits in (top, bottom))
        result = x + y + carry if sign == "+" else x - y - carry
        steps.append(f"{x}{sign}{y}" + (f"{sign}{carry}" if carry else "") + f"={result}")
        carry = int(result > 9) if sign == "+" else int(result < 0)
    return steps
