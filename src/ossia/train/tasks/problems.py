"""Questions whose answer is computed in the python tool: the model writes the expression and reads the result.

What is learned is copying numbers and text into code, and an output into an answer; the expression's value is never
computed by the model. Everything runs in the real sandbox in reinforcement and evaluation; a gold transcript shows the
value as Python displays it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

from ossia.harmony import Effort, Message
from ossia.train.tasks import words
from ossia.train.tasks.base import Instance, Reward, Transcript
from ossia.train.tasks.invented import InventedTask, call, final, result, think
from ossia.train.tasks.phrases import Phrases


class PythonProblems(InventedTask):
    name = "python"
    efforts: ClassVar[Mapping[Effort, float]] = {Effort.LOW: 1.0, Effort.MEDIUM: 1.0, Effort.HIGH: 1.0}
    python = True

    def draw(self, rng: random.Random, held_out: bool) -> Instance:
        problem = draw(rng, held_out)
        return Instance(problem.code, problem.question, problem.value, {"code": problem.code})

    def check(self, instance: Instance, answer: str) -> float:
        return float(answer.strip().strip("'\"") == instance.answer.strip("'"))

    def score(self, instance: Instance, transcript: Transcript) -> Reward:
        reward = super().score(instance, transcript)
        called = any(one.recipient == "python" for one in transcript.calls)
        return reward._replace(parts={**reward.parts, "called": float(called)})

    def gold(self, instance: Instance, effort: Effort) -> Sequence[Message]:
        thought = {Effort.LOW: "", Effort.MEDIUM: "I run this.", Effort.HIGH: "I let python work this out."}[effort]
        asked = call("python", instance.data["code"])
        return (*think(thought), asked, result(asked, instance.answer), final(instance.answer.strip("'")))


class Problem(NamedTuple):
    """A question, the code that answers it, and the value as Python shows it."""

    question: str
    code: str
    value: str


_ASK = "[What is|Compute|Calculate|Work out|Find|Give me|Tell me|Use python to find] "

PRODUCT = Phrases(
    _ASK + "{a} [times|x|*] {b}[.|?|]",
    "[Multiply|Please multiply] {a} by {b}.",
    "[Find|Give|What is] the product of {a} and {b}[.|?]",
)
QUOTIENT = Phrases(_ASK + "the [whole |integer ]quotient of {a} and {b}[.|?|]")
REMAINDER = Phrases(_ASK + "the remainder of {a} [by|divided by] {b}[.|?|]")
POWER = Phrases(_ASK + "{a} to the power [of |]{b}[.|?|]", _ASK + "{a} [^|**] {b}[.|?|]")
TOTAL = Phrases(_ASK + "the [sum|total] of {list}[.|?|]", "[Add|Sum|Total] up {list}.")
MAXIMUM = Phrases(_ASK + "the [largest|biggest|highest|greatest] of {list}[.|?|]")
MINIMUM = Phrases(_ASK + "the [smallest|lowest|least] of {list}[.|?|]")
SORTED = Phrases("[Sort|Order|Arrange] {list}[.|, please.| in order.]", "[Put|Bring] {list} in order.")
LENGTH = Phrases(
    "How many letters [has|are in] {word}?",
    "[Count|Give|Find] the letters [of|in] {word}.",
    _ASK + "the length of {word}[.|?|]",
)
REVERSED = Phrases("[Spell|Write|Say] {word} backwards.", "[Reverse|Turn round] [the word |]{word}.")
COUNT = Phrases("How [many times|often] is {letter} in {word}?", "[Count|Find|Give] the letter {letter} in {word}.")
DIVISOR = Phrases(_ASK + "the [greatest common divisor|gcd] of {a} and {b}[.|?|]")
FACTORIAL = Phrases(_ASK + "the factorial of {a}[.|?|]", _ASK + "{a}![.|?|]")


_NUM_FACTS = 3


def draw(rng: random.Random, held_out: bool) -> Problem:
    """One problem of some kind, whose code belongs to that side, however it is asked for."""
    return _of_side(held_out, lambda: rng.choice(_KINDS)(rng, held_out))


def _of_side(held_out: bool, make: Callable[[], Problem]) -> Problem:
    while words.is_held_out((problem := make()).code) != held_out:
        pass
    return problem


def draw_facts(rng: random.Random) -> list[tuple[str, bool]]:
    """Questions and their code, values and answers, half of them of numbers and letters that are easily taken for each
    other; which parts of the text are the answers.
    """
    parts: list[tuple[str, bool]] = []
    for _ in range(_NUM_FACTS):
        is_any = rng.random() < 0.5
        problem = draw(rng, held_out=False) if is_any else _of_side(False, lambda: _easily_confused(rng))
        before, said = "\n" if parts else "", problem.value.strip("'")
        parts += [(f"{before}{problem.question}\n", False), (f"{problem.code}<|call|>", True)]
        parts += [(f"\n{problem.value}\n", False), (f"{said}<|return|>", True)]
    return parts


def _easily_confused(rng: random.Random) -> Problem:
    """A list or a product of numbers that have two different digits at most, all together; a power, which is long; or a
    word turned round, whose pieces are none that words are made of.
    """
    kind = rng.random()
    if kind < 0.2:
        word = words.invented_word(rng, False)
        forms, code, value = _turned_round(word)
        return Problem(forms.pick(rng, word=word), code, value)
    digits = rng.choices("0123456789", k=2)
    if kind < 0.65:
        return _problem_of_list(
            rng, False, [words.number_made_of(rng, digits, rng.randint(1, 4)) for _ in range(rng.randint(3, 6))]
        )
    if kind < 0.75:
        return _power(rng, held_out=False)
    a, b = (words.number_made_of(rng, digits, rng.randint(2, 6)) for _ in range(2))
    return Problem(PRODUCT.pick(rng, a=a, b=b), f"{a} * {b}", str(a * b))


def _two(rng: random.Random) -> tuple[int, int]:
    return words.number_of_digits(rng, rng.randint(2, 6)), words.number_of_digits(rng, rng.randint(2, 5))


def _product(rng: random.Random, held_out: bool) -> Problem:
    a, b = _two(rng)
    return Problem(PRODUCT.pick(rng, held_out, a=a, b=b), f"{a} * {b}", str(a * b))


def _quotient(rng: random.Random, held_out: bool) -> Problem:
    a, b = _two(rng)
    return Problem(QUOTIENT.pick(rng, held_out, a=a, b=b), f"{a} // {b}", str(a // b))


def _remainder(rng: random.Random, held_out: bool) -> Problem:
    a, b = _two(rng)
    return Problem(REMAINDER.pick(rng, held_out, a=a, b=b), f"{a} % {b}", str(a % b))


def _power(rng: random.Random, held_out: bool) -> Problem:
    a, b = rng.randint(2, 99), rng.randint(2, 6)
    return Problem(POWER.pick(rng, held_out, a=a, b=b), f"{a} ** {b}", str(a**b))


def _of_list(rng: random.Random, held_out: bool) -> Problem:
    return _problem_of_list(
        rng, held_out, [words.number_of_digits(rng, rng.randint(1, 4)) for _ in range(rng.randint(3, 6))]
    )


def _problem_of_list(rng: random.Random, held_out: bool, numbers: list[int]) -> Problem:
    written = ", ".join(map(str, numbers[:-1])) + rng.choice((" and ", ", ")) + str(numbers[-1])
    forms, function = rng.choice(((TOTAL, "sum"), (MAXIMUM, "max"), (MINIMUM, "min"), (SORTED, "sorted")))
    functions: dict[str, Callable[[list[int]], object]] = {"sum": sum, "max": max, "min": min, "sorted": sorted}
    value = functions[function](numbers)
    return Problem(forms.pick(rng, held_out, list=written), f"{function}([{', '.join(map(str, numbers))}])", str(value))


def _of_word(rng: random.Random, held_out: bool) -> Problem:
    word = words.invented_word(rng, held_out)
    letter = rng.choice(word)
    forms, code, value = rng.choice(
        (
            (LENGTH, f"len('{word}')", str(len(word))),
            _turned_round(word),
            (COUNT, f"'{word}'.count('{letter}')", str(word.count(letter))),
        )
    )
    return Problem(forms.pick(rng, held_out, word=word, letter=letter), code, value)


def _turned_round(word: str) -> tuple[Phrases, str, str]:
    """How it is asked for, the code and the value."""
    return REVERSED, f"'{word}'[::-1]", repr(word[::-1])


def _divisor(rng: random.Random, held_out: bool) -> Problem:
    a, b = _two(rng)
    return Problem(DIVISOR.pick(rng, held_out, a=a, b=b), f"import math\nmath.gcd({a}, {b})", str(math.gcd(a, b)))


def _factorial(rng: random.Random, held_out: bool) -> Problem:
    a = rng.randint(3, 18)
    return Problem(FACTORIAL.pick(rng, held_out, a=a), f"import math\nmath.factorial({a})", str(math.factorial(a)))


_KINDS: tuple[Callable[[random.Random, bool], Problem], ...] = (
    _product,
    _product,
    _quotient,
    _remainder,
    _power,
    _of_list,
    _of_list,
    _of_word,
    _of_word,
    _divisor,
    _factorial,
)
