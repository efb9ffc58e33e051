"""Which calls the grammar of a request allows: the tool choice in all its forms."""

from __future__ import annotations

import numpy as np
import pytest
from tests.responses.scripts import FINAL, REASONED, TOKENIZER, model, tokens
from tests.responses.test_client_tools import CALLS, SEARCH, call
from tests.responses.test_loop import run_of

from ossia.engine.masks import GrammarCompiler
from ossia.errors import InputError
from ossia.harmony import ToolDescription, ToolNamespace
from ossia.responses.constrain import Grammars, Turn
from ossia.responses.tools import Toolbox

F = {"type": "function", "name": "f", "parameters": {"type": "object"}}
ONE = {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"], "additionalProperties": False}
G = {"type": "function", "name": "g", "strict": True, "parameters": ONE}
C = {"type": "custom", "name": "c", "format": {"type": "grammar", "syntax": "regex", "definition": "[ab]+"}}
L = {"type": "custom", "name": "l", "format": {"type": "grammar", "syntax": "lark", "definition": 'start: "x" | "y"'}}
CRM = {"type": "namespace", "name": "crm", "description": "", "tools": [{**F, "name": "f"}, {**F, "name": "find"}]}
DECLARED = [F, G, C, L, CRM, {"type": "shell"}, {"type": "apply_patch"}, SEARCH, {"type": "file_search"},
            {"type": "web_search_preview"}, {"type": "mcp", "server_label": "deep"}]  # fmt: skip

SAID = {
    "final": FINAL,
    "f": call("f", {}),
    "g": call("g", {"a": 1}),
    "c": "<|channel|>commentary to=functions.c<|message|>ab<|call|>",
    "l": "<|channel|>commentary to=functions.l<|message|>y<|call|>",
    "crm.f": call("f", {}).replace("functions.", "crm."),
    "crm.find": call("find", {}).replace("functions.", "crm."),
    "shell": call("shell", CALLS["shell"][0]),
    "apply_patch": call("apply_patch", CALLS["apply_patch"][0]),
    "tool_search": call("tool_search", {"goal": "x"}),
    "browser.search": '<|channel|>analysis to=browser.search code<|message|>{"query": "x"}<|call|>',
    "deep.ask": '<|channel|>commentary to=deep.ask <|constrain|>json<|message|>{"q": "x"}<|call|>',
}
ALL = set(SAID) - {"final"}
FUNCTION, CUSTOM = {"type": "function", "name": "f"}, {"type": "custom", "name": "c"}


class Offered(Toolbox):
    """A toolbox with a browser and another server's tools, none of which is called here."""

    def namespaces(self, tools):
        ask = ToolDescription("ask", "", {"type": "object", "properties": {"q": {"type": "string"}}})
        told = {"web_search_preview": ToolNamespace.browser(), "mcp": ToolNamespace("deep", None, (ask,))}
        return [told[t["type"]] for t in tools if t["type"] in told], [t for t in tools if t["type"] not in told]


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(GrammarCompiler(TOKENIZER))


def accepts(constraint, text: str) -> bool:
    mask = np.zeros(-(-TOKENIZER.vocab_size // 32), np.uint32)
    for token in tokens(text):
        constraint.fill(mask)
        if not mask[token // 32] >> np.uint32(token % 32) & 1:
            return False
        constraint.accept(token)
    return constraint.is_complete


def said(grammars, choice) -> set[str]:
    made = model(FINAL, toolbox=Offered)
    run = run_of(made, tools=DECLARED, tool_choice=choice)
    turn = Turn(run.tools, run._choice, run.request.format)
    return {name for name, text in SAID.items() if accepts(grammars(turn), REASONED + text)}


def allowed(mode: str | None, *tools) -> dict:
    return {"type": "allowed_tools", "tools": list(tools), **({"mode": mode} if mode else {})}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        (None, ALL | {"final"}),
        ("auto", ALL | {"final"}),
        ("none", {"final"}),
        ("required", ALL),
        (FUNCTION, {"f", "crm.f"}),
        ({**FUNCTION, "namespace": "crm"}, {"crm.f"}),
        (CUSTOM, {"c"}),
        ({"type": "custom", "name": "l"}, {"l"}),
        ({"type": "namespace", "name": "crm"}, {"crm.f", "crm.find"}),
        ({"type": "shell"}, {"shell"}),
        ({"type": "apply_patch"}, {"apply_patch"}),
        ({"type": "tool_search"}, {"tool_search"}),
        ({"type": "web_search_preview"}, {"browser.search"}),
        ({"type": "web_search_2025_08_26"}, {"browser.search"}),
        ({"type": "mcp", "server_label": "deep"}, {"deep.ask"}),
        ({"type": "mcp", "server_label": "deep", "name": "ask"}, {"deep.ask"}),
        (allowed("auto", FUNCTION, CUSTOM), {"f", "crm.f", "c", "final"}),
        (allowed(None, {"type": "shell"}), {"shell", "final"}),
        (allowed("required", {"type": "mcp", "server_label": "deep"}, CUSTOM), {"c", "deep.ask"}),
        (allowed("required", {"type": "file_search"}, {"type": "web_search"}), {"browser.search"}),
        (allowed("auto", {"type": "file_search"}), {"final"}),
        (allowed("auto"), {"final"}),
    ],
    # Sets have another order in every process.
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)  # fmt: skip
def test_exactly_what_the_tool_choice_allows_can_be_sampled(grammars, choice, expected):
    assert said(grammars, choice) == expected


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ("maybe", "tool_choice"),
        ({}, "tool_choice"),
        ({"type": "function"}, "tool_choice"),
        ({"type": "function", "name": "unknown"}, "tool_choice"),
        ({"type": "function", "name": "c"}, "tool_choice"),
        ({"type": "function", "name": "find", "namespace": "functions"}, "tool_choice"),
        ({"type": "file_search"}, "tool_choice"),
        ({"type": "image_generation"}, "tool_choice"),
        ({"type": "local_shell"}, "tool_choice"),
        ({"type": "programmatic_tool_calling"}, "tool_choice"),
        ({"type": "mcp", "server_label": "shallow"}, "tool_choice"),
        ({"type": "mcp", "server_label": "deep", "name": "tell"}, "tool_choice"),
        (allowed("sometimes", FUNCTION), "tool_choice.mode"),
        (allowed("required"), "tool_choice"),
        (allowed("required", {"type": "file_search"}), "tool_choice"),
        (allowed("auto", {"type": "function", "name": "unknown"}), "tool_choice"),
        ({"type": "allowed_tools", "mode": "auto"}, "tool_choice.tools"),
        ({"type": "allowed_tools", "mode": "auto", "tools": ["f"]}, "tool_choice.tools"),
    ],
    ids=str,
)
def test_a_tool_choice_of_what_is_not_there_is_refused(choice, param):
    with pytest.raises(InputError) as raised:
        run_of(model(FINAL, toolbox=Offered), tools=DECLARED, tool_choice=choice)
    assert raised.value.param == param


