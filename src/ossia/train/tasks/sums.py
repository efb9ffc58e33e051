"""Sums and differences at three efforts, for a small model: at once, digit by digit in one line, or written out.

    low      What is 4821 + 937?      5758
    medium   1+7=8 2+3=5 8+9=17 4+0+1=5
    high     4821: 1284
             937: 7390
             1+7=8, 8
             2+3=5, 5
             8+9=17, 7
             4+0+1=5, 5
             8575
             So 5758.

Thoughts go from the last digit to the first. At high effort the digits are turned round beforehand, so that every step
finds its operands at the same distance. Source of the idea: Lee et al., *Teaching Arithmetic to Small Transformers*,
arXiv:2307.03381.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from ossia.errors import ConfigError
from ossia.harmony import Effort, Message
from ossia.train.tasks import words
from ossia.train.tasks.arithmetic import written_steps
from ossia.train.tasks.base import Instance
from ossia.train.tasks.invented import InventedTask, final, think
from ossia.train.tasks.phrases import Phrases

_ASK = "[What is|What's|How much is|Compute|Calculate|Work out|Give me|Find|Tell me|Please compute] "
_FORMS = {
    "+": Phrases(
        _ASK + "{a} + {b}[?|]",
        _ASK + "{a} plus {b}[?|]",
        "[Please add|Add|add] {a} [and|to] {b}[.|]",
        "[Find|Give|What is|Tell me] the sum of {a} and {b}[.|?]",
        "{a} + {b}[| =| = ?|?]",
        "{a} plus {b}[?|.| is what?| equals?]",
        "I have {a} [apples|coins|beans|books] and get {b} more. How many [do I have|are there]?",
        "[There are|We saw] {a} [people|birds|cars] and then {b} more [came|come]. How many in all?",
    ),
    "-": Phrases(
        _ASK + "{a} - {b}[?|]",
        _ASK + "{a} minus {b}[?|]",
        "[Please subtract|Subtract|subtract|Take|take] {b} from {a}[.|]",
        "[Find|Give|What is|Tell me] the difference of {a} and {b}[.|?]",
        "{a} - {b}[| =| = ?|?]",
        "{a} minus {b}[?|.| is what?| equals?]",
        "I have {a} [apples|coins|beans|books] and [give away|lose|sell] {b}. How many [do I have left|are left]?",
    ),
}


class Sums(InventedTask):
    name = "sums"
    # What cannot be known at once teaches little: few of them, lest their loss hide the others.
    efforts: ClassVar[Mapping[Effort, float]] = {Effort.LOW: 1.0, Effort.MEDIUM: 2.0, Effort.HIGH: 5.0}

    def __init__(self, digits: int = 5, exact: bool = False) -> None:
        """``digits`` is the most that a number has; ``exact``: both numbers have that many.

        Raises ConfigError for a number of digits that cannot be.
        """
        if not 1 <= digits <= 18:
            raise ConfigError(f"digits is {digits}; expected 1 to 18", param="digits")
        self.digits, self.exact = digits, exact

    def draw(self, rng: random.Random, held_out: bool) -> Instance:
        a, b = (self._number(rng) for _ in range(2))
        sign = "+" if rng.random() < 0.7 else "-"
        if sign == "-" and b > a:
            a, b = b, a
        # The side is that of the two numbers, however they are asked for. Of one digit there are too few to divide.
        key = f"{a}{sign}{b}"
        held_out = words.is_held_out(key) and max(a, b) > 9
        prompt = _FORMS[sign].pick(rng, held_out, a=a, b=b)
        sum_of = Sum(a, sign, b)
        return Instance(key, prompt, str(sum_of.result), {"sum": sum_of, "held_out": held_out})

    def gold(self, instance: Instance, effort: Effort) -> Sequence[Message]:
        return (*think(instance.data["sum"].thoughts(effort)), final(instance.answer))

    def _number(self, rng: random.Random) -> int:
        return words.number_of_digits(rng, self.digits if self.exact else rng.randint(1, self.digits))


class Sum(NamedTuple):
    """a + b, or a - b with a >= b."""

    a: int
    sign: str
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b if self.sign == "+" else self.a - self.b

    def thoughts(self, effort: Effort) -> str:
        """The chain of thought of that effort; "" at low."""
        if effort is Effort.LOW:
            return ""
        steps = written_steps(self.a, self.b, self.sign)
        if effort is Effort.MEDIUM:
            return " ".join(steps)
        # "4+0+1=5": both digits stand at the same places in every step.
        digits = [str(int(step.rpartition("=")[2]) % 10) for step in steps]
        lines = [f"{self.a}: {''.join(step[0] for step in steps)}", f"{self.b}: {''.join(step[2] for step in steps)}"]
        lines += [f"{step}, {digit}" for step, digit in zip(steps, digits, strict=True)]
        leading = ["1"] if len(str(self.result)) > len(steps) else []
        return "\n".join([*lines, "".join(digits + leading), f"So {self.result}."])
