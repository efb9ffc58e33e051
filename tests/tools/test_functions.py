from __future__ import annotations

import asyncio
import dataclasses
import datetime
import decimal
import enum
import json
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Annotated, Any, Literal, NotRequired, Optional, Union

import jsonschema
import pytest
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

import ossia
from ossia.errors import InputError
from ossia.harmony import DeveloperContent, Message, Tokenizer, render
from ossia.harmony.strict_schema import enforceable
from ossia.tools.functions import FunctionTool, FunctionTools


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclasses.dataclass
class Point:
    x: int
    y: float = 0.5


class Options(TypedDict):
    depth: int
    name: NotRequired[str]


class Tree(BaseModel):
    value: int
    children: list[Tree] = []


class Thing: ...


class Address(BaseModel):
    street: Annotated[str, Field(description="With the number.")]
    zip: str | None = None


def run(tool, arguments="{}"):
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return asyncio.run(tool.run(arguments))


def schema_of(hint, default=dataclasses.MISSING):
    """The schema of one parameter of a type, and the values it gets."""

    def probe(value): ...

    probe.__annotations__ = {"value": hint}
    if default is not dataclasses.MISSING:
        probe.__defaults__ = (default,)
    tool = ossia.tool(probe)
    return tool.parameters["properties"]["value"]


# The schema ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}),
        (int, {"type": "integer"}),
        (float, {"type": "number"}),
        (bool, {"type": "boolean"}),
        (Any, {}),
        (list[int], {"type": "array", "items": {"type": "integer"}}),
        (Sequence[str], {"type": "array", "items": {"type": "string"}}),
        (set[int], {"type": "array", "items": {"type": "integer"}}),
        (dict[str, float], {"type": "object", "additionalProperties": {"type": "number"}}),
        (Optional[int], {"type": ["integer", "null"]}),  # noqa: UP045
        (str | None, {"type": ["string", "null"]}),
        (Union[int, str], {"type": ["integer", "string"]}),  # noqa: UP007
        (int | float, {"type": ["integer", "number"]}),
        (list[int] | None, {"oneOf": [{"type": "array", "items": {"type": "integer"}}, {"type": "null"}]}),
        (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
        (Literal["a"], {"type": "string", "enum": ["a"]}),
        (Literal[1, 2], {"type": "integer", "enum": [1, 2]}),
        (Literal["a"] | None, {"oneOf": [{"type": "string", "enum": ["a"]}, {"type": "null"}]}),
        (Color, {"type": "string", "enum": ["red", "blue"]}),
        (Level, {"type": "integer", "enum": [1, 2]}),
        (datetime.date, {"type": "string", "format": "date"}),
        (decimal.Decimal, {"type": ["number", "string"]}),
        (
            Point,
            {
                "type": "object",
                "properties": {"x": {"type": "integer"}, "y": {"type": "number", "default": 0.5}},
                "required": ["x"],
                "additionalProperties": False,
            },
        ),
        (
            Options,
            {
                "type": "object",
                "properties": {"depth": {"type": "integer"}, "name": {"type": "string"}},
                "required": ["depth"],
                "additionalProperties": False,
            },
        ),
        (
            Address,
            {
                "type": "object",
                "properties": {
                    "street": {"type": "string", "description": "With the number."},
                    "zip": {"type": ["string", "null"], "default": None},
                },
                "required": ["street"],
                "additionalProperties": False,
            },
        ),
        (
            tuple[int, str],
            {
                "type": "array",
                "prefixItems": [{"type": "integer"}, {"type": "string"}],
                "minItems": 2,
                "maxItems": 2,
            },
        ),
        (Annotated[int, Field(ge=1, le=9)], {"type": "integer", "minimum": 1, "maximum": 9}),
        (Annotated[str, "Its name."], {"type": "string", "description": "Its name."}),
        (Annotated[str, Field(description="Its name.")], {"type": "string", "description": "Its name."}),
    ],
    ids=str,
)  # fmt: skip
def test_a_type_becomes_its_strict_schema(hint, schema):
    assert schema_of(hint) == schema
    jsonschema.Draft202012Validator.check_schema(schema)