def test_a_strict_function_and_a_clients_grammars_bind(grammars):
    run = run_of(model(FINAL), tools=[F, G, C, L])
    turn = Turn(run.tools, run._choice, run.request.format)
    for text, is_allowed in {
        call("g", {"a": 2}): False,
        call("f", {"a": 2}): True,
        call("f", [2]): False,
        SAID["c"].replace("ab", "abc"): False,
        SAID["l"].replace(">y", ">z"): False,
        call("h", {}): False,
        "<|channel|>commentary to=browser.search<|message|>x<|call|>": False,
    }.items():
        assert accepts(grammars(turn), text) == is_allowed, text


def test_a_syntax_that_is_none_is_named(grammars):
    with pytest.raises(InputError) as raised:
        run_of(model(FINAL, constrain=grammars), tools=[{**C, "format": {"type": "grammar", "syntax": {}}}])
    assert raised.value.param == "tools[0].format.syntax"


def function(**fields):
    return {"type": "function", "name": "g", "parameters": ONE, **fields}


@pytest.mark.parametrize("given", [{}, {"strict": None}, {"strict": True}])
def test_a_function_that_does_not_say_is_strict(grammars, given):
    run = run_of(model(FINAL, constrain=grammars), tools=[function(**given)])
    assert [accepts(run._constrain(), call("g", {"a": a})) for a in (1, 2)] == [True, False]
    assert run.response["tools"][0]["strict"] is True


