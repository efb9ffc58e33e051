"""A question of a benchmark, as it stands in its files and as it is put to a model."""

from __future__ import annotations

from typing import NamedTuple


class Message(NamedTuple):
    """One message of a conversation; of the role "tool" it is a page that the function read_page gave."""

    role: str
    text: str


class Criterion(NamedTuple):
    """What a reply may have, and what it is worth; points below zero are taken away."""

    text: str
    points: float


class Question(NamedTuple):
    """One question of a benchmark. Of ``choices`` the first is right where ``answer`` is empty."""

    key: str
    text: str = ""
    answer: str = ""
    choices: tuple[str, ...] = ()
    group: str = ""
    messages: tuple[Message, ...] = ()
    criteria: tuple[Criterion, ...] = ()


class Asked(NamedTuple):
    """A question as it is put to the model, and what its answer is measured with."""

    messages: tuple[Message, ...]
    answer: str
    criteria: tuple[Criterion, ...] = ()
