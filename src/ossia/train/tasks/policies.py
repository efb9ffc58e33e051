"""Verdicts by a written policy, as gpt-oss-safeguard gives them: which rule a text breaks, if any.

A policy has two to four numbered rules over features of a message: what it is about, whether it names a price or a
person, whether it shouts or asks. A rule forbids a feature, or a feature unless another is there, or two together. Some
pairs of features never occur in one rule of the training side: they make the "unseen combinations" of a test.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from ossia.harmony import DeveloperContent, Effort, Message, Role
from ossia.train.tasks import words
from ossia.train.tasks.base import Instance
from ossia.train.tasks.invented import MOSTLY_THINKING, InventedTask, compact, final, same_json, think
from ossia.train.tasks.phrases import Phrases

TOPICS = {
    "weapons": ("knife", "sword", "bow", "spear", "dagger"),
    "medicine": ("pill", "syrup", "ointment", "tablet", "drops"),
    "gambling": ("bet", "dice", "lottery", "casino", "poker"),
    "travel": ("train", "ticket", "hotel", "harbor", "journey"),
    "pets": ("cat", "dog", "hamster", "parrot", "pony"),
    "money": ("loan", "bank", "coin", "credit", "debt"),
    "food": ("soup", "bread", "cheese", "cake", "salad"),
}

# Share of messages that have a mark.
_USUAL = 0.25
# Marks of a message beside its topic.
MARKS = ("price", "person", "place", "shouting", "question")

_PLAIN = Phrases(
    "[We|They|I] [sell|have|like|want|need|bought|found] a [new|good|small|large|fine|cheap] {thing}{extra}.",
    "[This|That|The|My] {thing} is [new|good|small|large|fine|cheap]{extra}.",
    "[Here is|Look at|Come and see] [my|our|the] [new|good|fine] {thing}{extra}.",
)
_QUESTION = Phrases(
    "[Do you|Does anyone|Who would] [sell|have|want|like|need] a [new|good|small|large] {thing}{extra}?",
    "[Where is|What about] [my|our|the|your] {thing}{extra}?",
)


_HEAD = "Judge the message by the policy. Answer in JSON: violation (0 or 1) and the first rule that is broken."


class Policies(InventedTask):
    """Verdicts on messages; ``combinations``: held-out instances have a rule that was never seen as a whole."""

    name = "policies"
    efforts = MOSTLY_THINKING

    def __init__(self, combinations: bool = True) -> None:
        self.combinations = combinations

    def draw(self, rng: random.Random, held_out: bool) -> Instance:
        rules = draw_rules(rng, rng.randint(2, 4))
        if held_out and self.combinations:
            rules[rng.randrange(len(rules))] = draw_rule(rng, True)
        return self._instance(rng, tuple(rules), held_out)

    def again(self, instance: Instance, rng: random.Random) -> Instance | None:
        return self._instance(rng, instance.data["rules"], instance.data["held_out"])

    def _instance(self, rng: random.Random, rules: Sequence[Rule], held_out: bool) -> Instance:
        """An exercise of that side. Where a rule does not tell, all of its words do: a message may have no name."""
        while True:
            drawn = self._draw_instance(rng, rules, held_out)
            if (held_out and self.combinations) or words.is_held_out(drawn.key) == held_out:
                return drawn

    def _draw_instance(self, rng: random.Random, rules: Sequence[Rule], held_out: bool) -> Instance:
        # Half of the messages break a rule, as far as a few tries can tell.
        breaks = rng.random() < 0.5
        for _ in range(20):
            text = draw_text(rng, rng.choice(rules) if breaks else None, held_out)
            verdict = verdict_on(text, rules)
            if bool(verdict["violation"]) == breaks:
                break
        policy = "\n".join([_HEAD, *(f"R{number}: {rule.wording()}" for number, rule in enumerate(rules, 1))])
        prompt = (Message(Role.DEVELOPER, DeveloperContent(policy)), Message(Role.USER, text.text))
        data = {"rules": rules, "text": text, "verdict": verdict, "held_out": held_out}
        return Instance(f"{policy}\n{text.text}", prompt, compact(verdict), data)

    def check(self, instance: Instance, answer: str) -> float:
        return float(same_json(answer, instance.data["verdict"]))

    def gold(self, instance: Instance, effort: Effort) -> Sequence[Message]:
        if effort is Effort.LOW:
            return (final(instance.answer),)
        text, rules = instance.data["text"], instance.data["rules"]
        return (*think(thoughts(text, rules)), final(instance.answer))


def thoughts(text: Text, rules: Sequence[Rule]) -> str:
    """What is true of a message, and what each rule says to it, up to the first that is broken.

    A period stands behind the last rule, where the policy ends; it is missing where an earlier one is broken.
    """
    lines = [f"The message: {text.summary}"]
    for number, rule in enumerate(rules, 1):
        lines.append(f"R{number}: {rule.wording()}{'.' if number == len(rules) else ';'} {rule.finding(text)}")
        if rule.is_broken_by(text):
            break
    return "\n".join(lines)


def verdict_on(text: Text, rules: Sequence[Rule]) -> dict[str, Any]:
    """The answer: whether a rule is broken, and the first one that is."""
    broken = [number for number, rule in enumerate(rules, 1) if rule.is_broken_by(text)]
    return {"violation": 1, "rule": f"R{broken[0]}"} if broken else {"violation": 0, "rule": None}


class Text(NamedTuple):
    """A message and what is true of it."""

    text: str
    thing: str
    """The word that says the topic, as the message has it."""
    topic: str
    marks: frozenset[str]

    @property
    def summary(self) -> str:
        """What the message is about, and of each mark whether it is there."""
        found = [f"{self.topic}+", *(f"{mark}{'+' if mark in self.marks else '-'}" for mark in MARKS)]
        return f"{self.thing}, {' '.join(found)}"

    @property
    def features(self) -> frozenset[str]:
        return self.marks | {self.topic}


class Rule(NamedTuple):
    """Breaks if the topic matches (or None: any topic), all of ``marks`` are there and none of ``unless``."""

    topic: str | None
    mark: str | None
    unless: str | None

    def is_broken_by(self, text: Text) -> bool:
        return (
            (self.topic is None or self.topic == text.topic)
            and (self.mark is None or self.mark in text.marks)
            and (self.unless is None or self.unless not in text.marks)
        )

    def wording(self) -> str:
        return " ".join(name for name, _ in self._parts())

    def finding(self, text: Text) -> str:
        """Why a text breaks the rule or not: each part of the rule, and whether it is there."""
        found = (f"{name}{'+' if part in text.features else '-'}" for name, part in self._parts())
        return f"{' '.join(found)}, {self.verdict(text)}"

    def verdict(self, text: Text) -> str:
        return "broken" if self.is_broken_by(text) else "kept"

    def _parts(self) -> list[tuple[str, str]]:
        """How the rule names each of its parts, and the part."""
        with_mark = f"with {self.mark}" if self.topic else self.mark
        named = ((self.topic, self.topic), (with_mark, self.mark), (f"unless {self.unless}", self.unless))
        return [(name, part) for name, part in named if name and part]

    @property
    def is_held_out(self) -> bool:
        """Whether this combination of a rule's parts is kept for tests. Rules of one part are all trained."""
        parts = [part for part in self if part]
        return len(parts) > 1 and words.is_held_out(" ".join(str(part) for part in self))


