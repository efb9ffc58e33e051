"""Calls of functions that were never seen: invented names, invented parameters, values to be copied from the request.

A request names one of up to four declared functions by what it does, and gives its values in another order or another
wording than the declaration. The call gives them in the order of the request, which is as good as any in JSON. One
request in eight fits none of them (in training one in four), and some calls fail; the right answer then is to say so.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ossia.harmony import Effort, Message, ToolNamespace
from ossia.harmony.messages import ToolDescription
from ossia.harmony.typescript import typescript
from ossia.tools.base import Tool, ToolOutput
from ossia.train.tasks import words
from ossia.train.tasks.base import Instance, Reward, Transcript
from ossia.train.tasks.invented import MOSTLY_THINKING, InventedTask, call, compact, final, result, same_json, think
from ossia.train.tasks.phrases import Phrases

OPENING = Phrases(
    "[Please |Can you |Could you |Now |I want to |I need to |Help me |Let us |Would you |I would like to |]"
    "{request}[.|| now.| today.|, please.|!]"
)
_FITS, _DIFFERS, _NONE = "+", "-", "No function fits."
NONE_FITS = "None of my functions can do that."
_NONE_FITS_SHARE = 0.12
# In training more: whether something fits is the hardest of it. Most have the verb of a declared function, half
# of them by this share and others by chance: there the name of the thing has to tell.
_PRACTISED_NONE_FITS_SHARE = 0.36
_SAME_VERB_SHARE = 0.5
_ALIKE_SHARE = 0.5
FAILED = "That did not work."
_FAILED_SHARE = 0.06
_ERROR = {"error": "not found"}
_NEXT_WORD = re.compile(r"[^\w\s]|\s*\w+")


class FunctionCalls(InventedTask):
    name = "functions"
    efforts = MOSTLY_THINKING

    def __init__(self, most: int = 4) -> None:
        """``most`` functions are declared at most."""
        self.most = most

    def draw(self, rng: random.Random, held_out: bool) -> Instance:
        functions = draw_functions(rng, held_out, self.most)
        # Two functions of one name could not be told apart.
        functions = list({function.name: function for function in functions}.values())
        fits = _draw_fits(rng, held_out)
        wanted = functions[0] if fits else _draw_other(rng, functions, held_out)
        rng.shuffle(functions)
        return self._instance(rng, tuple(functions), wanted, fits, held_out)

    def again(self, instance: Instance, rng: random.Random) -> Instance | None:
        functions, held_out = instance.data["functions"], instance.data["held_out"]
        fits = _draw_fits(rng, held_out)
        wanted = (
            rng.choice(functions).with_other_values(rng, held_out) if fits else _draw_other(rng, functions, held_out)
        )
        return self._instance(rng, functions, wanted, fits, held_out)

    def _instance(
        self, rng: random.Random, functions: tuple[Function, ...], wanted: Function, fits: bool, held_out: bool
    ) -> Instance:
        request = _ask(rng, wanted, held_out)
        arguments = wanted.arguments
        found = _outcome(rng, wanted, held_out)
        answer = found.sentence if fits else NONE_FITS
        data = {
            "functions": functions,
            "held_out": held_out,
            "wanted": wanted if fits else None,
            "arguments": arguments,
            "asked": wanted,
            "found": found,
        }
        return Instance(f"{wanted.name} {request}", request, answer, data)

    def tools(self, instance: Instance) -> Sequence[Tool]:
        return (_Functions(instance),)

    def score(self, instance: Instance, transcript: Transcript) -> Reward:
        """Right is: exactly the one call that was asked for, and the answer that its result gives."""
        reward = super().score(instance, transcript)
        wanted: Function | None = instance.data["wanted"]
        if wanted is None:
            called = float(not transcript.calls)
        else:
            called = float(
                len(transcript.calls) == 1
                and transcript.calls[0].recipient == f"functions.{wanted.name}"
                and same_json(transcript.calls[0].text, instance.data["arguments"])
            )
        parts = {**reward.parts, "called": called, "exact": reward.parts["exact"] * called}
        return Reward(reward.value * (0.2 + 0.8 * called), parts)

    def gold(self, instance: Instance, effort: Effort) -> Sequence[Message]:
        wanted: Function | None = instance.data["wanted"]
        assert isinstance(instance.prompt, str)
        functions, asked_for = instance.data["functions"], instance.data["asked"]
        thought = "" if effort is Effort.LOW else thoughts(functions, asked_for, instance.prompt)
        if wanted is None:
            return (*think(thought), final(NONE_FITS))
        asked = call(f"functions.{wanted.name}", compact(instance.data["arguments"]))
        return (*think(thought), asked, result(asked, instance.data["found"].text), final(instance.answer))


def _draw_other(rng: random.Random, functions: Sequence[Function], held_out: bool) -> Function:
    """A function that is not among those; on the training side most have the verb of one of them."""
    action = None
    if not held_out and rng.random() < _SAME_VERB_SHARE:
        action = rng.choice(functions).name.partition("_")[0]
    names = {one.name for one in functions}
    while (other := draw_function(rng, held_out, action)).name in names:
        pass
    return other


def _draw_fits(rng: random.Random, held_out: bool) -> bool:
    return rng.random() >= (_NONE_FITS_SHARE if held_out else _PRACTISED_NONE_FITS_SHARE)


def thoughts(functions: Sequence[Function], wanted: Function, message: str) -> str:
    """The chain of thought before a call: the functions with the verb that is asked for, up to the one that does it,
    and under each phrase of the request the arguments so far.

    Below each of these names stands what is asked for, and a sign whether it is this: what has to be compared stands
    together. Where no function has even the verb, the request is repeated, by a word more than the thing: whether
    there is one is told behind the verb itself, where copying goes on, in a name or in the request.

    Phrases and arguments are in the order of the request. Each phrase stands behind the last word of the one
    before, and the message's end behind the last one, a period where it has none: what comes next, or that nothing
    does, is found by copying on.
    """
    start = message.lower().rindex(wanted.request.lower())
    end = message[start + len(wanted.request) :] or "."
    compared = _compared(functions, wanted)
    if not compared:
        follows = _NEXT_WORD.match(message[start + len(wanted.errand) :] or end)
        assert follows is not None
        return f"{wanted.errand}{follows[0]}\n{_NONE}"
    if compared[-1].endswith(_DIFFERS):
        return "\n".join([*compared, _NONE])
    given: dict[str, Any] = {}
    lines = [*compared]
    last = wanted.errand.split()[-1]
    for parameter in wanted.asked:
        given[parameter.key] = parameter.value
        lines += [f"{last} {parameter.phrase}", compact(given)[:-1]]
        last = parameter.phrase.split()[-1]
    return "\n".join([*lines, last + end])


def _compared(functions: Sequence[Function], wanted: Function) -> list[str]:
    """Two lines for each function with the wanted one's verb, up to that one: its name, and the errand with a sign."""
    names = [one.name for one in functions if one.name.partition("_")[0] == wanted.name.partition("_")[0]]
    walked = names[: names.index(wanted.name) + 1] if wanted.name in names else names
    return [line for name in walked for line in (name, f"{wanted.errand}{_FITS if name == wanted.name else _DIFFERS}")]


