"""Expressions too long for the head, and the python tool to work them out: call, read, answer.

The reward asks for the right number alone; that the tool was called is reported as the part ``called``.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import ClassVar

from ossia.errors import ConfigError
from ossia.harmony import Channel, Effort, Message, Role, SystemContent, ToolNamespace
from ossia.train.tasks.base import Instance, Reward, Task, Transcript

_PHRASES = (
    "What is {}? Use python.",
    "Compute {} with python.",
    "Work out {}, and run code for it.",
    "I need the exact value of {}. Run it.",
)
_OPERATORS = ("+", "-", "*")


class Calculator(Task):
    name = "calculator"
    efforts: ClassVar[Mapping[Effort, float]] = {Effort.LOW: 1.0, Effort.MEDIUM: 1.0}
    python = True

    def __init__(self, terms: int = 3, digits: int = 4, short: bool = False) -> None:
        """``short`` tells the model of the tool in one line, for models with little room.

        Raises ConfigError for numbers that cannot be.
        """
        if not 2 <= terms <= 8 or not 1 <= digits <= 9:
            raise ConfigError(f"terms is {terms} and digits {digits}; expected 2 to 8 terms of 1 to 9 digits")
        self.terms, self.digits, self.short = terms, digits, short

    def instance(self, rng: random.Random) -> Instance:
        numbers = [rng.randrange(10 ** rng.randint(1, self.digits)) for _ in range(rng.randint(2, self.terms))]
        operators = [rng.choice(_OPERATORS) for _ in numbers[1:]]
        text = str(numbers[0])
        for operator, number in zip(operators, numbers[1:], strict=True):
            text += f" {operator} {number}"
        return Instance(text, rng.choice(_PHRASES).format(text), str(_value(numbers, operators)), {"expression": text})

    def system(self, effort: Effort, tools: tuple[ToolNamespace, ...]) -> SystemContent:
        if self.short:
            tools = tuple(ToolNamespace(space.name, "Runs Python code and shows what it prints.") for space in tools)
        return SystemContent(effort=effort, tools=tools)

    def score(self, instance: Instance, transcript: Transcript) -> Reward:
        reward = super().score(instance, transcript)
        called = any(call.recipient == "python" for call in transcript.calls)
        return reward._replace(parts={**reward.parts, "called": float(called)})

    def gold(self, instance: Instance, effort: Effort) -> Sequence[Message]:
        code = f"print({instance.data['expression']})"
        thought = "I run this." if effort is Effort.LOW else f"I let python work out {instance.data['expression']}."
        return (
            Message(Role.ASSISTANT, thought, channel=Channel.ANALYSIS),
            Message(Role.ASSISTANT, code, channel=Channel.ANALYSIS, recipient="python", content_type="code"),
            Message(Role.TOOL, instance.answer, channel=Channel.ANALYSIS, name="python", recipient="assistant"),
            Message(Role.ASSISTANT, instance.answer, channel=Channel.FINAL),
        )


def _value(numbers: Sequence[int], operators: Sequence[str]) -> int:
    """Products first, then from left to right."""
    total, sign, product = 0, 1, numbers[0]
    for operator, number in zip(operators, numbers[1:], strict=True):
        if operator == "*":
            product *= number
        else:
            total += sign * product
            sign, product = (1 if operator == "+" else -1), number
    return total + sign * product