def draw_rule(rng: random.Random, held_out: bool) -> Rule:
    while True:
        kind = rng.randrange(4)
        topic = rng.choice(list(TOPICS)) if kind != 1 else None
        mark = rng.choice(MARKS) if kind in (1, 2) else None
        unless = rng.choice(MARKS) if kind == 3 else None
        rule = Rule(topic, mark, unless)
        if rule.is_held_out == held_out:
            return rule


def draw_rules(rng: random.Random, count: int) -> list[Rule]:
    """That many different rules of the training side."""
    rules: list[Rule] = []
    while len(rules) < count:
        rule = draw_rule(rng, False)
        if rule not in rules:
            rules.append(rule)
    return rules


def draw_text(rng: random.Random, rule: Rule | None, held_out: bool, shouting: float = _USUAL) -> Text:
    """A message; of the rule's topic and with its mark, if one is given. ``shouting``: share of those in capitals."""
    topic = rule.topic if rule and rule.topic else rng.choice(list(TOPICS))
    marks = {mark for mark in MARKS if rng.random() < (shouting if mark == "shouting" else _USUAL)}
    if rule and rule.mark:
        marks.add(rule.mark)
    if rule and rule.unless and rng.random() < 0.5:
        marks.symmetric_difference_update({rule.unless})
    extra = ""
    if "place" in marks:
        extra += f" in {words.place(rng, held_out)}"
    if "person" in marks:
        extra += f" for {words.first_name(rng, held_out)}"
    if "price" in marks:
        extra += f" at {rng.randrange(2, 900)} coins"
    forms = _QUESTION if "question" in marks else _PLAIN
    thing = rng.choice(TOPICS[topic])
    text = forms.pick(rng, thing=thing, extra=extra)
    if "shouting" in marks:
        text, thing = text.upper(), thing.upper()
    return Text(text, thing, topic, frozenset(marks))


def draw_facts(rng: random.Random) -> list[tuple[str, bool]]:
    """What is true of messages, or what rules say to them, and no more; which parts of the text are the answers."""
    if rng.random() < 0.5:
        parts = []
        for before in ("", "\n"):
            text = draw_text(rng, None, held_out=False, shouting=0.4)
            parts += [(f"{before}{text.text}\nThe message:", False), (f" {text.summary}", True)]
        return parts
    rules = draw_rules(rng, rng.randint(1, 4))
    policy = "\n".join(f"R{number}: {rule.wording()}" for number, rule in enumerate(rules, 1))
    parts = [(policy, False)]
    for _ in range(2):
        text = draw_text(rng, rng.choice(rules), held_out=False)
        findings = thoughts(text, rules)
        given, sought = findings.split("\n", 1)
        parts += [(f"<|end|>\n{given}\n", False), (f"{sought}\n{compact(verdict_on(text, rules))}", True)]
    return [*parts, ("<|return|>", True)]