class _Outcome(NamedTuple):
    """What a function gives back, and the sentence that says so."""

    text: str
    sentence: str


def _outcome(rng: random.Random, function: Function, held_out: bool) -> _Outcome:
    if rng.random() < _FAILED_SHARE:
        return _Outcome(compact(_ERROR), FAILED)
    if function.name.startswith(("get", "find", "count", "check", "show")):
        value: Any = rng.choice(
            (
                words.number_of_digits(rng, rng.randint(1, 4)),
                rng.choice(words.COLORS),
                words.place(rng, held_out),
                words.person(rng, held_out),
            )
        )
        thing = function.description.rstrip(".").split()[-1]
        return _Outcome(compact({"result": value}), f"The {thing} is {value}.")
    return _Outcome(compact({"ok": True}), "Done.")


class _Functions:
    """The declared functions as one tool: the wanted call gives the outcome, every other one an error."""

    def __init__(self, instance: Instance) -> None:
        self._data = instance.data
        self.namespace = ToolNamespace.functions([one.declaration() for one in instance.data["functions"]])

    async def run(self, name: str, arguments: str) -> ToolOutput:
        wanted = self._data["wanted"]
        if wanted is not None and name == wanted.name and same_json(arguments, self._data["arguments"]):
            return ToolOutput(self._data["found"].text)
        return ToolOutput(compact(_ERROR), is_error=True)

    async def close(self) -> None:
        pass


