"""What a turn's grammar is made of, and what is refused before anything is sampled."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ossia.errors import InputError
from ossia.harmony import Channel, ToolDescription, ToolNamespace
from ossia.harmony.client_grammar import MAX_GRAMMAR_CHARS, regex_as_lark, safe_lark
from ossia.harmony.grammar import Json, Lark, Regex, Schema, Text, Tool, ToolChoice, TurnGrammar, turn_grammar
from ossia.harmony.strict_schema import any_json, enforceable, pattern_fault, subschemas


def frame(grammar: TurnGrammar, text: str | None = None) -> str:
    return json.loads(text or grammar.text)["grammars"][0]["lark_grammar"]


# -- the frame -------------------------------------------------------------------------------------


def test_without_tools_a_turn_is_analysis_and_an_answer():
    assert frame(turn_grammar()) == (
        "start: (analysis)* (final)\n"
        'analysis: <|channel|> "analysis" <|message|> TEXT <|end|> <|start|> "assistant"\n'
        'final: <|channel|> "final" <|message|> TEXT <|return|>\n'
        "TEXT: /(?s:.*)/\n"
    )


def test_calls_are_spelled_as_the_model_was_trained():
    text = frame(turn_grammar([Tool.function("f", strict=False), *Tool.builtin(ToolNamespace.python())]))
    assert "start: (analysis | preamble)* (final | call-0 | call-1)\n" in text
    assert (
        'call-0: <|channel|> "commentary to=functions.f" (" " <|constrain|> "json" <|message|> @part0 <|call|>) | '
        '" to=functions.f" <|channel|> "commentary" (" " <|constrain|> "json" <|message|> @part0 <|call|>)\n'
    ) in text
    assert 'call-1: <|channel|> "analysis to=python" (" code" <|message|> TEXT <|call|>)' in text


def test_behind_capped_reasoning_comes_a_new_message_that_is_no_analysis():
    grammar = turn_grammar([Tool.custom("c")])
    text = frame(grammar, grammar.rest)
    assert text.startswith('start: <|start|> "assistant" (preamble)* (final | call-0)\n')
    assert "analysis" not in text


def test_a_turn_without_reasoning_has_no_plain_analysis():
    assert "analysis" not in frame(turn_grammar(reasoning=False))


@pytest.mark.parametrize(
    ("choice", "start"),
    [
        (ToolChoice("none"), "start: (analysis)* (final)"),
        (ToolChoice("auto"), "start: (analysis | preamble)* (final | call-0 | call-1)"),
        (ToolChoice("required"), "start: (analysis | preamble)* (call-0 | call-1)"),
        (ToolChoice("required", ("functions.g",)), "start: (analysis | preamble)* (call-0)"),
        (ToolChoice("auto", ("functions.g",)), "start: (analysis | preamble)* (final | call-0)"),
        (ToolChoice("auto", ()), "start: (analysis)* (final)"),
        (ToolChoice("none", ("functions.g",)), "start: (analysis)* (final)"),
    ],
)
def test_the_tool_choice_decides_what_ends_a_turn(choice, start):
    tools = [Tool.function("f"), Tool.function("g")]
    assert frame(turn_grammar(tools, tool_choice=choice)).splitlines()[0] == start


def test_a_whole_namespace_can_be_chosen():
    tools = [Tool.function("f"), *Tool.builtin(ToolNamespace.browser())]
    called = ToolChoice("required", ("browser",)).callable(tools)
    assert [tool.recipient for tool in called] == ["browser.search", "browser.open", "browser.find"]


def test_built_in_calls_can_be_narrowed_to_some():
    tools = Tool.builtin(ToolNamespace.browser(), ["open"])
    assert [(tool.recipient, tool.channel) for tool in tools] == [("browser.open", Channel.ANALYSIS)]
    with pytest.raises(InputError, match=r"browser has no 'click'; it has \['search', 'open', 'find'\]"):
        Tool.builtin(ToolNamespace.browser(), ["click"])


def test_a_built_in_call_without_parameters_takes_an_empty_object():
    (tool,) = Tool.builtin(ToolNamespace("container", "Runs.", (ToolDescription("stop"),)))
    assert tool.body == Schema({"type": "object", "additionalProperties": False}, "object")


def test_tools_with_the_same_arguments_share_one_part():
    grammar = turn_grammar([Tool.function("f"), Tool.function("g"), Tool.function("h", strict=False)])
    assert [part.name for part in grammar.parts] == ["part0", "part1"]


def test_a_json_format_may_say_so_in_its_header_and_binds_the_final_message_alone():
    grammar = turn_grammar([Tool.function("f")], output=Schema({"type": "integer"}))
    assert '"final " <|constrain|> "json" <|message|> @part1 <|return|>' in frame(grammar)
    assert grammar.parts[1].param == "text.format"
    assert grammar.parts[1].source["json_schema"]["type"] == "integer"


@pytest.mark.parametrize("output", [Text(), Json(), Json("object"), Lark('start: "a"'), Regex("a"), Schema({})])
def test_every_body_makes_a_grammar(output):
    assert turn_grammar(output=output).text


def test_equal_requests_have_equal_grammars():
    tools = [Tool.function("f", {"type": "object", "properties": {"a": {"enum": [1, 2]}}})]
    assert turn_grammar(tools) == turn_grammar(list(tools))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tools": [Tool.function("f"), Tool.function("f")]}, "two tools are named 'functions.f'"),
        ({"tools": [Tool.function("f g")]}, "a tool is named 'functions.f g'"),
        ({"tools": [Tool.function("f<|end|>")]}, "a tool is named"),
        ({"tools": [Tool.function("")]}, "a tool is named 'functions.'"),
        ({"tools": [Tool.function('"')]}, "a tool is named"),
        ({"tools": [Tool.function("f", namespace=".".join("abcdefgh" * 20))]}, "a tool is named"),
        ({"tools": [Tool.function(f"f{i}") for i in range(513)]}, "513 tools are declared; expected at most 512"),
        ({"tool_choice": ToolChoice("required")}, "demands a call, but no tool is declared"),
        ({"tool_choice": ToolChoice("auto", ("functions.x",))}, "names 'functions.x', which is not declared"),
        ({"tools": [Tool.function(f"f{i}", {"enum": [str(i) + "x" * 9_000]}) for i in range(250)]}, "grammar of"),
    ],
)
def test_what_cannot_be_declared_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        turn_grammar(**arguments)


def test_an_unknown_syntax_of_a_custom_tool_is_refused():
    with pytest.raises(InputError, match="syntax is 'gbnf'; expected one of text, lark, regex"):
        Tool.custom("c", "gbnf", "root ::= x")


def test_errors_name_the_place_in_the_request():
    tools = [Tool.function("f", {"properties": {"a/b": {"not": {}}}}, param="tools[3].parameters")]
    with pytest.raises(InputError, match=r"tools\[3\].parameters: at #/properties/a~1b/not, 'not' cannot") as caught:
        turn_grammar(tools)
    assert caught.value.param == "tools[3].parameters"
    assert caught.value.status == 400


# -- schemas ---------------------------------------------------------------------------------------

DEEP: dict[str, Any] = {}
for _ in range(50):
    DEEP = {"items": DEEP}
DEEP_VALUE: list[Any] = []
for _ in range(50):
    DEEP_VALUE = [DEEP_VALUE]
DOUBLING = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(30)}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"if": {}}, "at #/if, 'if' cannot be enforced while sampling"),
        ({"items": {"uniqueItems": True}}, "at #/items/uniqueItems, 'uniqueItems' cannot"),
        ({"anyOf": [{}, {"contains": {}}]}, "at #/anyOf/1/contains"),
        ({"$defs": {"a": {"propertyNames": {}}}, "$ref": "#/$defs/a"}, "at #/\\$defs/a/propertyNames"),
        ({"dependentSchemas": {}}, "dependentSchemas"),
        ({"unevaluatedProperties": False}, "unevaluatedProperties"),
        ({"items": {"$id": "x"}}, "at #/items/\\$id"),
        ({"$ref": "https://example.com/x"}, 'at #/\\$ref, \\$ref is "https://example.com/x"; expected a JSON pointer'),
        ({"$ref": "#name"}, "expected a JSON pointer"),
        ({"$ref": 3}, "expected a JSON pointer"),
        ({"$ref": "#/$defs/none"}, "where nothing is"),
        ({"$ref": "#/anyOf/7", "anyOf": [{}]}, "where nothing is"),
        ({"$ref": "#/anyOf/\u00b2", "anyOf": [{}] * 3}, "where nothing is"),
        ({"$ref": "#/anyOf/" + "9" * 5_000, "anyOf": [{}]}, "where nothing is"),
        ({"$ref": "#"}, "at #, the \\$ref leads back to itself"),
        ({"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}, "back"),
        ({"$defs": DOUBLING | {"d30": {}}, "$ref": "#/$defs/d0"}, "multiplies out to too much"),
        ({"allOf": [{"anyOf": [{"minLength": i} for i in range(9)]}] * 9}, "multiplies out to too much"),
        (
            {"properties": {"a": {"$ref": "#/$defs/n", "minProperties": 1}},
             "$defs": {"n": {"properties": {"m": {}}, "allOf": [{"$ref": "#/$defs/n2"}]},
                       "n2": {"additionalProperties": {"allOf": [{"$ref": "#/$defs/n"}]}}}},
            "leads back to itself; expected the \\$ref alone",
        ),
        ({"format": "iri"}, 'at #/format, the format "iri" cannot be enforced; expected one of date, time'),
        ({"format": ["date"]}, "cannot be enforced"),
        ({"pattern": "(?=a)"}, 'at #/pattern, the pattern "\\(\\?=a\\)" has a lookaround'),
        ({"pattern": "a" * 1_001}, "the pattern has 1001 characters"),
        ({"patternProperties": {"(?i)a": {}}}, "inline flags"),
        ({"patternProperties": []}, "patternProperties is \\[\\]"),
        ({"type": "text"}, 'at #/type, the type is "text"; expected one or several of null'),
        ({"type": []}, "the type is \\[\\]"),
        ({"enum": []}, "at #/enum, \\[\\] stands for a list"),
        ({"enum": list(range(10_001))}, "more than 10,000 enum values"),
        ({"const": "\x00"}, "has a control character"),
        ({"const": {"\ud800": 1}}, "half a surrogate"),
        ({"const": 2**53 + 1}, "between -2\\^53 and 2\\^53"),
        ({"enum": [float("nan")]}, "at #/enum/0, it is NaN; expected a number"),
        ({"enum": [DEEP_VALUE]}, "the value nests more than 40 levels"),
        ({"const": object()}, "is no JSON value"),
        ({"minimum": 1e300}, "between -2\\^53"),
        ({"exclusiveMinimum": True}, "at #/exclusiveMinimum, it is true; expected a number"),
        ({"exclusiveMinimum": 2**53}, "at #/exclusiveMinimum, .*a number nearer to 0"),
        ({"exclusiveMaximum": -(2**53)}, "at #/exclusiveMaximum, .*a number nearer to 0"),
        ({"multipleOf": 0}, "expected a number above 0"),
        ({"multipleOf": 1_001}, "too many states"),
        ({"multipleOf": 0.00123456}, "too many states"),
        ({"multipleOf": 997, "allOf": [{"multipleOf": 991}]}, "multiplies out to too much"),
        ({"minLength": -1}, "expected 0 to"),
        ({"minLength": 1.5}, "expected a whole number"),
        ({"maxItems": 2**40}, "expected 0 to"),
        ({"minItems": "3"}, "expected a whole number"),
        ({"minProperties": 2}, "at #/minProperties, minProperties is 2 with 0 required"),
        ({"required": "a"}, "required is"),
        ({"required": [1]}, "1 stands for a text"),
        ({"properties": []}, "properties is \\[\\]"),
        ({"properties": {"a": 3}}, "at #/properties/a, 3 stands for a schema"),
        ({"properties": {f"p{i}": {} for i in range(401)}}, "401 properties may be left out"),
        ({"properties": {f"p{i}": {"items": {}} for i in range(2_600)}}, "more than 5,000 parts"),
        ({"properties": {"x" * 250_001: {}}}, "more than 250,000 characters"),
        ({"items": [{}], "prefixItems": [{}]}, "items is a list beside prefixItems"),
        ({"prefixItems": {}}, "stands for a list"),
        (DEEP, "nests more than 40 levels deep"),
        (False, "the schema is false"),
        ([], "at #, \\[\\] stands for a schema"),
        (None, "null stands for a schema"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_enforced_is_refused_by_keyword_and_place(schema, message):
    with pytest.raises(InputError, match=message):
        enforceable(schema)


def test_annotations_and_unknown_words_are_left_out():
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#", "$id": "https://x", "title": "T", "description": "d",
        "default": 1, "examples": [1], "deprecated": True, "x-guidance": {"lenient": True}, "nullable": True,
        "uniqueItems": False, "type": "integer", "then": {},
    }  # fmt: skip
    assert enforceable(schema) == {"x-guidance": enforceable(True)["x-guidance"], "type": "integer"}


def test_references_are_collected_wherever_they_point():
    schema = {
        "properties": {"a": {"$ref": "#/properties/b"}, "b": {"$ref": "#/x%20y/a~1b/0"}, "c": {"$ref": "#"}},
        "x y": {"a/b": [{"type": "string"}]},
    }
    out = enforceable(schema)
    assert out["properties"] == {
        "a": {"$ref": "#/$defs/d0"},
        "b": {"$ref": "#/$defs/d1"},
        "c": {"$ref": "#/$defs/d2"},
    }
    assert out["$defs"]["d1"] == {"title": "#/x%20y/a~1b/0", "type": "string"}
    assert out["$defs"]["d2"]["properties"] == out["properties"]
    assert enforceable({"$ref": "#/$defs/t", "$defs": {"t": True}})["$defs"] == {"d0": True}


def test_arrays_of_older_drafts_are_read():
    old = {"items": [{"type": "string"}], "additionalItems": False}
    new = {"prefixItems": [{"type": "string"}], "items": False}
    assert enforceable(old) == enforceable(new)


def test_names_may_be_escaped_only_where_no_undeclared_name_can_come():
    closed = {"type": "object", "properties": {"a": {}}, "additionalProperties": False}
    assert enforceable(closed)["x-guidance"]["json_allowed_escapes"].endswith("u")
    for opened in ({"properties": {"a": {}}}, {"required": ["a"]}, {"patternProperties": {"a": {}}}):
        schema = {"properties": {"x": opened}, "additionalProperties": False}
        assert not enforceable(schema)["x-guidance"]["json_allowed_escapes"].endswith("u")


def test_the_whole_of_arguments_is_an_object():
    assert enforceable({"type": "object"}, root_type="object")["type"] == "object"
    assert enforceable({"anyOf": [{"type": "object"}, {}]}, root_type="object")["type"] == "object"
    assert enforceable({"type": ["null", "object"]}, root_type="object")["type"] == "object"
    with pytest.raises(InputError, match='at #/type, the type is "array"; expected "object"'):
        enforceable({"type": "array"}, root_type="object")
    assert any_json("object")["type"] == "object"


def test_a_format_beside_a_pattern_is_kept():
    out = enforceable({"pattern": "^2", "format": "date", "allOf": [{"maxLength": 10}]})
    assert out["pattern"] == "^2"
    assert len(out["allOf"]) == 2
    assert enforceable({"format": "uuid"})["format"] == "uuid"


@pytest.mark.parametrize(
    ("date", "valid"),
    [("2024-02-29", True), ("2023-02-29", False), ("1900-02-29", False), ("2000-02-29", True), ("2023-02-30", False),
     ("2023-04-31", False), ("2023-12-31", True), ("2023-13-01", False), ("0000-01-01", False), ("0400-02-29", True),
     ("0000-02-29", False), ("0004-02-29", True), ("0001-01-01", True)],
)  # fmt: skip
def test_a_date_is_one_of_the_calendar(date, valid):
    pattern = enforceable({"format": "date"})["pattern"]
    assert bool(re.search(pattern, date)) == valid


def test_multiples_are_integers_where_they_can_be():
    assert enforceable({"type": "number", "multipleOf": 3.0})["type"] == ["integer"]
    assert "number" not in enforceable({"multipleOf": 3})["type"]
    assert enforceable({"type": "number", "multipleOf": 0.5})["type"] == "number"


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("^a|b$", None), (r"[\w.-]+@\w+", None), ("(?:a)(?<n>b)(?P<m>c)", None), (r"\[\]\\", None), ("[a^]", None),
        ("(?<=a)", "a lookaround"), ("(?i)a", "inline flags"), ("a++", "a possessive"), (r"\1", "a backreference"),
        (r"\k<n>", "a backreference"), (r"\bfoo", "a word boundary"), (r"[\b]", "a word"), (r"a\Z", "an anchor"),
        ("[a[b]]", "an unescaped '['"), ("[a&&b]", "a set operation"), ("[]a]", "a character class that begins"),
    ],
)  # fmt: skip
def test_patterns_that_would_be_read_otherwise_are_found(pattern, fault):
    found = pattern_fault(pattern)
    assert found is None if fault is None else str(found).startswith(fault)


def test_multiples_of_different_values_do_not_add_up():
    schema = {"properties": {f"p{n}": {"type": "number", "multipleOf": n} for n in (997, 991, 0.25, 83.3)}}
    assert enforceable(schema)["properties"]["p0.25"]["multipleOf"] == 0.25


def test_subschemas_are_listed_with_their_places():
    schema = enforceable(
        {
            "properties": {"a": {"items": {"type": "null"}}},
            "patternProperties": {"^b/": {}},
            "additionalProperties": False,
            "anyOf": [{"$ref": "#/$defs/x"}],
            "prefixItems": [{}],
            "$defs": {"x": {"type": "array"}},
        }
    )
    assert {path for path, _ in subschemas(schema, "#")} == {
        "#/$defs/x", "#/properties/a", "#/patternProperties/^b~1", "#/additionalProperties", "#/anyOf/0",
        "#/prefixItems/0",
    }  # fmt: skip


# -- clients' grammars -----------------------------------------------------------------------------


GOOD_LARK = r"""
// numbers in <brackets>
?start: expr [";"]           # <|end|> is only a comment
expr: term (("+" | "-") term)~0..3 -> sum
term: NUMBER | "(" expr ")" | TAG | "%"i | "@<|end|>"
NUMBER: /[0-9]+(\.[0-9]+)?/
TAG: /<(?<name>[a-z]+)>\/%@/is | "a".."z"
%import common.WS
%ignore WS
"""


def test_a_clients_grammar_is_written_anew_without_the_signs_of_special_tokens():
    text = safe_lark(GOOD_LARK)
    assert not set("<>@") & set(text.replace("->", ""))
    assert re.findall(r"%\w+", text) == ["%import", "%ignore"]
    assert '"\\u0040\\u003c|end|\\u003e"' in text
    assert r"/\x3c(?:[a-z]+)\x3e\/\x25\x40/is" in text


@pytest.mark.parametrize(
    ("pattern", "written"),
    [
        ("[(?<a>b]", r"[(?\x3ca\x3eb]"),
        ("[]>](?<n>a)", r"[]\x3e](?:a)"),
        ("[^]>](?<n>a)", r"[^]\x3e](?:a)"),
        ("[[:alpha:]<](?<n>a)", r"[[:alpha:]\x3c](?:a)"),
        (r"[\]<](?P<n>a)", r"[\]\x3c](?:a)"),
        (r"\[(?<n>a)]", r"\[(?:a)]"),
        ("[(?=)]", "[(?=)]"),
    ],
)
def test_names_of_groups_are_left_out_and_classes_stay_as_they_are(pattern, written):
    assert regex_as_lark(pattern) == f"start: /{written}/\n"


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        ("start: <|end|>", r"line 1 has special tokens \(<...>\)"),
        ('start: "a"\nx: <[200007]>', "line 2 has special tokens"),
        ("start: <[*]>", "special tokens"),
        ("start: @turn", "references to other grammars"),
        ('start: %json {"type": "object"}', "directives other than"),
        ('%llguidance {"no_forcing": true}\nstart: "a"', "directives other than"),
        ('start: %regex {"substring_chars": "a"}', "directives other than"),
        ("%import python.x\nstart: x", "directives other than"),
        ("%declare X\nstart: X", "directives other than"),
        ('start[stop="x"]: /a/', "options of rules"),
        ("start[capture]: /a/", "line 1 has options of rules"),
        ("start::x: /a/", "parameters of rules"),
        ('start: A\nA.2: "a"', "line 2 has priorities"),
        ('start: A\nA: ~"a"', "line 2 has a negation"),
        ("start: 'a'", "which begins nothing"),
        ('start: "a\nb"', "which begins nothing"),
        ("start: /a/x", "has the flags 'x'"),
        (r"start: /\<a/", "word boundary"),
        ("start: /(?=a)/", "lookaround"),
        ("start: /(?x)a # b\nc/", "line 1: the regular expression has the flag x"),
        ("start: /[a](?i-x:b)(?sx:c)/", "the flag x"),
        ("start: /(?<!a)/", "lookaround"),
        ("start: /(?<a/", "unclosed group name"),
        ('root: "a"', "has no rule 'start'"),
        ("  \n", "the grammar is empty"),
        ("start: " + '"a" ' * 20_000, f"at most {MAX_GRAMMAR_CHARS:,}"),
        ('start: "\ud800"', "half a surrogate"),
    ],
)
def test_a_clients_grammar_that_could_do_more_than_write_text_is_refused(definition, message):
    with pytest.raises(InputError, match=message) as caught:
        safe_lark(definition, "tools[0].format.definition")
    assert caught.value.param == "tools[0].format.definition"


@settings(deadline=None)
@given(st.text(alphabet="<>|[]@%\"'/\\#\n ab:*()i", max_size=60))
def test_no_text_leaves_a_sign_of_a_special_token_in_a_grammar(text):
    for read in (safe_lark, regex_as_lark):
        for definition in (text, f'start: "{text}"', f"start: /{text}/"):
            try:
                written = read(definition)
            except InputError:
                continue
            assert not set("<@") & set(written)
            assert "%" not in written.replace("%ignore", "").replace("%import common", "")


@pytest.mark.parametrize(
    ("definition", "lark"),
    [
        (r"^\d+/x$", r"start: /\d+\/x/"),
        (r"a\$", r"start: /a\$/"),
        (r"a\\$", r"start: /a\\/"),
        ("^$", 'start: ""'),
        ("a\n\tb\r", r"start: /a\n\tb\r/"),
        ("<@%>", r"start: /\x3c\x40\x25\x3e/"),
        (r"\/", r"start: /\//"),
    ],
)
def test_a_regular_expression_stands_between_slashes(definition, lark):
    assert regex_as_lark(definition) == lark + "\n"


@pytest.mark.parametrize(("definition", "message"), [("a\\", "ends in a backslash"), ("", "empty"), (None, "empty")])
def test_a_regular_expression_that_is_none_is_refused(definition, message):
    with pytest.raises(InputError, match=message):
        regex_as_lark(definition)
