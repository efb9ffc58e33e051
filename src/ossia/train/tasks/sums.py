"""Sums and differences for a small model, written out digit by digit; with little effort short ones at once.

             What is 4821 + 937?
    high     4821=a1b2c8d4
             937=A7B3C9D0
             a1A7:1+7+0=08p8
             b2B3:2+3+0=05q5
             c8C9:8+9+0=17r7
             d4D0:4+0+1=05s5
             s5:5
             r7:57
             q5:575
             p8:5758
    medium   the same; of numbers of one digit the step alone, without a letter for the result (a1A7:1+7+0=08)
    low      no thought: of numbers of one digit the result, of others that it takes more effort

Thoughts go from the last digit to the first. A step adds two digits and what the step before it carried; before the
result stands what is carried on, or for a difference what is borrowed. Whatever a step needs is found behind its
letter, so that nothing has to be counted: small letters for the first number, capitals for the second, p to u for the
result. The step itself looks the same everywhere, since 400 facts are enough to be learned once. Numbers are repeated
before they are turned round: then each digit stands at a distance from its copy that its letter tells. The result is
put together from its first digit on, so that the answer only repeats the last line.

Sources  digits from the last to the first: Lee et al., *Teaching Arithmetic to Small Transformers*, arXiv:2307.03381.
         Letters for places: Zhou et al., *What Algorithms can Transformers Learn?*, arXiv:2310.16028.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from ossia.errors import ConfigError
from ossia.harmony import Effort, Message
from ossia.train.tasks import words
from ossia.train.tasks.arithmetic import Step, steps_of
from ossia.train.tasks.base import Instance, draw_instance
from ossia.train.tasks.invented import InventedTask, final, think
from ossia.train.tasks.phrases import Phrases

# Of the first number's places, the second's and the result's.
_TOP, _BOTTOM, _RESULT = "abcdefghij", "ABCDEFGHIJ", "pqrstuvwxyz"
_ASK = "[What is|What's|How much is|Compute|Calculate|Work out|Give me|Find|Tell me|Please compute] "
_FORMS = {
    "+": Phrases(
        _ASK + "{a} + {b}[?|]",
        _ASK + "{a} plus {b}[?|]",
        "[Please add|Add|add|Now add] {a} [and|to] {b}[.|]",
        "[Find|Give|What is|Tell me] the sum of {a} and {b}[.|?]",
        "{a} + {b}[| =| = ?|?]",
        "{a} plus {b}[?|.| is what?| equals?]",
        "I have {a} [apples|coins|beans|books] and get {b} more. How many [do I have|are there]?",
        "[There are|We saw|I see] {a} [people|birds|cars|boats] and then {b} more [came|come]. How many in all?",
    ),
    "-": Phrases(
        _ASK + "{a} - {b}[?|]",
        _ASK + "{a} minus {b}[?|]",
        "[Please subtract|Subtract|subtract|Take|take|Now take] {b} from {a}[.|]",
        "[Find|Give|What is|Tell me] the difference of {a} and {b}[.|?]",
        "{a} - {b}[| =| = ?|?]",
        "{a} minus {b}[?|.| is what?| equals?]",
        "I have {a} [apples|coins|beans|books] and [give away|lose|sell] {b}. How many [do I have left|are left]?",
        "[There are|We saw|I see] {a} [people|birds|cars|boats] and then {b} [go|leave]. How many [stay|are left]?",
    ),
}


_NUM_FACTS = 3
# Digits of numbers whose result low effort says at once, and medium without putting it together. Of more, hardly any
# came out right; and what cannot be known at once only hides the other losses.
_MOST_AT_ONCE = 1
TAKES_EFFORT = "That takes more effort: medium or high."


class Sums(InventedTask):
    name = "sums"
    efforts: ClassVar[Mapping[Effort, float]] = {Effort.LOW: 1.0, Effort.MEDIUM: 4.0, Effort.HIGH: 7.0}

    def __init__(self, digits: int = 5, exact: bool = False) -> None:
        """``digits`` is the most that a number has; ``exact``: both numbers have that many.

        Raises ConfigError for a number of digits that cannot be.
        """
        if not 1 <= digits <= 10:
            raise ConfigError(f"digits is {digits}; expected 1 to 10", param="digits")
        self.digits, self.exact = digits, exact

    def draw(self, rng: random.Random, held_out: bool) -> Instance:
        a, b = self._numbers(rng)
        sign = "+" if rng.random() < 0.7 else "-"
        if sign == "-" and b > a:
            a, b = b, a
        # The side is that of the two numbers, however they are asked for and whichever comes first. Of one digit there
        # are too few to divide.
        key = f"{max(a, b)}{sign}{min(a, b)}"
        held_out = words.is_held_out(key) and max(a, b) > 9
        prompt = _FORMS[sign].pick(rng, held_out, a=a, b=b)
        sum_of = Sum(a, sign, b)
        return Instance(key, prompt, str(sum_of.result), {"sum": sum_of, "held_out": held_out})

    def gold(self, instance: Instance, effort: Effort) -> Sequence[Message]:
        sum_of: Sum = instance.data["sum"]
        is_known = effort is not Effort.LOW or sum_of.is_known_at_once
        return (*think(sum_of.thoughts(effort)), final(instance.answer if is_known else TAKES_EFFORT))

    def _numbers(self, rng: random.Random) -> list[int]:
        """More often long than short, and half of the time of one length."""
        if self.exact:
            sizes = [self.digits, self.digits]
        else:
            most = rng.choices(range(1, self.digits + 1), range(1, self.digits + 1))[0]
            sizes = [most, most if rng.random() < 0.5 else rng.randint(1, most)]
            rng.shuffle(sizes)
        return [words.number_of_digits(rng, size) for size in sizes]


class _Repetitive(Sums):
    """Numbers of two different digits at most: where one digit follows another in several places, what comes next is
    told only by more than the last one.
    """

    def _numbers(self, rng: random.Random) -> list[int]:
        return [
            words.number_made_of(rng, rng.choices("0123456789", k=2), rng.randint(2, self.digits)) for _ in range(2)
        ]


class Sum(NamedTuple):
    """a + b, or a - b with a >= b."""

    a: int
    sign: str
    b: int

    @property
    def result(self) -> int:
        return self.a + self.b if self.sign == "+" else self.a - self.b

    @property
    def is_known_at_once(self) -> bool:
        return len(str(max(self.a, self.b))) <= _MOST_AT_ONCE

    def thoughts(self, effort: Effort) -> str:
        """The chain of thought of that effort; "" at low."""
        if effort is Effort.LOW:
            return ""
        steps = steps_of(self.a, self.b, self.sign)
        lines = [
            f"{self.a}={''.join(f'{letter}{one.x}' for letter, one in zip(_TOP, steps, strict=False))}",
            f"{self.b}={''.join(f'{letter}{one.y}' for letter, one in zip(_BOTTOM, steps, strict=False))}",
        ]
        is_put_together = effort is Effort.HIGH or not self.is_known_at_once
        for top, bottom, result, step in zip(_TOP, _BOTTOM, _RESULT, steps, strict=False):
            fact = "".join(fact_of(step, self.sign))
            lines.append(f"{top}{step.x}{bottom}{step.y}:{fact}" + (f"{result}{step.digit}" if is_put_together else ""))
        if is_put_together:
            digits = [one.digit for one in steps] + [1] * steps[-1].carry
            places = range(len(digits))[::-1]
            lines += [f"{_RESULT[place]}{digits[place]}:{self._first(digits, place)}" for place in places]
        return "\n".join(lines)

    @staticmethod
    def _first(digits: Sequence[int], place: int) -> str:
        """Digits of the result, last first, from the first of it to ``place``, without zeros in front."""
        found = "".join(map(str, reversed(digits[place:]))).lstrip("0")
        return found if place or found else "0"


def fact_of(step: Step, sign: str) -> tuple[str, str]:
    """A step as it is written: what is asked, and the answer."""
    return f"{step.x}{sign}{step.y}{sign}{step.before}=", f"{step.carry}{step.digit}"


def draw_facts(rng: random.Random) -> list[tuple[str, bool]]:
    """Numbers of questions, read from the last digit on; steps, and a result that is put together from them; or a few
    steps alone. Which parts of the text are answers.
    """
    parts: list[tuple[str, bool]] = []
    task = rng.choice((Sums, _Repetitive))()
    kind = rng.random()
    if kind < 0.25:
        for _ in range(_NUM_FACTS):
            instance = draw_instance(task, "train", rng)
            read = "\n".join(instance.data["sum"].thoughts(Effort.MEDIUM).splitlines()[:2])
            before = "\n" if parts else ""
            parts += [(f"{before}{instance.prompt}\n", False), (f"{read}<|end|>", True)]
        return parts
    if kind < 0.6:
        instance = draw_instance(task, "train", rng)
        lines = instance.data["sum"].thoughts(Effort.HIGH).splitlines()
        read, worked_out = "\n".join(lines[:2]), "\n".join(lines[2:])
        asked = f"{instance.prompt}\n{read}\n"
        return [(asked, False), (f"{worked_out}<|end|>\n{instance.answer}<|return|>", True)]
    for _ in range(2 * _NUM_FACTS):
        sign = rng.choice("+-")
        asked, answer = fact_of(Step.of(rng.randrange(10), sign, rng.randrange(10), rng.randrange(2)), sign)
        parts += [("\n" if parts else "", False), (asked, False), (answer, True)]
    return parts