class Parameter(NamedTuple):
    key: str
    kind: str
    schema: dict[str, Any]
    said: str
    """How a request names the value, such as "in *"."""
    value: Any

    @property
    def phrase(self) -> str:
        return self.said.replace("*", str(self.value))


class Function(NamedTuple):
    """A function, and what a request for it says."""

    name: str
    description: str
    errand: str
    """How a request begins, such as "get the quiet bopimar"."""
    parameters: tuple[Parameter, ...]
    required: tuple[str, ...]
    asked: tuple[Parameter, ...]
    """Those with a value, in the order of the request."""

    def with_other_values(self, rng: random.Random, held_out: bool) -> Function:
        """The same function, asked for with values drawn anew."""
        parameters = tuple(p._replace(value=_value(rng, held_out, p.kind, p.schema)) for p in self.parameters)
        return self._replace(parameters=parameters, asked=_asked(rng, parameters))

    @property
    def arguments(self) -> dict[str, Any]:
        """What a request gives, in its order; flags that are not asked for are left out."""
        return {p.key: p.value for p in self.asked}

    @property
    def request(self) -> str:
        return " ".join([self.errand, *(p.phrase for p in self.asked)])

    def declaration(self) -> ToolDescription:
        properties = {p.key: p.schema for p in self.parameters}
        schema = {
            "type": "object",
            "properties": properties,
            "required": list(self.required),
            "additionalProperties": False,
        }
        return ToolDescription(self.name, self.description, schema)


_ACTIONS = {
    "get": ("Gets", "get"),
    "find": ("Finds", "find"),
    "set": ("Sets", "set"),
    "add": ("Adds", "add"),
    "remove": ("Removes", "remove"),
    "check": ("Checks", "check"),
    "count": ("Counts", "count"),
    "send": ("Sends", "send"),
    "open": ("Opens", "open"),
    "close": ("Closes", "close"),
    "book": ("Books", "book"),
    "show": ("Shows", "show"),
}

# Key, kind, how it is said; an asterisk is the value.
_KINDS: tuple[tuple[str, str, str], ...] = (
    ("city", "place", "in *"),
    ("town", "place", "near *"),
    ("origin", "place", "from *"),
    ("target", "place", "to *"),
    ("person", "person", "for *"),
    ("owner", "person", "of *"),
    ("author", "person", "by *"),
    ("guest", "person", "with *"),
    ("day", "weekday", "on *"),
    ("month", "month", "in *"),
    ("days", "number", "for * days"),
    ("hours", "number", "for * hours"),
    ("limit", "number", "up to *"),
    ("count", "number", "* times"),
    ("year", "year", "in *"),
    ("color", "color", "in *"),
    ("unit", "unit", "in *"),
    ("loud", "flag", "loudly"),
    ("fast", "flag", "fast"),
    ("secret", "flag", "in secret"),
)
_UNITS = ("meters", "miles", "grams", "liters", "degrees", "seconds")


def draw_functions(rng: random.Random, held_out: bool, most: int) -> list[Function]:
    """One to ``most`` of them. On the training side half of the time with two verbs at most, so that names have to be
    told apart by the thing.
    """
    actions = list(_ACTIONS)
    if not held_out and rng.random() < _ALIKE_SHARE:
        actions = rng.sample(actions, 2)
    return [draw_function(rng, held_out, rng.choice(actions)) for _ in range(rng.randint(1, most))]


