"""Questions about an invented world, answered from its pages with a citation, through the real browser tool.

A question of one hop asks for a fact of the thing it names; one of two hops for a fact of something that the first
page leads to ("Who is the mayor of the town that makes the Velkor 300?"). Right is an answer with the fact, and a
citation of the very line that says it.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from ossia.harmony import Effort, Message
from ossia.tools.base import Tool
from ossia.tools.browser import Browser
from ossia.train.tasks.base import Instance, Reward, Transcript
from ossia.train.tasks.invented import InventedTask, call, compact, final, result, think
from ossia.train.tasks.world import QUESTIONS, Entry, Fact, World

_LINE = re.compile(r"^L(\d+): (.*)$", re.MULTILINE)
_CITATION = re.compile("【(\\d+)†L(\\d+)(?:-L\\d+)?】")
_CURSOR = re.compile(r"^\[(\d+)\]")
_LINK = re.compile("【(\\d+)†([^†】]*)(?:†[^】]*)?】")

# A fact behind another: how the second question names the thing in the middle.
_MIDDLE = {
    "mayor": "the mayor of {name}",
    "born": "the town where {name} was born",
    "maker": "the town that makes the {name}",
    "designer": "the designer of the {name}",
}
_SENTENCES = {
    "founded": "{name} was founded in {value}",
    "river": "{name} lies on the river {value}",
    "population": "{value} people live in {name}",
    "mayor": "The mayor of {name} is {value}",
    "known": "{name} is known for {value}",
    "born": "{name} was born in {value}",
    "job": "{name} is a {value}",
    "pet": "{name} keeps a {value}",
    "maker": "The {name} is made in {value}",
    "price": "The {name} costs {value}",
    "weight": "The {name} weighs {value}",
    "designer": "The {name} was designed by {value}",
}


class _Quest(NamedTuple):
    """What is asked: facts in the order in which their pages are read, the last of which is the answer."""

    question: str
    hops: tuple[tuple[Entry, Fact], ...]


class Browsing(InventedTask):
    name = "browsing"

    def __init__(self, two_hops: float = 0.35, towns: int = 2) -> None:
        """``two_hops``: share of questions that need a second page; ``towns``: a third of the world's pages."""
        self.two_hops, self.towns = two_hops, towns

    def draw(self, rng: random.Random, held_out: bool) -> Instance:
        world = World(rng, held_out, self.towns)
        quest = self.quest(rng, world, held_out)
        entry, fact = quest.hops[-1]
        answer = _SENTENCES[fact.kind].format(name=entry.name, value=fact.value)
        return Instance(quest.question, quest.question, answer, {"world": world, "quest": quest})

    def again(self, instance: Instance, rng: random.Random) -> Instance | None:
        # Pages that were read are still there, and would have to be cited without being opened.
        return None

    def tools(self, instance: Instance) -> Sequence[Tool]:
        return (Browser(instance.data["world"]),)

    def check(self, instance: Instance, answer: str) -> float:
        _, fact = instance.data["quest"].hops[-1]
        return float(fact.value in answer)

    def score(self, instance: Instance, transcript: Transcript) -> Reward:
        reward = super().score(instance, transcript)
        _, fact = instance.data["quest"].hops[-1]
        cited = float(_is_cited(fact, transcript))
        right = reward.parts["exact"]
        value = reward.value if not right else reward.value * (0.5 + 0.5 * cited)
        return Reward(value, {**reward.parts, "found": right, "cited": cited, "exact": right * cited})

    def gold(self, instance: Instance, effort: Effort) -> Sequence[Message]:
        return asyncio.run(_gold(instance, effort))

    def quest(self, rng: random.Random, world: World, held_out: bool) -> _Quest:
        """A question about something of the world."""
        entry = rng.choice(world.entries)
        fact = rng.choice(entry.facts)
        if rng.random() >= self.two_hops:
            return _Quest(QUESTIONS[fact.kind].pick(rng, held_out, name=entry.name), ((entry, fact),))
        first = rng.choice([one for one in world.entries for f in one.facts if f.leads_to])
        link = rng.choice([f for f in first.facts if f.leads_to])
        second = world.entry(link.leads_to)
        fact = rng.choice(second.facts)
        middle = _MIDDLE[link.kind].format(name=first.name)
        return _Quest(QUESTIONS[fact.kind].pick(rng, held_out, name=middle), ((first, link), (second, fact)))


