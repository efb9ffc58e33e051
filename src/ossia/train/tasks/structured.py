"""Facts of a few sentences as JSON of a given schema: the right values under keys that were never seen together.

The records are of invented people, places, goods and events. The schema renames and reorders what it asks for and
leaves out some of it, so that the answer has to be read off the schema and not off the text.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ossia.harmony import DeveloperContent, Effort, Message, Role
from ossia.harmony.messages import ResponseFormat
from ossia.train.tasks import words
from ossia.train.tasks.base import Instance
from ossia.train.tasks.invented import MOSTLY_THINKING, InventedTask, compact, final, same_json, think
from ossia.train.tasks.phrases import Phrases

ASK = Phrases(
    "[Extract|Return|Give me|Write|List|Read] the [facts|data|fields|details][.|:| as JSON.| as JSON:]",
    "[Turn this into|Convert this to|Put this in] [JSON|the format|the schema][.|:]",
    "[Fill|Complete] the [schema|format|form] from [this|the text][.|:]",
)


class Structured(InventedTask):
    name = "structured"
    efforts = MOSTLY_THINKING

    def draw(self, rng: random.Random, held_out: bool) -> Instance:
        kind = rng.randrange(len(_KINDS))
        record = _KINDS[kind](rng, held_out)
        form = draw_form(rng, record, held_out)
        return self._instance(rng, kind, record, form, held_out)

    def again(self, instance: Instance, rng: random.Random) -> Instance | None:
        kind, form, held_out = (instance.data[name] for name in ("kind", "form", "held_out"))
        return self._instance(rng, kind, _KINDS[kind](rng, held_out), form, held_out)

    def _instance(self, rng: random.Random, kind: int, record: Record, form: Form, held_out: bool) -> Instance:
        ask = ASK.pick(rng, held_out)
        request = f"{record.text} {ask}" if rng.random() < 0.5 else f"{ask} {record.text}"
        prompt = (
            Message(Role.DEVELOPER, DeveloperContent(response_formats=(form.response_format,))),
            Message(Role.USER, request),
        )
        expected = form.filled(record)
        data = {"expected": expected, "kind": kind, "form": form, "held_out": held_out}
        return Instance(request, prompt, compact(expected), data)

    def check(self, instance: Instance, answer: str) -> float:
        return float(same_json(answer, instance.data["expected"]))

    def gold(self, instance: Instance, effort: Effort) -> Sequence[Message]:
        if effort is Effort.LOW:
            return (final(instance.answer),)
        return (*think(thoughts(instance.data["form"], instance.data["expected"])), final(instance.answer))


def thoughts(form: Form, expected: Mapping[str, Any]) -> str:
    """The chain of thought before an answer: each key with the next one as the schema lists them, and its member of
    the answer with the next key again, so that what comes next, here and in the answer, is found by copying on.

    A key that says nothing is looked up before: its property, and behind the description the value, as behind a key
    that says the same.
    """
    properties = form.response_format.schema["properties"]
    keys = list(properties)
    lines = []
    for key, following in zip(keys, (*keys[1:], ""), strict=True):
        is_first = key == keys[0]
        listed, goes_on = (f'","{following}', f',"{following}') if following else ('"],"', "}")
        if "description" in properties[key]:
            lines.append(f'{key}":{compact(properties[key])[:-1]}:{compact(expected[key])}')
        lines.append(f'{"[" if is_first else ""}"{key}{listed}')
        lines.append(f"{'{' if is_first else ''}{compact({key: expected[key]})[1:-1]}{goes_on}")
    return "\n".join(lines)


class Field(NamedTuple):
    """One fact: names that a schema may give it (the first describes it best), its JSON type, its value."""

    keys: tuple[str, ...]
    json_type: str
    value: Any


class Record(NamedTuple):
    """Sentences and the facts in them."""

    title: str
    text: str
    fields: tuple[Field, ...]


class Form(NamedTuple):
    """What is asked of a kind of record: its schema, and which field stands under which key."""

    response_format: ResponseFormat
    keys: dict[str, int]

    def filled(self, record: Record) -> dict[str, Any]:
        """The values of a record under the keys of the schema."""
        return {key: record.fields[index].value for key, index in self.keys.items()}


def draw_facts(rng: random.Random) -> list[tuple[str, bool]]:
    """All facts of a record without a schema, or a record by a schema thought through; which parts of the text are the
    answers.
    """
    record = rng.choice(_KINDS)(rng, False)
    if rng.random() < 0.4:
        parts = [(record.text, False)]
        for field in rng.sample(record.fields, len(record.fields)):
            value = field.value if isinstance(field.value, str) else compact(field.value)
            parts += [(f"\n{rng.choice(field.keys)}:", False), (f" {value}", True)]
        return parts
    form = draw_form(rng, record, held_out=False, described=0.3)
    values = form.filled(record)
    asked = f"{compact(form.response_format.schema)}\n{record.text}\n"
    return [(asked, False), (f"{thoughts(form, values)}\n{compact(values)}<|return|>", True)]


def draw_form(rng: random.Random, record: Record, held_out: bool, described: float = 0.1) -> Form:
    """A schema over some fields of the record in some order. ``described``: share of keys that say nothing."""
    properties: dict[str, Any] = {}
    keys: dict[str, int] = {}
    for index in rng.sample(range(len(record.fields)), rng.randint(2, len(record.fields))):
        field = record.fields[index]
        key = said = rng.choice(field.keys)
        found = {"type": field.json_type}
        if rng.random() < described:
            # A key that says nothing needs a description.
            key, found["description"] = words.invented_word(rng, held_out), said
        properties[key], keys[key] = found, index
    schema = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return Form(ResponseFormat(record.title, schema), keys)


def _about_person(rng: random.Random, held_out: bool) -> Record:
    name, age, job = words.person(rng, held_out), rng.randrange(18, 90), rng.choice(words.JOBS)
    town, pet = words.place(rng, held_out), rng.choice(words.ANIMALS)
    text = rng.choice(
        (
            f"{name} is a {job} from {town}, {age} years old, and keeps a {pet}.",
            f"{name}, {age}, lives in {town} with a {pet} and works as a {job}.",
            f"In {town} lives a {job} called {name}. At {age} there is still a {pet} in the house.",
            f"The {job} {name} of {town} is {age} and has a {pet}.",
        )
    )
    return Record(
        "person",
        text,
        (
            Field(("name", "person", "full_name", "who"), "string", name),
            Field(("age", "years", "age_years"), "integer", age),
            Field(("job", "work", "profession"), "string", job),
            Field(("town", "city", "home", "lives_in"), "string", town),
            Field(("pet", "animal"), "string", pet),
        ),
    )


def _about_order(rng: random.Random, held_out: bool) -> Record:
    buyer, thing = words.person(rng, held_out), words.product(rng, held_out)
    count, price, day = rng.randrange(2, 60), rng.randrange(3, 900), rng.choice(words.WEEKDAYS)
    color, paid = rng.choice(words.COLORS), rng.random() < 0.5
    paid_text = "It is paid." if paid else "It is not paid yet."
    text = rng.choice(
        (
            f"{buyer} ordered {count} {color} {thing} at {price} each for {day}. {paid_text}",
            f"Order for {day}: {count} pieces of {thing} in {color}, {price} each, for {buyer}. {paid_text}",
            f"On {day} we send {buyer} {count} {thing}, {color}, price {price}. {paid_text}",
        )
    )
    return Record(
        "order",
        text,
        (
            Field(("buyer", "customer", "name"), "string", buyer),
            Field(("product", "item", "article"), "string", thing),
            Field(("count", "pieces", "quantity"), "integer", count),
            Field(("price", "cost", "unit_price"), "integer", price),
            Field(("day", "weekday", "delivery"), "string", day),
            Field(("color",), "string", color),
            Field(("paid", "is_paid"), "boolean", paid),
        ),
    )


def _about_event(rng: random.Random, held_out: bool) -> Record:
    what = rng.choice(("concert", "market", "talk", "race", "play", "fair", "meeting"))
    town, month, day = words.place(rng, held_out), rng.choice(words.MONTHS), rng.randrange(1, 29)
    guests, host, hour = rng.randrange(10, 900), words.person(rng, held_out), rng.randrange(8, 23)
    text = rng.choice(
        (
            f"The {what} in {town} is on {day} {month} at {hour}. {host} hosts it, {guests} guests will come.",
            f"{host} holds a {what} in {town} on {day} {month}, {hour} o'clock, for {guests} guests.",
            f"{guests} guests are expected at the {what} of {host}: {town}, {day} {month}, {hour}.",
        )
    )
    return Record(
        "event",
        text,
        (
            Field(("event", "kind", "what"), "string", what),
            Field(("town", "place", "where"), "string", town),
            Field(("month",), "string", month),
            Field(("day", "day_of_month"), "integer", day),
            Field(("guests", "visitors"), "integer", guests),
            Field(("host", "person"), "string", host),
            Field(("hour", "time"), "integer", hour),
        ),
    )


def _about_thing(rng: random.Random, held_out: bool) -> Record:
    name, thing = words.product(rng, held_out), rng.choice(words.THINGS)
    material, color, weight = rng.choice(words.MATERIALS), rng.choice(words.COLORS), rng.randrange(2, 900)
    maker, year = words.place(rng, held_out), rng.randrange(1700, 2030)
    text = rng.choice(
        (
            f"The {name} is a {color} {thing} of {material}, {weight} grams, made in {maker} since {year}.",
            f"Since {year} they make the {name} in {maker}, a {thing} of {material}, {color}, of {weight} grams.",
            f"{name}: {thing}, {material}, {color}, {weight} grams, {maker}, {year}.",
        )
    )
    return Record(
        "thing",
        text,
        (
            Field(("name", "product", "title"), "string", name),
            Field(("kind", "thing", "type_of_thing"), "string", thing),
            Field(("material", "made_of"), "string", material),
            Field(("color",), "string", color),
            Field(("weight", "grams"), "integer", weight),
            Field(("town", "made_in", "origin"), "string", maker),
            Field(("year", "since"), "integer", year),
        ),
    )


_KINDS: tuple[Callable[[random.Random, bool], Record], ...] = (_about_person, _about_order, _about_event, _about_thing)