@pytest.mark.parametrize("given", [{"strict": False}, {"parameters": {"type": "object", "not": {}}}])
def test_a_function_that_says_so_or_cannot_be_strict_takes_any_object(grammars, given):
    run = run_of(model(FINAL, constrain=grammars), tools=[F, function(**given)])
    assert accepts(run._constrain(), call("g", {"a": 2}))
    assert [tool["strict"] for tool in run.response["tools"]] == [True, False]


def test_a_schema_that_cannot_be_enforced_is_an_error_where_strict_was_asked_for(grammars):
    with pytest.raises(InputError, match="not"):
        run_of(model(FINAL, constrain=grammars), tools=[function(strict=True, parameters={"not": {}})])


def test_functions_that_are_too_much_together_give_way_if_nobody_asked(monkeypatch, grammars):
    monkeypatch.setattr("ossia.harmony.grammar.MAX_TEXT_CHARS", 2_000)
    large = {"type": "object", "properties": {f"p{i}": {"enum": ["x" * 50]} for i in range(30)}}
    run = run_of(model(FINAL, constrain=grammars), tools=[function(parameters=large)])
    assert run.response["tools"][0]["strict"] is False
    with pytest.raises(InputError):
        run_of(model(FINAL, constrain=grammars), tools=[function(parameters=large, strict=True)])


def test_functions_of_namespaces_and_found_ones_are_strict_too(grammars):
    space = {"type": "namespace", "name": "crm", "description": "", "tools": [function()]}
    added = {"type": "additional_tools", "tools": [function(name="more")]}
    run = run_of(model(FINAL, constrain=grammars), tools=[space], input=[added, {"role": "user", "content": "?"}])
    for name, space in (("g", "crm"), ("more", "functions")):
        said = [call(name, {"a": a}).replace("functions.", f"{space}.") for a in (1, 2)]
        assert [accepts(run._constrain(), text) for text in said] == [True, False]


# Read without a fault, and refused by what compiles it.
AB = {"a": {"type": "string"}, "b": {"type": "string"}}
LATE = [
    {"type": "object", "properties": AB, "minProperties": 1},
    {"type": "object", "properties": {"x": {"oneOf": [{"type": "integer"}, {"type": "number"}]}}},
    {"type": "object", "properties": {"x": {"type": "string", "pattern": "^{.*}$"}}},
]


@pytest.mark.parametrize("schema", LATE)
def test_of_several_functions_the_one_that_cannot_be_enforced_gives_way(grammars, schema):
    tools = [function(), function(name="update", parameters=schema), function(name="h")]
    run = run_of(model(FINAL, constrain=grammars), tools=tools)
    assert [tool["strict"] for tool in run.response["tools"]] == [True, False, True]
    assert accepts(run._constrain(), call("update", {"any": 1})) and not accepts(run._constrain(), call("g", {"a": 2}))
    with pytest.raises(InputError) as raised:
        run_of(model(FINAL, constrain=grammars), tools=[function(), {**tools[1], "strict": True}])
    assert raised.value.param == "tools[1]"


@pytest.mark.parametrize("schema", LATE)
def test_a_format_that_does_not_say_gives_way_too(grammars, schema):
    shape = {"type": "json_schema", "name": "x", "schema": schema}
    run = run_of(model(FINAL, constrain=grammars), tools=[function()], text={"format": shape})
    assert run.response["text"]["format"]["strict"] is False and run.response["tools"][0]["strict"] is True
    assert accepts(run._constrain(), answer("[1]"))
    with pytest.raises(InputError) as raised:
        run_of(model(FINAL, constrain=grammars), text={"format": {**shape, "strict": True}})
    assert raised.value.param == "text.format.schema"


def answer(text: str) -> str:
    return f"<|channel|>final<|message|>{text}<|return|>"


def test_a_grammar_s_fault_is_told_where_the_grammar_is(grammars):
    with pytest.raises(InputError) as raised:
        run_of(
            model(FINAL, constrain=grammars),
            text={"format": {"type": "grammar", "syntax": "regex", "definition": "(a"}},
        )
    assert raised.value.param == "text.format.definition"


def test_functions_inside_a_namespace_show_whether_they_are_strict(grammars):
    inner = [function(), function(name="h", strict=False), function(name="i", parameters={"not": {}})]
    space = {"type": "namespace", "name": "crm", "description": "", "tools": inner}
    run = run_of(model(FINAL, constrain=grammars), tools=[space])
    assert [tool["strict"] for tool in run.response["tools"][0]["tools"]] == [True, False, False]
