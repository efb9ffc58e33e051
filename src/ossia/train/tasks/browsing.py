"""Questions about an invented world, answered from its pages with a citation, through the real browser tool.

A question of one hop asks for a fact of the thing it names; one of two hops for a fact of something that the first
page leads to ("Who is the mayor of the town that makes the Velkor 300?"). Right is an answer with the fact, and a
citation of the very line that says it.
"""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

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
    "birthplace": "the town where {name} was born",
    "maker": "the town that makes the {name}",
    "designer": "the designer of the {name}",
}
# The bracket stays open, so that this is the link's text whether it names a domain or not.
_OPEN = 'Open 【{number}†{name}, "id":{number}'


class _Quest(NamedTuple):
    """What is asked: facts in the order in which their pages are read, the last of which is the answer."""

    question: str
    hops: tuple[tuple[Entry, Fact], ...]


class Browsing(InventedTask):
    name = "browsing"
    # Without a thought hardly any is right.
    efforts: ClassVar[Mapping[Effort, float]] = {Effort.LOW: 1.0, Effort.MEDIUM: 3.0, Effort.HIGH: 3.0}

    def __init__(self, two_hops: float = 0.35, towns: int = 2) -> None:
        """``two_hops``: share of questions that need a second page; ``towns``: a third of the world's pages."""
        self.two_hops, self.towns = two_hops, towns

    def draw(self, rng: random.Random, held_out: bool) -> Instance:
        world = World(rng, held_out, self.towns)
        quest = self.quest(rng, world, held_out)
        _, fact = quest.hops[-1]
        return Instance(quest.question, quest.question, f"It is {fact.value}", {"world": world, "quest": quest})

    def again(self, instance: Instance, rng: random.Random) -> Instance | None:
        # Pages that were read are still there, and would have to be cited without being opened.
        return None

    def tools(self, instance: Instance) -> Sequence[Tool]:
        return (Browser(instance.data["world"]),)

    def check(self, instance: Instance, answer: str) -> float:
        _, fact = instance.data["quest"].hops[-1]
        return float(_says(answer, fact))

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

    Thoughts plan the facts that are needed, read the lines of each page up to the one that has such a fact, and repeat
    the link that is followed and its number. Behind the kind of fact that is sought stand the view's number, and a sign
    that the way goes on or a period: whether to read on is found by copying. So is the citation, which stands behind
    the last line that is read.
    """
    browser = Browser(instance.data["world"])
    quest: _Quest = instance.data["quest"]
    out: list[Message] = []

    def say(thought: str) -> None:
        out.extend(think(thought if effort is not Effort.LOW else ""))

    async def use(function: str, **arguments: object) -> str:
        asked = call(f"browser.{function}", compact(arguments))
        shown = (await browser.run(function, asked.text)).text
        out.extend((asked, result(asked, shown)))
        return shown

    say(_plan(quest, quest.hops[0][0]))
    shown = await use("search", query=quest.hops[0][0].name)
    read = ""
    for hop, (entry, _) in enumerate(quest.hops, 1):
        number = _link_to(shown, entry.name)
        opened = _OPEN.format(number=number, name=entry.name)
        say(f"{read}\n{opened}" if read else opened)
        shown = await use("open", id=number)
        # The facts are a page's last lines.
        read = _read(quest, hop, [found[0] for found in _LINE.finditer(shown)][-len(entry.facts) :])
    say(read)
    out.append(final(f"{instance.answer} {_citation(read)}."))
    await browser.close()
    return out


def _plan(quest: _Quest, entry: Entry) -> str:
    """A page on the way to the answer, and the facts on that way."""
    return f"Find {entry.name}: {' '.join(_wanted(quest, hop) for hop in range(1, len(quest.hops) + 1))}"


def _wanted(quest: _Quest, hop: int) -> str:
    """The kind of fact that is sought, the number of the view that shows it, and whether the way goes on."""
    return f"{quest.hops[hop - 1][1].kind}{hop}{'>' if hop < len(quest.hops) else '.'}"


def _read(quest: _Quest, hop: int, lines: Sequence[str]) -> str:
    """The plan with the name of a page, and its lines up to the one that has what is sought; behind each what it is
    about, and behind that of the last one its signs in the plan, and its citation where it is the answer.
    """
    entry, wanted = quest.hops[hop - 1]
    kinds = [fact.kind for fact in entry.facts[: entry.facts.index(wanted)]]
    kinds.append(_wanted(quest, hop))
    read = [f"{line} {kind}" for line, kind in zip(lines[: len(kinds)], kinds, strict=True)]
    if hop == len(quest.hops):
        # The first page that is opened is view 1: view 0 has what was searched.
        read[-1] += f" 【{hop}†{read[-1].partition(':')[0]}】"
    return "\n".join([_plan(quest, entry), *read])


def _citation(read: str) -> str:
    """The citation at the end of what was read of the last page."""
    return read[read.rindex("【") :]


def draw_facts(rng: random.Random) -> list[tuple[str, bool]]:
    """A question and the plan for it, or a page and what is read of it; which parts are the answers."""
    task = Browsing(two_hops=0.6)
    world = World(rng, False, task.towns)
    quest = task.quest(rng, world, held_out=False)
    asked = [(f"{quest.question}\n", False), (f"{_plan(quest, quest.hops[0][0])}<|end|>", True)]
    if rng.random() < 0.4:
        return asked
    hop = rng.randint(1, len(quest.hops))
    entry, fact = quest.hops[hop - 1]
    lines = [f"L{number}: {line}" for number, line in enumerate(world.lines(entry), 4)]
    page = "\n".join(lines)
    read = _read(quest, hop, lines)
    if hop == len(quest.hops):
        follows = f"<|end|>\nIt is {fact.value} {_citation(read)}."
    else:
        follows = f"\n{_OPEN.format(number=_link_to(page, fact.leads_to), name=fact.leads_to)}<|end|>"
    return [*asked, (f"\n[{hop}] {entry.name}\n{page}\n", False), (read + follows, True)]


def _says(text: str, fact: Fact) -> bool:
    """Whether a text has the value, not as a part of a longer number or word."""
    return re.search(rf"(?<!\w){re.escape(fact.value)}(?!\w)", text) is not None


def _link_to(shown: str, name: str) -> int:
    return next(int(number) for number, text in _LINK.findall(shown) if text == name)


def _is_cited(fact: Fact, transcript: Transcript) -> bool:
    """Whether the answer has citations, and each is of a shown line that says the fact."""
    views = _views(transcript)
    lines = [
        views.get(int(cursor), {}).get(int(line), "") for cursor, line in _CITATION.findall(transcript.answer or "")
    ]
    return bool(lines) and all(_says(_LINK.sub(r"\2", line), fact) for line in lines)


def _views(transcript: Transcript) -> dict[int, dict[int, str]]:
    """Lines of each view that the browser showed, by cursor and number."""
    views: dict[int, dict[int, str]] = {}
    for message in transcript.messages:
        if message.name and message.name.startswith("browser") and (cursor := _CURSOR.match(message.text)):
            views[int(cursor[1])] = {int(number): text for number, text in _LINE.findall(message.text)}
    return views