async def _gold(instance: Instance, effort: Effort) -> list[Message]:
    """Search for the first thing, open it, follow the link if there are two hops, answer with the line.

    Thoughts plan the facts that are needed, and quote the line of each page that has one.
    """
    browser = Browser(instance.data["world"])
    out: list[Message] = []

    def say(thought: str) -> None:
        out.extend(think(thought if effort is not Effort.LOW else ""))

    async def use(function: str, **arguments: object) -> str:
        asked = call(f"browser.{function}", compact(arguments))
        shown = (await browser.run(function, asked.text)).text
        out.extend((asked, result(asked, shown)))
        return shown

    hops = instance.data["quest"].hops
    say(_plan(instance.data["quest"]))
    shown = await use("search", query=hops[0][0].name)
    say("I open it.")
    shown = await use("open", id=_link_to(shown, hops[0][0].name))
    for (_, fact), (following, _) in pairwise(hops):
        say(f"{fact.kind}: {_line_of(shown, fact)[1]}")
        shown = await use("open", id=_link_to(shown, following.name))
    _, fact = hops[-1]
    cursor, (line, text) = _CURSOR.match(shown), _line_of(shown, fact)
    assert cursor is not None
    say(f"{fact.kind}: {text}")
    out.append(final(f"{instance.answer} 【{cursor[1]}†L{line}】."))
    await browser.close()
    return out


def _plan(quest: _Quest) -> str:
    """What to look for first, and the facts that lead to the answer."""
    return f"{quest.hops[0][0].name}: {', '.join(fact.kind for _, fact in quest.hops)}"


def _line_of(shown: str, fact: Fact) -> tuple[str, str]:
    """Number and whole text of the line that says a fact."""
    return next(
        (found[1], found[0])
        for found in _LINE.finditer(shown)
        if fact.value in _LINK.sub(r"\2", found[2]) and not found[2].startswith("#")
    )


def draw_facts(rng: random.Random) -> list[tuple[str, bool]]:
    """A question and the plan for it, or a page and the lines that have its facts; which parts are the answers."""
    task = Browsing(two_hops=0.6)
    world = World(rng, False, task.towns)
    if rng.random() < 0.6:
        quest = task.quest(rng, world, held_out=False)
        return [(f"{quest.question}\n", False), (f"{_plan(quest)}<|end|>", True)]
    entry = rng.choice(world.entries)
    lines = world.lines(entry)
    first = rng.randint(4, 6)
    numbered = {
        fact.kind: f"L{n}: {line}" for n, (fact, line) in enumerate(zip(entry.facts, lines, strict=True), first)
    }
    parts = [("\n".join(numbered.values()), False)]
    for kind, line in rng.sample(sorted(numbered.items()), len(numbered)):
        parts += [(f"\n{kind}:", False), (f" {line}<|end|>", True)]
    return parts


def _link_to(shown: str, name: str) -> int:
    return next(int(number) for number, text in _LINK.findall(shown) if text == name)


def _is_cited(fact: Fact, transcript: Transcript) -> bool:
    """Whether the answer has citations, and each is of a shown line that says the fact."""
    views = _views(transcript)
    lines = [
        views.get(int(cursor), {}).get(int(line), "") for cursor, line in _CITATION.findall(transcript.answer or "")
    ]
    return bool(lines) and all(fact.value in _LINK.sub(r"\2", line) for line in lines)


def _views(transcript: Transcript) -> dict[int, dict[int, str]]:
    """Lines of each view that the browser showed, by cursor and number."""
    views: dict[int, dict[int, str]] = {}
    for message in transcript.messages:
        if message.name and message.name.startswith("browser") and (cursor := _CURSOR.match(message.text)):
            views[int(cursor[1])] = {int(number): text for number, text in _LINE.findall(message.text)}
    return views