def test_a_type_that_contains_itself_stays_a_definition():
    def plant(tree: Tree) -> int:
        return len(tree.children)

    tool = ossia.tool(plant)
    assert tool.parameters["properties"]["tree"] == {"$ref": "#/$defs/Tree"}
    assert tool.parameters["$defs"]["Tree"]["additionalProperties"] is False
    assert run(tool, {"tree": {"value": 1, "children": [{"value": 2}]}}).text == "1"


def test_every_schema_is_one_that_sampling_can_enforce():
    @ossia.tool
    def everything(
        a: int,
        b: list[Point],
        c: dict[str, Options] | None = None,
        d: Tree | Color | None = None,
        e: Annotated[str, Field(pattern="^[a-z]+$")] = "x",
        f: tuple[int, ...] = (),
        g: datetime.datetime | datetime.timedelta | None = None,
    ): ...

    enforceable(everything.parameters, root_type="object")
    assert everything.parameters["required"] == ["a", "b"]
    assert everything.parameters["additionalProperties"] is False


def test_what_no_schema_can_say_is_refused_naming_the_parameter():
    def untyped(x): ...
    def many(*xs: int): ...
    def named(**xs: int): ...
    def thing(x: Thing): ...
    def pattern(x: Annotated[str, Field(pattern=r"^(?=a)b")]): ...
    def missing(x: Nowhere): ...  # noqa: F821
    def called(x: int): ...

    for function, said in (
        (untyped, "the parameter 'x' has no type"),
        (many, "no fixed names"),
        (named, "no fixed names"),
        (thing, "has no JSON form"),
        (pattern, "pattern"),
        (missing, "Nowhere"),
    ):
        with pytest.raises(InputError, match=said):
            ossia.tool(function)
    for name in ("a b", "x" * 65, "a.b"):
        with pytest.raises(InputError, match="expected 1 to 64 letters"):
            FunctionTool(called, name=name)


def test_names_that_pydantic_keeps_for_itself_are_ordinary_parameters():
    @ossia.tool
    def odd(json: bool, _private: int, model_config: str, schema: str = "s", copy: int = 1):
        return [json, _private, model_config, schema, copy]

    assert list(odd.parameters["properties"]) == ["json", "_private", "model_config", "schema", "copy"]
    assert run(odd, {"json": True, "_private": 2, "model_config": "m"}).text == '[true,2,"m","s",1]'


# The words -----------------------------------------------------------------------------------------------------------

GOOGLE = """Find a flight.

    Only direct ones.

    Args:
        origin: Where from,
            as an airport code.
        n (int): How many: at most 9.

    Returns:
        The flights.
    """
NUMPY = """Find a flight.

    Only direct ones.

    Parameters
    ----------
    origin : str
        Where from,
        as an airport code.
    n : int, optional
        How many: at most 9.

    Returns
    -------
    str
        The flights.
    """
SPHINX = """Find a flight.

    Only direct ones.

    :param origin: Where from,
        as an airport code.
    :param n: How many: at most 9.
    :type n: int
    :return: The flights.
    """


@pytest.mark.parametrize("doc", [GOOGLE, NUMPY, SPHINX], ids=["google", "numpy", "sphinx"])
def test_words_come_from_the_docstring(doc):
    def find(origin: str, n: int = 1) -> str: ...

    find.__doc__ = doc
    tool = ossia.tool(find)
    assert (tool.name, tool.description) == ("find", "Find a flight.\n\nOnly direct ones.")
    described = {name: one["description"] for name, one in tool.parameters["properties"].items()}
    assert described == {"origin": "Where from, as an airport code.", "n": "How many: at most 9."}


def test_words_beside_the_type_come_before_the_docstring():
    @ossia.tool(name="seek", description="Seek.")
    def find(origin: Annotated[str, "From."]) -> str:
        """Find.

        Args:
            origin: Where from.
        """

    assert (find.name, find.description) == ("seek", "Seek.")
    assert find.parameters["properties"]["origin"]["description"] == "From."


def test_a_function_without_docstring_has_no_description():
    def bare() -> None: ...

    tool = ossia.tool(bare)
    assert tool.description == "" and tool.parameters == {
        "type": "object",
        "properties": {},
        "additionalProperties": False,
    }


def test_the_model_is_shown_the_types():
    @ossia.tool
    def book(seat: Literal["aisle", "window"], at: Point | None = None, n: int | None = 1):
        """Book a seat."""

    namespace = FunctionTools([book]).namespace
    tokenizer = Tokenizer.o200k_harmony()
    text = tokenizer.decode(render([Message("developer", DeveloperContent(tools=(namespace,)))], tokenizer))
    assert "// Book a seat.\ntype book = (_: {\n" in text
    assert 'seat: "aisle" | "window",' in text and "x: number," in text and "n?: number | null, // default: 1" in text


