"""What a task is: instances made from a seed, what the model is told of one, and what its answer is worth.

One task serves reinforcement (`rl`), distillation (`distill`), supervised data (its gold transcripts) and evaluation.
The whole of a task of your own:

    # shouting.py
    from ossia.train.tasks import Instance, Task

    class Shout(Task):
        name = "shout"

        def instance(self, rng):
            word = "".join(rng.choices("abcdefgh", k=5))
            return Instance(key=word, prompt=f"Shout this word: {word}", answer=word.upper())

    ossia train rl --task shouting:Shout --model ...

What may be changed, each by overriding one name: `check` (how right an answer is), `score` (the whole reward), `tools`
(functions that the model may call; `python = True` for the python tool), `gold` (the transcript that supervised
training imitates), `efforts`, `system` and `instructions` (what the model is told of itself).
"""

from __future__ import annotations

import datetime
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

from ossia.errors import InputError
from ossia.harmony import (
    Channel,
    Conversation,
    DeveloperContent,
    Effort,
    Message,
    Role,
    SystemContent,
    ToolNamespace,
)
from ossia.harmony.grammar import TRAINED_NAMESPACES
from ossia.tools.base import Tool
from ossia.tools.registry import merged

Split = Literal["train", "held_out"]
SPLITS: tuple[Split, ...] = ("train", "held_out")

# An answer that keeps to the format, and is wrong: enough to learn the format from, too little to be content with.
VALID_REWARD = 0.1
_MAX_DRAWS = 10_000


@dataclass(frozen=True)
class Instance:
    """One exercise. ``key`` is what makes it this one and no other: it alone decides on which side of the split it is.

    ``prompt`` is a user's message as text, or messages. ``data`` is for the task's own use.
    """

    key: str
    prompt: str | Sequence[Message]
    answer: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def messages(self) -> tuple[Message, ...]:
        return (Message(Role.USER, self.prompt),) if isinstance(self.prompt, str) else tuple(self.prompt)


@dataclass(frozen=True)
class Transcript:
    """What was said behind the prompt: the assistant's messages and its tools' answers, in order.

    ``defects`` name what was malformed: those of the parser, ``no_answer``, ``unknown_tool`` and the like.
    """

    messages: tuple[Message, ...]
    defects: tuple[str, ...] = ()
    # Ended by a limit and not by the model.
    is_truncated: bool = False

    @cached_property
    def answer(self) -> str | None:
        """The text of the final message, if the transcript ends with one."""
        last = self.messages[-1] if self.messages else None
        is_final = last is not None and last.role is Role.ASSISTANT and last.channel == Channel.FINAL
        return last.text if last is not None and is_final and last.recipient is None else None

    @property
    def calls(self) -> tuple[Message, ...]:
        return tuple(one for one in self.messages if one.role is Role.ASSISTANT and one.recipient is not None)

    @property
    def reasoning(self) -> str:
        """The chain of thought, its messages joined by line ends."""
        thoughts = [one.text for one in self.messages if one.channel == Channel.ANALYSIS and one.recipient is None]
        return "\n".join(thoughts)

    @property
    def is_unfinished(self) -> bool:
        """Whether a limit ended what had kept to the format until there."""
        return self.is_truncated and not self.defects

    @property
    def is_malformed(self) -> bool:
        return bool(self.defects) or self.is_truncated or self.answer is None


class Reward(NamedTuple):
    """What a transcript is worth, from 0 to 1, and its parts by name.

    Parts are numbers from 0 to 1 that training reports as means; every task has ``exact``, ``valid`` and ``malformed``.
    """

    value: float
    parts: Mapping[str, float]


