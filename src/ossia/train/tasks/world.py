"""A small invented world and its pages, which a model browses through the real browser tool.

A `World` is a handful of towns, people and goods that refer to each other. It is a back end of the browser: `search`
ranks its pages by the words they share with the query, `fetch` gives a page of a few lines.
"""

from __future__ import annotations

import random
import re
from typing import Any, NamedTuple

from ossia.errors import NotFoundError
from ossia.tools.web.backend import Scope
from ossia.tools.web.page import Hit, Page, domain_of, link
from ossia.train.tasks import words
from ossia.train.tasks.phrases import Phrases

_WORD = re.compile(r"[a-z0-9]+")


class Fact(NamedTuple):
    """One line of a page: what it tells, in a word and as a sentence, and the value in it that answers a question, with
    the words that belong to it ("a baker").
    """

    kind: str
    sentence: str
    value: str
    leads_to: str = ""
    """Name of the page that the value is the title of."""


class Entry(NamedTuple):
    """One page: a thing of the world with its facts."""

    kind: str
    name: str
    facts: tuple[Fact, ...]

    @property
    def url(self) -> str:
        return f"https://{self.kind}s.example/{self.name.lower().replace(' ', '-')}"


_ASK = "[Tell me|Find|Name|Look up] "
QUESTIONS = {
    "year": Phrases(
        "[When|In which year|What year] was {name} founded?",
        _ASK + "the year {name} was founded.",
    ),
    "river": Phrases(
        "[Which|What] river [is|runs] [at|through|near] {name}?",
        _ASK + "the river [of|at] {name}.",
    ),
    "population": Phrases(
        "How many people live in {name}?", "[What is|Tell me|Find|Name|Look up] the population of {name}[.|?]"
    ),
    "mayor": Phrases(
        "Who is [the|now] mayor of {name}?",
        "Who [leads|governs|runs] {name}?",
        _ASK + "the mayor of {name}.",
    ),
    "known": Phrases(
        "What is {name} known for?",
        "What [makes|made] {name} known?",
        "[Tell me|Find|Look up] what {name} is known for.",
    ),
    "birthplace": Phrases(
        "Where was {name} born?",
        "[In which town|In what town] was {name} born?",
        _ASK + "the birthplace of {name}.",
    ),
    "job": Phrases(
        "What [does|did] {name} do?",
        "What is the [job|work] of {name}?",
        _ASK + "the job of {name}.",
    ),
    "pet": Phrases("[Which|What] animal does {name} [keep|have]?", _ASK + "the animal of {name}."),
    "maker": Phrases(
        "Where is the {name} made?",
        "[Which|What] town makes the {name}?",
        _ASK + "the town that makes the {name}.",
    ),
    "price": Phrases(
        "[What|How much] does the {name} cost?", "[What is|Tell me|Find|Name|Look up] the price of the {name}[.|?]"
    ),
    "weight": Phrases("How heavy is the {name}?", "[What is|Tell me|Find|Look up] the weight of the {name}[.|?]"),
    "designer": Phrases(
        "Who [designed|drew|invented] the {name}?",
        "Who [is|was] the designer of the {name}?",
        _ASK + "the designer of the {name}.",
    ),
}