def draw_function(rng: random.Random, held_out: bool, action: str | None = None) -> Function:
    """A function about an invented thing, with one to three parameters and a request that gives their values;
    ``action`` is its verb, where it is not left to chance.
    """
    action = action or rng.choice(list(_ACTIONS))
    third, plain = _ACTIONS[action]
    thing = words.invented_word(rng, held_out)
    name = f"{action}_{thing}"
    parameters: list[Parameter] = []
    if rng.random() < 0.35:
        parameters.append(_invented_parameter(rng, held_out))
    for key, kind, said in rng.sample(_KINDS, rng.choice((1, 1, 2, 2, 3)) - len(parameters) or 1):
        # Two of one kind would be told apart by their preposition alone.
        if not any(kind == p.kind or said.split("*")[0] == p.said.split("*")[0] for p in parameters):
            parameters.append(_parameter(rng, held_out, key, kind, said))
    required = tuple(p.key for p in parameters if p.schema["type"] != "boolean")
    adjective = f"{rng.choice(words.ADJECTIVES)} " if rng.random() < 0.3 else ""
    errand = f"{plain} the {adjective}{thing}"
    return Function(
        name,
        f"{third} the {adjective}{thing}.",
        errand,
        tuple(parameters),
        required,
        _asked(rng, parameters),
    )


def draw_facts(rng: random.Random) -> list[tuple[str, bool]]:
    """Whether any of some functions fits, as the first thought of each of some requests tells it; or one call thought
    through. Which parts of the text are the answers.
    """
    functions = draw_functions(rng, held_out=False, most=4)
    declared = "".join(
        f"// {one.description}\ntype {one.name} = (_: {typescript(one.declaration().parameters)}) => any;\n\n"
        for one in functions
    )
    parts = [(declared, False)]
    if rng.random() < 0.6:
        for _ in range(8):
            fits = rng.random() < 0.6
            wanted = rng.choice(functions) if fits else _draw_other(rng, functions, held_out=False)
            request = _ask(rng, wanted)
            found = thoughts(functions, wanted, request)
            if fits:
                found = found[: found.index(_FITS) + 1]
            parts += [(f"{request}<|message|>", False), (found, True), ("\n", False)]
        return parts
    wanted = rng.choice(functions)
    request = _ask(rng, wanted)
    call_text = f"{thoughts(functions, wanted, request)}\n{wanted.name}{compact(wanted.arguments)}<|call|>"
    return [*parts, (f"{request}\n", False), (call_text, True)]


def _ask(rng: random.Random, wanted: Function, held_out: bool = False) -> str:
    request = OPENING.pick(rng, held_out, request=wanted.request)
    return request[0].upper() + request[1:]


def _asked(rng: random.Random, parameters: Sequence[Parameter]) -> tuple[Parameter, ...]:
    asked = tuple(p for p in parameters if p.value is not None)
    return asked[::-1] if rng.random() < 0.3 else asked


def _invented_parameter(rng: random.Random, held_out: bool) -> Parameter:
    key = words.invented_word(rng, held_out)
    kind = rng.choice(("place", "number", "color"))
    return _parameter(rng, held_out, key, kind, f"with {key} *")


def _parameter(rng: random.Random, held_out: bool, key: str, kind: str, said: str) -> Parameter:
    schema: dict[str, Any]
    match kind:
        case "number" | "year":
            schema = {"type": "integer"}
        case "flag":
            schema = {"type": "boolean"}
        case "unit":
            schema = {"type": "string", "enum": rng.sample(_UNITS, 3)}
        case _:
            schema = {"type": "string"}
    return Parameter(key, kind, schema, said, _value(rng, held_out, kind, schema))


def _value(rng: random.Random, held_out: bool, kind: str, schema: Mapping[str, Any]) -> Any:
    match kind:
        case "number":
            return words.number_of_digits(rng, rng.choice((1, 2, 2, 3)))
        case "year":
            return rng.randrange(1700, 2060)
        case "flag":
            # What is not asked for is not given.
            return True if rng.random() < 0.6 else None
        case "unit":
            return rng.choice(schema["enum"])
        case "color":
            return rng.choice(words.COLORS)
        case "weekday":
            return rng.choice(words.WEEKDAYS)
        case "month":
            return rng.choice(words.MONTHS)
        case "person":
            return words.person(rng, held_out)
        case _:
            return words.place(rng, held_out)