class Task:
    """Base of every task: give it a ``name`` and `instance`, and override what should be different.

    A task is made without arguments, or with those that ``--task-option name=value`` gives; it has no state that an
    instance could change.
    """

    name: ClassVar[str] = ""
    # How often each effort is asked for.
    efforts: ClassVar[Mapping[Effort, float]] = {Effort.LOW: 1.0, Effort.MEDIUM: 1.0, Effort.HIGH: 1.0}
    # Share of all instances that training never sees.
    held_out_share: ClassVar[float] = 0.1
    # What the developer message says, None for nothing.
    instructions: ClassVar[str | None] = None
    # Whether the model has the python tool; each transcript then has a sandbox of its own.
    python: ClassVar[bool] = False

    def instance(self, rng: random.Random) -> Instance:
        """One instance, from ``rng`` alone."""
        raise NotImplementedError

    def again(self, instance: Instance, rng: random.Random) -> Instance | None:
        """Another instance for the same conversation, of the same side: its tools and its developer's message are those
        of ``instance``. None where there is no such thing.
        """
        return None

    def is_held_out(self, instance: Instance) -> bool:
        """On which side of the split an instance is: a hash of its key says it, whatever the seed."""
        digest = hashlib.blake2b(f"{self.name}\n{instance.key}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") < self.held_out_share * 2**64

    def tools(self, instance: Instance) -> Sequence[Tool]:
        """Tools of one transcript, made anew for each; `ossia.tools.functions.FunctionTools` makes one of functions."""
        return ()

    def system(self, effort: Effort, tools: tuple[ToolNamespace, ...]) -> SystemContent:
        """The system message; ``tools`` are those that the model was trained to find there."""
        return SystemContent(effort=effort, tools=tools)

    def check(self, instance: Instance, answer: str) -> float:
        """How right a final answer is, from 0 to 1: whether it is the instance's, but for blanks around it."""
        return float(answer.strip() == instance.answer)

    def score(self, instance: Instance, transcript: Transcript) -> Reward:
        """0 for a malformed transcript, `VALID_REWARD` for a valid one, 1 for one that `check` finds right."""
        if transcript.is_malformed or transcript.answer is None:
            return Reward(0.0, {"exact": 0.0, "valid": 0.0, "malformed": 1.0})
        right = self.check(instance, transcript.answer)
        if not 0 <= right <= 1:
            raise InputError(f"the task {self.name}: check gave {right}; expected a number from 0 to 1")
        return Reward(
            VALID_REWARD + (1 - VALID_REWARD) * right, {"exact": float(right == 1), "valid": 1.0, "malformed": 0.0}
        )

    def gold(self, instance: Instance, effort: Effort) -> Sequence[Message]:
        """A transcript that is right, as supervised training imitates it; what tools answer stands in it too."""
        return (Message(Role.ASSISTANT, instance.answer, channel=Channel.FINAL),)


class Draw(NamedTuple):
    """One exercise as it is set: an instance of a task at an effort."""

    task: Task
    instance: Instance
    effort: Effort


class TaskMix:
    """Tasks with weights, from which draws are made by number: the same seed and number give the same draw."""

    def __init__(self, tasks: Mapping[Task, float], *, efforts: Mapping[Effort, float] | None = None) -> None:
        """``efforts`` stands in for the tasks' own weights. Raises InputError for weights that cannot be."""
        if not tasks or not all(weight > 0 for weight in tasks.values()):
            raise InputError("the tasks need at least one, each with a weight above 0", param="task")
        names = [task.name for task in tasks]
        if len(set(names)) < len(names):
            raise InputError(f"two tasks have one name: {', '.join(sorted(names))}; name each once", param="task")
        for given in (efforts, *(task.efforts for task in tasks)):
            if given is not None and not (given and all(w >= 0 for w in given.values()) and sum(given.values()) > 0):
                raise InputError("the weights of efforts need one above 0, and none below", param="efforts")
        self.tasks = dict(tasks)
        self._efforts = efforts

    def draw(self, split: Split, seed: int, number: int) -> Draw:
        """Draw ``number`` of a seed. Raises InputError if a task seems to have no instance on that side."""
        rng = _rng(f"draw {split} {seed} {number}")
        (task,) = rng.choices(list(self.tasks), list(self.tasks.values()))
        weights = self._efforts or task.efforts
        (effort,) = rng.choices(list(weights), list(weights.values()))
        return Draw(task, draw_instance(task, split, rng), effort)