# Calls ---------------------------------------------------------------------------------------------------------------


def test_a_tool_is_still_the_function():
    @ossia.tool
    def add(a: int, b: int = 1) -> int:
        """Add."""
        return a + b

    assert add(1, 2) == 3 and add(1) == 2
    assert add.__doc__ == "Add." and repr(add) == "<tool add(a: 'int', b: 'int' = 1) -> 'int'>"


def test_arguments_are_converted_to_what_the_signature_says():
    @ossia.tool
    def check(n: int, when: datetime.date, color: Color, at: Point, tags: set[str], level: Level = Level.LOW):
        assert (type(n), type(when), color, at) == (int, datetime.date, Color.BLUE, Point(1, 2.0))
        assert tags == {"a"} and level is Level.LOW
        return "fine"

    arguments = {"n": "5", "when": "2026-01-02", "color": "blue", "at": {"x": 1, "y": 2}, "tags": ["a", "a"]}
    assert run(check, arguments).text == "fine"


def test_what_is_left_out_is_the_functions_own_default():
    sentinel: Any = object()

    def probe(value: int = sentinel, /, other: int = 2):
        return "default" if value is sentinel else "given"

    probe.__annotations__ = {"value": "int", "other": "int"}
    with pytest.warns(UserWarning, match="not JSON serializable"):
        tool = ossia.tool(probe)
    assert run(tool).text == "default" and run(tool, {"value": 3}).text == "given"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("{", "the arguments are not JSON"),
        ("[" * 100_000, "the arguments are not JSON"),
        ("[1]", "the arguments are a list; expected an object"),
        ("null", "the arguments are null; expected an object"),
        ("{}", "a: Field required"),
        ('{"a": "x"}', "a: Input should be a valid integer"),
        ('{"a": 1, "z": 2}', "z: Extra inputs are not permitted. Its parameters: a, at"),
        ('{"a": 1, "at": [{"x": 1}, {}]}', "at[1].x: Field required"),
    ],
)
def test_arguments_that_do_not_fit_are_answered(arguments, said):
    @ossia.tool
    def f(a: int, at: list[Point] = []): ...  # noqa: B006

    output = run(f, arguments)
    assert output.is_error and output.text.startswith("Error: ") and said in output.text


def test_no_arguments_at_all_are_an_empty_object():
    @ossia.tool
    def now() -> str:
        return "late"

    assert run(now, "").text == run(now, "  ").text == run(now, "{}").text == "late"


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("as it is", "as it is"),
        (None, "null"),
        (3, "3"),
        ({"a": [1, None]}, '{"a":[1,null]}'),
        (Point(1), '{"x":1,"y":0.5}'),
        (Tree(value=1), '{"value":1,"children":[]}'),
        (datetime.date(2026, 1, 2), '"2026-01-02"'),
        (Color.RED, '"red"'),
        (b"\xff", '"_w=="'),
        (float("nan"), '"NaN"'),
        ({1, 2}, "[1,2]"),
        (complex(1, 2), '"1+2j"'),
        (threading, f'"{threading}"'),
    ],
    ids=str,
)
def test_results_become_text(result, text):
    def f():
        return result

    assert run(ossia.tool(f)).text == text


def test_a_result_that_refers_to_itself_is_text_all_the_same():
    @ossia.tool
    def f():
        a: list = []
        a.append(a)
        return a

    assert run(f).text == "[[...]]"


def test_a_long_result_is_shortened():
    @ossia.tool
    def f():
        return "x" * 1_000_000

    assert len(run(f).text) < 101_000 and "900,000 characters left out" in run(f).text


def test_an_async_function_runs_in_the_loop():
    @ossia.tool
    async def f(n: int) -> int:
        await asyncio.sleep(0)
        return n + 1

    assert run(f, {"n": 1}).text == "2"


def test_a_plain_function_does_not_hold_up_the_loop():
    inside, go_on = threading.Event(), threading.Event()

    @ossia.tool
    def f() -> str:
        inside.set()
        assert go_on.wait(20)
        return threading.current_thread().name

    async def both():
        call = asyncio.create_task(f.run("{}"))
        while not inside.is_set():
            await asyncio.sleep(0.001)
        go_on.set()
        return await call

    assert asyncio.run(both()).text == "tool-f"


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError


class Ending(BaseException):
    """As the end of a test or of a program of one's own."""


RAISED = [
    ValueError("no such city"), KeyError(), TimeoutError(), asyncio.CancelledError(), StopIteration(3), SystemExit(1),
    Ending(), Mute(),
]  # fmt: skip


@pytest.mark.parametrize("raised", RAISED, ids=lambda one: type(one).__name__)
@pytest.mark.parametrize("is_async", [False, True])
def test_what_a_function_raises_is_an_answer(is_async, raised):
    async def later():
        raise raised

    def now():
        raise raised

    output = run(ossia.tool(later if is_async else now))
    assert output.is_error
    assert type(raised).__name__ in output.text or "was cancelled" in output.text


def test_a_result_that_can_say_nothing_of_itself_is_an_answer():
    class Silent:
        def __str__(self) -> str:
            raise RuntimeError

    for result in (Silent(), [Silent()], {"a": Silent()}):

        @ossia.tool
        def give() -> object:
            return result  # noqa: B023

        output = run(give)
        assert "<Silent, whose text fails with RuntimeError>" in output.text and not output.is_error


@pytest.mark.parametrize("is_async", [False, True])
def test_a_function_that_takes_too_long_is_given_up(is_async):
    stop = threading.Event()

    async def later():
        await asyncio.sleep(60)

    def now():
        stop.wait(60)

    output = run(FunctionTool(later if is_async else now, timeout_s=0.05))
    stop.set()
    assert output == ("Error: " + ("later" if is_async else "now") + " gave no answer within 0.05 seconds", True, {})


def test_only_so_many_calls_are_left_behind():
    stop = threading.Event()

    def hang():
        stop.wait(60)

    tool = FunctionTool(hang, timeout_s=0.01)

    async def many():
        texts = [(await tool.run("{}")).text for _ in range(10)]
        stop.set()
        for _ in range(500):
            if (await tool.run("{}")).text == "null":
                return texts
            await asyncio.sleep(0.01)
        raise AssertionError("never free again")

    texts = asyncio.run(many())
    assert "gave no answer" in texts[7] and "still busy with 8 earlier calls" in texts[8]


def test_cancelling_a_call_cancels_an_async_function():
    stopped = []

    @ossia.tool
    async def f():
        try:
            await asyncio.sleep(60)
        finally:
            stopped.append(True)

    async def cancel():
        task = asyncio.create_task(f.run("{}"))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancel())
    assert stopped == [True]


def test_a_call_that_hangs_does_not_keep_the_process():
    program = """
import asyncio, time, ossia
@ossia.tool(timeout_s=0.05)
def hang(): time.sleep(600)
print(asyncio.run(hang.run("{}")).text)
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert "gave no answer" in done.stdout, done.stderr
    assert time.monotonic() - began < 120


def test_a_bound_method_is_a_tool_of_its_object():
    class Counter:
        def __init__(self, start):
            self.n = start

        def add(self, n: int) -> int:
            """Add."""
            self.n += n
            return self.n

    with pytest.raises(InputError, match=r"'self' has no type; .* take the bound one"):
        ossia.tool(Counter.add)
    one, two = ossia.tool(Counter(1).add), ossia.tool(Counter(10).add)
    assert run(one, {"n": 1}).text == "2" and run(two, {"n": 1}).text == "11"
    assert list(one.parameters["properties"]) == ["n"]


def test_functions_are_called_by_their_names():
    @ossia.tool
    def one() -> int:
        return 1

    def two() -> int:
        return 2

    tools = FunctionTools([one, two])
    assert [t.name for t in tools.namespace.tools] == ["one", "two"] and tools.namespace.name == "functions"
    assert asyncio.run(tools.run("two", "{}")).text == "2"
    output = asyncio.run(tools.run("three", "{}"))
    assert output.is_error and "expected one of one, two" in output.text
    with pytest.raises(InputError, match="two functions have one name"):
        FunctionTools([one, one])


def test_the_name_costs_nothing_until_it_is_used():
    program = (
        "import sys, ossia\nassert 'pydantic' not in sys.modules\nossia.tool\nassert 'pydantic' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