class World:
    """A back end of the browser over a few entries."""

    name = "world"

    def __init__(self, rng: random.Random, held_out: bool, num_towns: int = 2) -> None:
        towns = [words.place(rng, held_out) for _ in range(num_towns)]
        people = [words.person(rng, held_out) for _ in range(num_towns)]
        goods = [words.product(rng, held_out) for _ in range(num_towns)]
        self.entries: list[Entry] = []
        for i, town in enumerate(towns):
            self.entries.append(_town(rng, held_out, town, people[i]))
            self.entries.append(_person(rng, people[i], rng.choice(towns)))
            self.entries.append(_good(rng, goods[i], rng.choice(towns), rng.choice(people)))
        rng.shuffle(self.entries)

    def entry(self, name: str) -> Entry:
        return next(entry for entry in self.entries if entry.name == name)

    async def search(self, query: str, num_hits: int, scope: Scope) -> list[Hit]:
        wanted = set(_WORD.findall(query.lower()))

        def score(entry: Entry) -> float:
            title = set(_WORD.findall(entry.name.lower()))
            text = set(_WORD.findall(" ".join(fact.sentence for fact in entry.facts).lower()))
            return 10 * len(wanted & title) + len(wanted & text) / 100

        found = sorted((entry for entry in self.entries if score(entry) > 0), key=score, reverse=True)
        return [Hit(entry.url, entry.name, entry.facts[0].sentence) for entry in found[: min(num_hits, 3)]]

    async def fetch(self, url: str, scope: Scope, *, is_source: bool = False) -> Page:
        for entry in self.entries:
            if entry.url == url:
                return self._page(entry)
        raise NotFoundError(f"there is no page at {url}")

    def describe(self) -> dict[str, Any]:
        return {"backend": self.name, "pages": len(self.entries)}

    def close(self) -> None:
        pass

    def _page(self, entry: Entry) -> Page:
        text = f"\nURL: {entry.url}\n# {entry.name}\n\n" + "\n".join(self.lines(entry))
        links = tuple(self.entry(fact.leads_to).url for fact in entry.facts if fact.leads_to)
        return Page("page", entry.url, entry.name, text, links)

    def lines(self, entry: Entry) -> list[str]:
        """The facts of a page as it shows them, with numbered links."""
        lines: list[str] = []
        num_links = 0
        for fact in entry.facts:
            sentence = fact.sentence
            if fact.leads_to:
                target = self.entry(fact.leads_to).url
                domain = "" if domain_of(target) == domain_of(entry.url) else domain_of(target)
                sentence = sentence.replace(fact.leads_to, link(num_links, fact.leads_to, domain))
                num_links += 1
            lines.append(sentence)
        return lines


def _facts(rng: random.Random, *facts: Fact) -> tuple[Fact, ...]:
    chosen = list(facts)
    rng.shuffle(chosen)
    return tuple(chosen)


def _town(rng: random.Random, held_out: bool, name: str, mayor: str) -> Entry:
    year, people = str(rng.randrange(900, 1950)), str(rng.randrange(200, 99_000))
    river, good = words.place(rng, held_out), f"known for {rng.choice(words.ADJECTIVES)} {rng.choice(words.THINGS)}s"
    return Entry(
        "town",
        name,
        _facts(
            rng,
            Fact(
                "year",
                rng.choice(("The town was founded in {}.", "Founded in {}.", "Its first house is of {}.")).format(year),
                year,
            ),
            Fact(
                "river", rng.choice(("It lies on the river {}.", "The river {} runs through it.")).format(river), river
            ),
            Fact("population", rng.choice(("{} people live here.", "It has {} people.")).format(people), people),
            Fact("mayor", rng.choice(("The mayor is {}.", "Its mayor is {}.")).format(mayor), mayor, mayor),
            Fact("known", f"It is {good}.", good),
        ),
    )


def _person(rng: random.Random, name: str, town: str) -> Entry:
    job, pet = f"a {rng.choice(words.JOBS)}", f"a {rng.choice(words.ANIMALS)}"
    return Entry(
        "person",
        name,
        _facts(
            rng,
            Fact("birthplace", rng.choice(("Born in {}.", "The birthplace is {}.")).format(town), town, town),
            Fact("job", rng.choice(("Works as {}.", "By trade {}.")).format(job), job),
            Fact("pet", rng.choice(("Keeps {}.", "At home there is {}.")).format(pet), pet),
        ),
    )


def _good(rng: random.Random, name: str, town: str, designer: str) -> Entry:
    price, weight = f"{rng.randrange(3, 900)} coins", f"{rng.randrange(2, 900)} grams"
    return Entry(
        "good",
        name,
        _facts(
            rng,
            Fact("maker", rng.choice(("It is made in {}.", "The workshop is in {}.")).format(town), town, town),
            Fact("price", rng.choice(("It costs {}.", "The price is {}.")).format(price), price),
            Fact("weight", rng.choice(("It weighs {}.", "Weight: {}.")).format(weight), weight),
            Fact("designer", rng.choice(("Designed by {}.", "{} drew it.")).format(designer), designer, designer),
        ),
    )