def draw_instance(task: Task, split: Split, rng: random.Random) -> Instance:
    """The first instance on that side of the split. Raises InputError if none of many is."""
    for _ in range(_MAX_DRAWS):
        instance = task.instance(rng)
        if is_held_out(task, instance) == (split == "held_out"):
            return instance
    raise InputError(
        f"the task {task.name} gave {_MAX_DRAWS} instances that are not {split}; it needs more different keys, or a "
        "held_out_share between 0 and 1"
    )


def is_held_out(task: Task, instance: Instance) -> bool:
    """On which side of the split an instance is, for every seed the same."""
    return task.is_held_out(instance)


def conversation(draw: Draw, namespaces: Sequence[ToolNamespace]) -> Conversation:
    """What the model is told before it answers; ``namespaces`` are those of its tools."""
    trained = tuple(space for space in namespaces if space.name in TRAINED_NAMESPACES)
    others = tuple(space for space in namespaces if space.name not in TRAINED_NAMESPACES)
    system = draw.task.system(draw.effort, trained)
    if system.current_date is None:
        system = replace(system, current_date=_day_of(draw.instance))
    opening = [Message(Role.SYSTEM, system)]
    if draw.task.instructions is not None or others:
        content = DeveloperContent(instructions=draw.task.instructions, tools=others)
        opening.append(Message(Role.DEVELOPER, content))
    return Conversation((*opening, *draw.instance.messages))


def namespaces(task: Task, tools: Sequence[Tool]) -> tuple[ToolNamespace, ...]:
    """How the model is told of a transcript's tools, the python tool among them."""
    return (*merged(tools), *((ToolNamespace.python(),) if task.python else ()))


def gold_conversation(draw: Draw, beside: Sequence[ToolNamespace] = ()) -> Conversation:
    """The prompt and the gold transcript behind it: one row of supervised data. ``beside`` are tools that are there
    and not needed.
    """
    spaces = namespaces(draw.task, draw.task.tools(draw.instance))
    known = {space.name for space in spaces}
    spaces += tuple(space for space in beside if space.name not in known)
    prompt = conversation(draw, spaces)
    return Conversation((*prompt.messages, *draw.task.gold(draw.instance, draw.effort)))


def gold_conversation_of_turns(
    draw: Draw,
    num_turns: int,
    rng: random.Random,
    beside: Sequence[ToolNamespace] = (),
    others: Sequence[Draw] = (),
) -> Conversation:
    """A gold conversation with further exercises behind the first one, as far as its task has any (`Task.again`).

    ``others`` stand behind those, each told at the effort of the first; their tools have to be among ``beside``, and
    no developer says anything for them.
    """
    messages = list(gold_conversation(draw, beside).messages)
    for _ in range(num_turns - 1):
        instance = draw.task.again(draw.instance, rng)
        if instance is None:
            break
        messages += [one for one in instance.messages if one.role is not Role.DEVELOPER]
        messages += draw.task.gold(instance, draw.effort)
    for other in others:
        messages += [*other.instance.messages, *other.task.gold(other.instance, draw.effort)]
    return Conversation(tuple(messages))


def gold_conversations(mix: TaskMix, split: Split, seed: int, count: int) -> Iterator[Conversation]:
    """``count`` rows of supervised data."""
    for number in range(count):
        yield gold_conversation(mix.draw(split, seed, number))


def _day_of(instance: Instance) -> str:
    """A day, since the server always names one: any, and of an instance always the same."""
    day = datetime.date(2024, 7, 1) + datetime.timedelta(days=_rng(f"day of {instance.key}").randrange(2200))
    return day.isoformat()


def _rng(name: str) -> random.Random:
    # Seeding with text would depend on the interpreter's version of hashing it.
    return random.Random(int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest(), "little"))
