"""What the tasks of the embedded model share: two sides that have no exercise in common, nor a name.

An instance is drawn for one side from the start: its names belong to that side (`words.is_held_out`), as do the two
numbers of a sum, code, where there are enough of them the wordings of a request, and as a whole what has none of these.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

from ossia.harmony import Channel, Effort, Message, Role
from ossia.train.tasks.base import Instance, Task

_HELD_OUT_DRAWS = 0.25
# How often each effort is asked for where fewer are right without a thought.
MOSTLY_THINKING: Mapping[Effort, float] = {Effort.LOW: 1.0, Effort.MEDIUM: 2.0, Effort.HIGH: 2.0}


class InventedTask(Task):
    """Base of those tasks: override `draw` in place of `instance`."""

    def draw(self, rng: random.Random, held_out: bool) -> Instance:
        """One instance of the asked side, or of the other where the side follows from the numbers drawn."""
        raise NotImplementedError

    def instance(self, rng: random.Random) -> Instance:
        held_out = rng.random() < _HELD_OUT_DRAWS
        return _of_side(self.draw(rng, held_out), held_out)

    def again(self, instance: Instance, rng: random.Random) -> Instance | None:
        """A task whose developer says nothing draws anew; the others override this."""
        if not isinstance(instance.prompt, str):
            return None
        held_out = self.is_held_out(instance)
        while self.is_held_out(drawn := _of_side(self.draw(rng, held_out), held_out)) != held_out:
            pass
        return drawn

    def is_held_out(self, instance: Instance) -> bool:
        return bool(instance.data["held_out"])


def _of_side(drawn: Instance, held_out: bool) -> Instance:
    return Instance(drawn.key, drawn.prompt, drawn.answer, {"held_out": held_out, **drawn.data})


def think(text: str) -> list[Message]:
    """The chain of thought; no message where there is nothing to say."""
    return [Message(Role.ASSISTANT, text, channel=Channel.ANALYSIS)] if text else []


def final(text: str) -> Message:
    return Message(Role.ASSISTANT, text, channel=Channel.FINAL)


def call(recipient: str, text: str) -> Message:
    """A call as the model writes it: functions in the commentary, tools of its own in the chain of thought."""
    if recipient.startswith("functions."):
        channel, content_type = Channel.COMMENTARY, "<|constrain|>json"
    else:
        channel, content_type = Channel.ANALYSIS, "code"
    return Message(Role.ASSISTANT, text, channel=channel, recipient=recipient, content_type=content_type)


def result(of: Message, text: str) -> Message:
    """What a tool answers to a call, in the call's channel."""
    assert of.recipient is not None
    return Message(Role.TOOL, text, name=of.recipient, recipient="assistant", channel=of.channel)


def compact(value: object) -> str:
    """JSON without blanks, as the model writes it."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def same_json(text: str, expected: Mapping[str, Any]) -> bool:
    """Whether a text is a JSON object with exactly these members, in whatever order."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return False
    # 1 == 1.0 == True in Python; in JSON a number is no boolean.
    return isinstance(found, dict) and _typed(found) == _typed(dict(expected))


def _typed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _typed(member) for key, member in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_typed(member) for member in value]
    return (isinstance(value, bool), value)
