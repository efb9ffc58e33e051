"""Whatever is sampled under a mask is a whole turn: proven with the hardest sampler, one that draws tokens blindly."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import numpy as np
import pytest

from ossia.engine import Engine, EngineConfig, Runner, SamplingParams
from ossia.engine.masks import GrammarCompiler, TurnConstraint
from ossia.engine.runner import NumBlocks
from ossia.errors import InputError, OssiaError
from ossia.harmony import Malformed, ParsedMessage, StreamParser, Tokenizer, ToolNamespace
from ossia.harmony.grammar import Json, Lark, Schema, Tool, ToolChoice, turn_grammar
from ossia.model.config import ModelConfig
from ossia.model.random_checkpoint import SHAPES, write_random_checkpoint
from ossia.model.weights import Checkpoint, load_weights
from ossia.ops import Batch, load

TOKENIZER = Tokenizer.o200k_harmony()
V = TOKENIZER.vocab_size
NUM_WORDS = -(-V // 32)
MAX_TOKENS = 1_500


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(TOKENIZER)


def ids(text: str) -> list[int]:
    """Ids of text in which special tokens are spelled out."""
    out: list[int] = []
    for i, piece in enumerate(text.replace("|>", "<|").split("<|")):
        out += [TOKENIZER.special(f"<|{piece}|>")] if i % 2 else TOKENIZER.encode(piece)
    return out


# -- a model with random logits --------------------------------------------------------------------


class Blind:
    """Samples at temperature 1 from logits that are noise, in masks of the full vocabulary.

    Texts of 200,000 equally likely tokens never end by themselves, so the tokens that close a message or a JSON value
    have higher logits; all others are alike. That is the only bias.
    """

    # Gumbel noise makes argmax a sample of the softmax; each draw reads it at another place.
    NOISE = np.random.default_rng(0).gumbel(size=4 * V).astype(np.float32)
    LOGITS_V = np.array(
        [8.5 if TOKENIZER.token_bytes(i).strip(b'"]},') == b"" else 0.0 for i in range(V)], dtype=np.float32
    )
    LOGITS_V[ids("<|message|><|channel|>")] = 1.5
    LOGITS_V[ids("<|end|><|return|><|call|>")] = 9.5

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.mask = np.zeros(NUM_WORDS, np.uint32)

    def token(self, constraint: TurnConstraint) -> int:
        constraint.fill(self.mask)
        allowed_V = np.unpackbits(self.mask.view(np.uint8), bitorder="little")[:V].view(bool)
        start = self._random.randrange(3 * V)
        token_id = int(np.where(allowed_V, self.NOISE[start : start + V] + self.LOGITS_V, -np.inf).argmax())
        assert allowed_V[token_id], "a mask without a token"
        constraint.accept(token_id)
        return token_id

    def turn(self, constraint: TurnConstraint, max_tokens: int = MAX_TOKENS) -> list[int]:
        out: list[int] = []
        while not constraint.is_complete and len(out) < max_tokens:
            out.append(self.token(constraint))
        return out


def parsed(token_ids: list[int]) -> list[ParsedMessage]:
    """Messages of a finished turn, which a strict parser must not complain of."""
    parser = StreamParser(TOKENIZER, strict=True)
    defects = [event for event in parser.feed_all(token_ids) + parser.close() if isinstance(event, Malformed)]
    assert not defects, (defects, TOKENIZER.decode(token_ids))
    assert sum(len(m.token_ids) for m in parser.messages) == len(token_ids)
    assert [m.stop for m in parser.messages[:-1]] == ["<|end|>"] * (len(parser.messages) - 1)
    assert all(m.recipient is None and m.channel in ("analysis", "commentary") for m in parser.messages[:-1])
    return parser.messages


def accepts(constraint: TurnConstraint, token_ids: list[int]) -> bool:
    mask = np.zeros(NUM_WORDS, np.uint32)
    for token_id in token_ids:
        constraint.fill(mask)
        if not mask[token_id // 32] >> (token_id % 32) & 1:
            return False
        constraint.accept(token_id)
    return True


# -- schemas, made at random -----------------------------------------------------------------------

PATTERNS = [
    "^[a-z]{2,8}$",
    "[0-9]{3}",
    "^(foo|bar|b(az)+)$",
    r"^\d{4}-\d{2}$",
    r"^[\w.-]+@[\w-]+\.[a-z]{2,3}$",
    "a.c",
    "x|y$",
]
WORDS = [
    "name",
    "größe",
    "名前",
    "a b",
    'quo"te',
    "back\\slash",
    "slash/",
    "😀",
    "$ref",
    "type",
    "",
    "naïve",
    "tab\t",
    "<|end|>",
]


class Schemas:
    """Random schemas; ``make`` draws one of the given kind."""

    KINDS = (
        "number",
        "string",
        "array",
        "object",
        "union",
        "recursive",
        "enum",
        "const",
        "merged",
        "reference",
        "mixed",
    )

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def make(self, kind: str, depth: int = 3) -> dict[str, Any]:
        return getattr(self, f"_{kind}")(depth)

    def any(self, depth: int) -> dict[str, Any]:
        simple = ["number", "string", "enum", "const"]
        nested = ["array", "object", "union", "merged"]
        return self.make(self.random.choice(simple if depth <= 0 else simple + nested), depth - 1)

    def _number(self, depth: int) -> dict[str, Any]:
        r = self.random
        out: dict[str, Any] = {"type": r.choice(["integer", "number"])}
        low = r.choice([-1000, -7, 0, 1, 3, 99, 12345]) + (r.random() < 0.3) * 0.5
        bounds = [("minimum", low), ("exclusiveMinimum", low), ("maximum", low + 200), ("exclusiveMaximum", low + 70.5)]
        for name, bound in r.sample(bounds, r.randrange(4)):
            out[name] = bound
        if r.random() < 0.3:
            out["multipleOf"] = r.choice([1, 2, 3, 7, 10, 0.5, 25, 0.25, 1.5, 2.5, 0.125])
        return out

    def _string(self, depth: int) -> dict[str, Any]:
        r = self.random
        out: dict[str, Any] = {"type": "string"}
        feature = r.randrange(5)
        if feature == 0:
            out["minLength"] = r.randrange(12)
            out["maxLength"] = out["minLength"] + r.randrange(12)
        elif feature == 1:
            out["pattern"] = r.choice(PATTERNS)
        elif feature == 2:
            out["format"] = r.choice(
                ["date", "time", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"]
            )
        elif feature == 3:
            out["pattern"] = r.choice(PATTERNS[:3])
            out["minLength"] = 3
        return out

    def _enum(self, depth: int) -> dict[str, Any]:
        r = self.random
        size = r.choice([1, 3, 20, 300])
        values: list[Any] = [f"{r.choice(WORDS)} {i}" for i in range(size)]
        return {"enum": values + r.sample([None, True, 0, -1.5, [1, "a"], {"k": {"n": None}}], r.randrange(4))}

    def _const(self, depth: int) -> dict[str, Any]:
        values = [None, False, 7, -0.25, 1e-3, 2**53, "é\n\t😀", [], {}, [[1]], {"é": [1, {"b": "c"}]}, *WORDS]
        return {"const": self.random.choice(values)}

    def _array(self, depth: int) -> dict[str, Any]:
        r = self.random
        out: dict[str, Any] = {"type": "array"}
        if r.random() < 0.8:
            out["items"] = r.choice([self.any(depth), False]) if r.random() < 0.9 else True
        if r.random() < 0.3 or out.get("items") is False:
            out["prefixItems"] = [self.any(depth) for _ in range(r.randrange(1, 4))]
        if out.get("items") is not False and r.random() < 0.6:
            out["minItems"] = r.randrange(4)
            out["maxItems"] = out["minItems"] + r.randrange(4)
        return out

    def _object(self, depth: int) -> dict[str, Any]:
        r = self.random
        names = r.sample(WORDS, r.randrange(5))
        out: dict[str, Any] = {"type": "object", "properties": {name: self.any(depth) for name in names}}
        out["required"] = [name for name in names if r.random() < 0.7]
        closed = r.random()
        if closed < 0.6:
            out["additionalProperties"] = False
        elif closed < 0.8:
            out["additionalProperties"] = self.any(depth)
        if r.random() < 0.2:
            out["patternProperties"] = {"^x-[a-z]+$": self.any(depth), "^[0-9]+$": {"type": "boolean"}}
        if r.random() < 0.2 and len(out["required"]) == len(names):
            out["maxProperties"] = len(names) + r.randrange(3)
        if r.random() < 0.2 and len(out["required"]) == len(names) and out.get("additionalProperties") is not False:
            out["minProperties"] = len(names) + 1
            out.pop("maxProperties", None)
        return out

    def _union(self, depth: int) -> dict[str, Any]:
        r = self.random
        form = r.randrange(3)
        if form == 0:
            return {"anyOf": [self.any(depth) for _ in range(r.randrange(1, 4))]}
        if form == 1:
            return {"type": r.sample(["null", "boolean", "integer", "string", "array", "object"], 3), "maxLength": 5}
        shared = {"type": "object", "additionalProperties": False, "required": ["kind", "v"]}
        return {
            "oneOf": [
                {**shared, "properties": {"kind": {"const": f"k{i}"}, "v": self.any(depth)}}
                for i in range(r.randrange(2, 5))
            ]
        }

    def _merged(self, depth: int) -> dict[str, Any]:
        r = self.random
        a = {"type": "object", "properties": {"a": self.any(depth)}, "required": ["a"]}
        b = {"type": "object", "properties": {"b": self._number(0)}, "required": ["b"]}
        forms = [
            {"allOf": [a, b]},
            {**a, "allOf": [b]},
            {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 6}, {"pattern": "[a-z]"}]},
            {
                "allOf": [{"type": ["integer", "string"]}, {"minimum": 5}],
                "anyOf": [{"type": "integer"}, {"maxLength": 3}],
            },
            {"type": "integer", "minimum": 3, "anyOf": [{"maximum": 10}, {"multipleOf": 5, "maximum": 500}]},
        ]
        return r.choice(forms)

    def _recursive(self, depth: int) -> dict[str, Any]:
        r = self.random
        node = {
            "type": "object",
            "properties": {"value": self.any(1), "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"type": "null"}]}},
            "required": ["value", "next"],
            "additionalProperties": False,
        }
        tree = {"type": "object", "properties": {"kids": {"type": "array", "items": {"$ref": "#"}, "maxItems": 2}}}
        expression = {
            "anyOf": [
                {"type": "number"},
                {
                    "type": "array",
                    "prefixItems": [{"enum": ["+", "*"]}, {"$ref": "#/$defs/e"}, {"$ref": "#/$defs/e"}],
                    "items": False,
                    "minItems": 3,
                },
            ]
        }
        return r.choice(
            [
                {"$ref": "#/$defs/node", "$defs": {"node": node}},
                tree,
                {
                    "$ref": "#/definitions/e%20~1~0",
                    "definitions": {"e /~": {"$ref": "#/$defs/e"}},
                    "$defs": {"e": expression},
                },
            ]
        )

    def _reference(self, depth: int) -> dict[str, Any]:
        inner = self.any(depth)
        return {
            "type": "object",
            "properties": {"here": inner, "there": {"$ref": "#/properties/here"}, "far": {"$ref": "#/$defs/x/items"}},
            "required": ["there", "far"],
            "additionalProperties": False,
            "$defs": {"x": {"items": self.any(1)}},
        }

    def _mixed(self, depth: int) -> dict[str, Any]:
        return {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            "title": "Mixed",
            "type": "object",
            "properties": {name: self.any(2) for name in self.random.sample(WORDS, 4)},
            "required": self.random.sample(WORDS, 2),
        }


def schemas(kind: str, seeds: range) -> Iterator[tuple[int, dict[str, Any]]]:
    for seed in seeds:
        yield seed, Schemas(seed * 31 + len(kind)).make(kind)


def check_json(text: str, schema: dict[str, Any]) -> None:
    value = json.loads(text)
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    assert not list(validator.iter_errors(value)), (text, schema)


# -- schemas ---------------------------------------------------------------------------------------

OTHERS = [
    Tool.function("lookup", {"type": "object", "properties": {"q": {"type": "string"}}, "required": ["q"]}),
    Tool.function("lookup_all", strict=False),
    Tool.custom("note"),
    *Tool.builtin(ToolNamespace.browser()),
    *Tool.builtin(ToolNamespace.python()),
]


def blind_schema_turn(compiler: GrammarCompiler, seed: int, schema: dict[str, Any]) -> bool:
    """One turn bound to the schema, as output or arguments, which must be as bound; whether it came to its end."""
    as_arguments = bool(seed % 2) and "$ref" not in json.dumps(schema)
    if as_arguments:
        schema = {"type": "object", "properties": {"x": schema}, "required": ["x"], "additionalProperties": False}
        choice = ToolChoice("required", ("functions.f",))
        grammar = turn_grammar([Tool.function("f", schema), *OTHERS], tool_choice=choice)
    else:
        grammar = turn_grammar(OTHERS, tool_choice=ToolChoice("none"), output=Schema(schema))
    constraint = compiler.constraint(grammar, max_reasoning_tokens=seed % 40)
    token_ids = Blind(seed).turn(constraint)
    if not constraint.is_complete:
        return False
    last = parsed(token_ids)[-1]
    assert last.recipient == ("functions.f" if as_arguments else None)
    check_json(last.text, schema)
    return True


@pytest.mark.parametrize("kind", Schemas.KINDS)
def test_what_a_blind_sampler_writes_is_what_the_schema_accepts(compiler, kind):
    finished = [blind_schema_turn(compiler, seed, schema) for seed, schema in schemas(kind, range(30))]
    assert sum(finished) >= 28


@pytest.mark.slow
@pytest.mark.parametrize("kind", Schemas.KINDS)
def test_what_a_blind_sampler_writes_is_what_any_of_many_schemas_accepts(compiler, kind):
    finished = [blind_schema_turn(compiler, seed, schema) for seed, schema in schemas(kind, range(30, 330))]
    assert sum(finished) >= 285


@pytest.mark.parametrize(
    ("bounds", "allowed", "excluded"),
    [
        ({"exclusiveMinimum": 0, "maximum": 0.5}, ("0.1", "0.0001", "0.5"), ("0", "0.0", "0.6")),
        ({"exclusiveMinimum": 1, "exclusiveMaximum": 1.9}, ("1.5", "1.01"), ("1", "1.0", "1.9")),
        ({"minimum": -10.5, "exclusiveMaximum": -10}, ("-10.5", "-10.2"), ("-10", "-10.0")),
        ({"minimum": -0.5, "exclusiveMaximum": 0}, ("-0.5", "-0.2"), ("-0", "0", "-0.0")),
        ({"allOf": [{"exclusiveMinimum": 99}, {"maximum": 99.5}]}, ("99.2", "99.5"), ("99", "99.0")),
        ({"type": "integer", "exclusiveMinimum": 2**48, "maximum": 2**48 + 1}, (str(2**48 + 1),), (str(2**48),)),
        ({"exclusiveMinimum": -1, "exclusiveMaximum": 2}, ("-0.9", "0", "1.9"), ("-1", "2", "2.0")),
    ],
)
def test_a_bound_that_excludes_a_number_excludes_it_in_every_range(compiler, bounds, allowed, excluded):
    grammar = turn_grammar(output=Schema({"type": "number", **bounds}))
    for text in (*allowed, *excluded):
        turn = ids(f"<|channel|>final<|message|>{text}<|return|>")
        assert accepts(compiler.constraint(grammar), turn) == (text in allowed), text


@pytest.mark.parametrize(
    ("schema", "allowed", "excluded"),
    [
        ({"type": "string", "maxLength": 2, "nullable": True}, ('"ab"', "null"), ("1", '"abc"')),
        ({"enum": ["a"], "nullable": True}, ('"a"', "null"), ('"b"',)),
        ({"$ref": "#/$defs/t", "nullable": True}, ("3", "null"), ('"b"',)),
        ({"type": ["integer", "null"], "nullable": True}, ("3", "null"), ('"b"',)),
        ({"type": "integer", "nullable": False}, ("3",), ("null",)),
    ],
)
def test_what_the_model_is_told_may_be_null_may_be(compiler, schema, allowed, excluded):
    whole = {"type": "object", "properties": {"x": schema}, "required": ["x"], "$defs": {"t": {"type": "integer"}}}
    grammar = turn_grammar(output=Schema({**whole, "additionalProperties": False}))
    for text in (*allowed, *excluded):
        turn = ids(f'<|channel|>final<|message|>{{"x":{text}}}<|return|>')
        assert accepts(compiler.constraint(grammar), turn) == (text in allowed), text


def test_comments_may_stand_between_the_alternatives_of_a_rule(compiler):
    definition = 'start: "a"\n  // one\n\n  # two\n  | "b"\n// three\nrest: "c"\n'
    grammar = turn_grammar(output=Lark(definition))
    said = [ids(f"<|channel|>final<|message|>{text}<|return|>") for text in "abc"]
    assert [accepts(compiler.constraint(grammar), turn) for turn in said] == [True, True, False]


# -- tools -----------------------------------------------------------------------------------------

LOOKUP = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
ANSWER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}
CALCULATION = """
// Sums, with the signs of a special token in a string.
start: sum
sum: term (("+" | "-" | "<|end|>") term)*
term: NUMBER | "(" sum ")"
NUMBER: /[0-9]{1,4}/
%ignore /[ ]/
"""
TOOLS = [
    Tool.function("weather", LOOKUP),
    Tool.function("weather_map", strict=False),
    Tool.function("open", LOOKUP, namespace="crm"),
    Tool.custom("note"),
    Tool.custom("calculate", "lark", CALCULATION),
    Tool.custom("ticket", "regex", r"^[A-Z]{2,4}-\d+$"),
    *Tool.builtin(ToolNamespace.browser(), ["search", "open"]),
    *Tool.builtin(ToolNamespace.python()),
]
CALL = "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>"
CHOICES = [
    ToolChoice(),
    ToolChoice("none"),
    ToolChoice("required"),
    ToolChoice("required", ("browser",)),
    ToolChoice("auto", ("functions.weather", "python")),
    *(ToolChoice("required", (tool.recipient,)) for tool in TOOLS),
]


def check_message(message: ParsedMessage, choice: ToolChoice, output: dict[str, Any] | None) -> None:
    """The last message of a turn obeys the choice and its tool's declaration."""
    if message.recipient is None:
        assert choice.mode != "required"
        assert (message.channel, message.stop) == ("final", "<|return|>")
        if output is not None:
            check_json(message.text, output)
        return
    assert choice.mode != "none"
    assert message.stop == "<|call|>"
    (tool,) = [tool for tool in choice.callable(TOOLS) if tool.recipient == message.recipient]
    assert message.channel == tool.channel
    if tool.recipient == "functions.calculate":
        assert re.fullmatch(r"[0-9+() -]|<\|end\|>|[0-9+() <|end>-]+", message.text)
    elif tool.recipient == "functions.ticket":
        assert re.fullmatch(r"[A-Z]{2,4}-\d+", message.text)
    elif isinstance(tool.body, Schema):
        assert message.content_type == ("code" if tool.channel == "analysis" else "<|constrain|>json")
        check_json(message.text, dict(tool.body.schema))
    elif isinstance(tool.body, Json):
        assert isinstance(json.loads(message.text), dict)


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"{choice.mode} {choice.recipients or ''}")
def test_every_turn_obeys_the_tool_choice(compiler, choice):
    for seed in range(8):
        output = ANSWER if seed % 2 else None
        grammar = turn_grammar(TOOLS, tool_choice=choice, output=Schema(output) if output else None)
        constraint = compiler.constraint(grammar, max_reasoning_tokens=50)
        messages = parsed(Blind(1000 + seed).turn(constraint))
        assert constraint.is_complete
        check_message(messages[-1], choice, output)


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>", True),
        ("<|channel|>commentary<|message|>Well.<|end|><|start|>assistant<|channel|>analysis<|message|>x<|end|>", True),
        (CALL + '{"city":"Bern","days":3}<|call|>', True),
        (CALL + '{"city": "Bern", "days": 3}<|call|>', True),
        (' to=functions.weather<|channel|>commentary <|constrain|>json<|message|>{"city":"', True),
        ("<|channel|>analysis to=python code<|message|>print('<')\n<|call|>", True),
        ('<|channel|>analysis to=browser.search code<|message|>{"query":"x"}<|call|>', True),
        ('<|channel|>final <|constrain|>json<|message|>{"n":3}<|return|>', False),
        ("<|channel|>final<|message|>Yes.<|end|>", False),
        ("<|channel|>final<|message|>Yes.<|call|>", False),
        ("<|channel|>final<|message|>Yes.<|start|>", False),
        ("<|channel|>analysis to=browser.find code<|message|>", False),
        ("<|channel|>analysis to=functions.weather ", False),
        ("<|channel|>commentary to=python", False),
        ("<|channel|>commentary to=functions.weathers", False),
        ("<|channel|>commentary to=container.exec", False),
        (CALL + '{"city":"Bern"}', False),
        (CALL + '{"city":  ', False),
        (CALL + '{"city":"Bern","days":3} ', False),
        ("<|channel|>final<|channel|>", False),
        ("<|message|>", False),
        ("Yes.", False),
        ("<|return|>", False),
        ("<|endoftext|>", False),
    ],
)
def test_a_turn_is_spelled_as_the_model_was_trained_and_not_otherwise(compiler, text, accepted):
    assert accepts(compiler.constraint(turn_grammar(TOOLS)), ids(text)) == accepted


def test_signs_of_a_group_inside_a_class_are_characters(compiler):
    for tool in (Tool.custom("c", "regex", "[(?<>)]{2}"), Tool.custom("c", "lark", "start: /[(?<>)]{2}/")):
        for text, accepted in (("<>", True), ("(?", True), ("(:", False)):
            constraint = compiler.constraint(turn_grammar([tool]))
            turn = ids("<|channel|>commentary to=functions.c<|message|>") + TOKENIZER.encode(text)
            assert accepts(constraint, [*turn, *ids("<|call|>")]) == accepted


def test_a_json_answer_may_be_announced_in_its_header(compiler):
    grammar = turn_grammar(output=Schema(ANSWER))
    for text in ("<|channel|>final<|message|>", "<|channel|>final <|constrain|>json<|message|>"):
        constraint = compiler.constraint(grammar)
        assert accepts(constraint, ids(text + '{"n":12}<|return|>'))
        assert constraint.is_complete


def test_text_that_spells_a_special_token_stays_text(compiler):
    constraint = compiler.constraint(turn_grammar(TOOLS))
    spelled = TOKENIZER.encode("<|end|><|start|>system<|message|>")
    assert accepts(constraint, [*ids("<|channel|>final<|message|>"), *spelled])
    assert not constraint.is_complete
    assert accepts(constraint, ids("<|return|>"))


def test_no_special_token_is_allowed_inside_of_any_content(compiler):
    stops = {TOKENIZER.special(name) for name in ("<|end|>", "<|return|>", "<|call|>")}
    others = np.array(sorted(TOKENIZER.special_ids - stops))
    inside = {"note": "a", "calculate": "(", "ticket": "AB", "weather": '{"city":"', "weather_map": '{"'}
    for name, text in inside.items():
        constraint = compiler.constraint(turn_grammar(TOOLS))
        kind = " <|constrain|>json" if name.startswith("weather") else ""
        assert accepts(constraint, ids(f"<|channel|>commentary to=functions.{name}{kind}<|message|>{text}"))
        mask = np.zeros(NUM_WORDS, np.uint32)
        constraint.fill(mask)
        assert mask.any()
        assert not (mask[others // 32] >> (others % 32).astype(np.uint32) & 1).any()


# -- reasoning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [1, 2, 7, 40])
def test_reasoning_ends_at_its_cap_and_the_answer_follows(compiler, cap):
    constraint = compiler.constraint(turn_grammar(TOOLS), max_reasoning_tokens=cap)
    assert accepts(constraint, ids("<|channel|>analysis<|message|>"))
    blind = Blind(cap)
    # Without its bias to end, analysis would go on and on.
    blind.LOGITS_V = np.zeros(V, np.float32)
    tail = []
    while not tail or tail[-1] != TOKENIZER.special("<|end|>"):
        tail.append(blind.token(constraint))
    # An open character is completed before the end.
    assert cap <= constraint.num_reasoning_tokens == len(tail) - 1 <= cap + 3
    rest = Blind(cap).turn(constraint)
    messages = parsed([*ids("<|channel|>analysis<|message|>"), *tail, *rest])
    assert constraint.is_complete
    assert not [m for m in messages[1:] if m.channel == "analysis" and m.recipient is None]
    assert constraint.num_reasoning_tokens == len(tail) - 1


def test_analysis_that_ends_at_its_cap_by_itself_is_the_last(compiler):
    constraint = compiler.constraint(turn_grammar(), max_reasoning_tokens=2)
    text = "<|channel|>analysis<|message|>{}<|end|><|start|>assistant<|channel|>analysis<|message|>"
    assert accepts(constraint, ids(text.format("a")))
    assert accepts(constraint, ids(" b<|end|><|start|>assistant<|channel|>"))
    assert constraint.num_reasoning_tokens == 2
    assert not accepts(constraint, ids("analysis"))
    assert not accepts(compiler.constraint(turn_grammar(), max_reasoning_tokens=2), ids(text.format("a b c")))


def test_no_reasoning_at_all_can_be_asked_for(compiler):
    constraint = compiler.constraint(turn_grammar(TOOLS), max_reasoning_tokens=0)
    assert not accepts(constraint, ids("<|channel|>analysis<|message|>"))
    # Calls of built-in tools stand on that channel, and stay possible.
    for cap in (0, 5):
        constraint = compiler.constraint(turn_grammar(TOOLS), max_reasoning_tokens=cap)
        assert accepts(constraint, ids("<|channel|>analysis to=python code<|message|>1+1<|call|>"))
        assert constraint.num_reasoning_tokens == 0
    with pytest.raises(InputError, match="max_reasoning_tokens is -1"):
        compiler.constraint(turn_grammar(), max_reasoning_tokens=-1)


def test_a_preamble_is_no_reasoning(compiler):
    constraint = compiler.constraint(turn_grammar(TOOLS), max_reasoning_tokens=2)
    assert accepts(constraint, ids("<|channel|>commentary<|message|>One moment, I will see.<|end|>"))
    assert constraint.num_reasoning_tokens == 0
    assert accepts(constraint, ids("<|start|>assistant<|channel|>analysis<|message|>a"))


# -- what cannot be --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (Tool.function("f", {"properties": {"a": {"oneOf": [{"type": "number"}, {"type": "integer"}]}}}),
         "the schema at #/properties/a cannot be enforced while sampling: it is not clear that the options of oneOf"),
        (Tool.function("f", {"properties": {"a": {"$ref": "#/$defs/t"}},
                             "$defs": {"t": {"prefixItems": [{"pattern": "a$b"}]}}}),
         r"the schema at #/\$defs/t/prefixItems/0 cannot be enforced while sampling: lookarounds not supported"),
        (Tool.function("f", {"properties": {"a": {"minimum": 3, "maximum": 2, "type": "integer"}}, "required": ["a"]}),
         r"the schema at #/properties/a cannot .* Unsatisfiable schema: minimum \(3\) is greater than maximum \(2\)"),
        (Tool.function("f", {"patternProperties": {"^a": {}, "b$": {"type": "null"}}}), "are not disjoint"),
        (Tool.function("f", {"type": "array"}), 'at #/type, the type is "array"; expected "object"'),
        (Tool.custom("f", "lark", "start: a"), "the grammar cannot be enforced while sampling: .*unknown name"),
        (Tool.custom("f", "lark", 'start: "a" "'), "begins nothing"),
        (Tool.custom("f", "regex", "a(b"), "the grammar cannot be enforced while sampling: .*unclosed group"),
        (Tool.custom("f", "regex", r"a\bc"), "the grammar cannot be enforced while sampling: .*lookarounds"),
    ],
)  # fmt: skip
def test_what_cannot_be_enforced_is_refused_with_its_place(compiler, tool, message):
    tools = [Tool.function("good", LOOKUP, param="tools[0]"), dataclasses.replace(tool, param="tools[1]")]
    with pytest.raises(InputError, match=message) as caught:
        compiler.constraint(turn_grammar(tools))
    assert caught.value.param == "tools[1]"


def test_parts_that_are_too_much_only_together_are_refused_together(compiler, monkeypatch):
    grammar = turn_grammar(TOOLS)
    real = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda text: real("no grammar" if text == grammar.text else text))
    monkeypatch.setattr(compiler, "_compiled", type(compiler._compiled)())
    with pytest.raises(InputError, match="the tools and formats together cannot be enforced") as caught:
        compiler.constraint(grammar)
    assert caught.value.param == "tools"


HOSTILE: dict[str, Any] = {
    "many values": {"enum": [f"{i * 7919 % 10_007:05}" * 4 for i in range(10_000)]},
    "long counts": {"type": "string", "minLength": 2**30, "maxLength": 2**31 - 1},
    "many items": {"type": "array", "minItems": 2**30, "items": {"type": "integer"}},
    "optional": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(400)}},
    "required": {"type": "object", "properties": (p := {f"p{i}": {} for i in range(4_900)}), "required": [*p]},
    "patterns": {"anyOf": [{"items": {"type": "string", "pattern": f"^{'.' * i}a*b{{1,99}}"}} for i in range(300)]},
    "states": {"type": "string", "pattern": "(a|b)*a(a|b){30}$"},
    "repeats": {"type": "string", "pattern": "((a{1,100}){1,100}){1,100}"},
    "both": {"allOf": [{"type": "string", "pattern": f"^(.{{{n}}})*$"} for n in (7, 11, 13, 17, 19)]},
    "alternatives": {"type": "string", "pattern": "|".join(f".*{chr(97 + i)}.{{{i * 7}}}" for i in range(24))},
    "choices": {"anyOf": [{"properties": {f"p{i}_{j}": {} for i in range(300)}} for j in range(10)]},
}


@pytest.mark.slow
@pytest.mark.parametrize("schema", HOSTILE.values(), ids=HOSTILE)
def test_a_schema_made_to_be_slow_is_followed_or_refused_in_time(compiler, schema):
    began_s = time.thread_time()
    try:
        constraint = compiler.constraint(turn_grammar(output=Schema(schema)))
        Blind(0).turn(constraint, 200)
    except InputError as error:
        assert "make it simpler" in error.message
    assert time.thread_time() - began_s < 15


def test_masks_that_take_too_long_end_their_own_generation(compiler, monkeypatch):
    constraint = compiler.constraint(turn_grammar())
    monkeypatch.setattr("ossia.engine.masks.time.thread_time", iter(range(0, 100, 2)).__next__)
    with pytest.raises(InputError, match="its masks take too long; make it simpler"):
        Blind(0).turn(constraint)


def test_a_grammar_that_nothing_can_satisfy_says_so_instead_of_going_on(compiler):
    # Each alone is possible; that nothing is both shows only on the way.
    schema = {"allOf": [{"multipleOf": 0.5}, {"minimum": 0.6, "maximum": 0.9}], "type": "integer"}
    with pytest.raises(InputError):
        Blind(0).turn(compiler.constraint(turn_grammar(output=Schema(schema), reasoning=False)))


# -- the constraint --------------------------------------------------------------------------------


def test_a_turn_that_is_cut_off_is_not_complete(compiler):
    constraint = compiler.constraint(turn_grammar(TOOLS))
    assert accepts(constraint, ids('<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city'))
    assert not constraint.is_complete


def test_behind_the_end_only_a_stop_may_follow(compiler):
    constraint = compiler.constraint(turn_grammar())
    assert accepts(constraint, ids("<|channel|>final<|message|><|return|>"))
    mask = np.full(NUM_WORDS + 3, 0xFFFFFFFF, np.uint32)
    constraint.fill(mask)
    assert sorted(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))) == sorted(TOKENIZER.stop_ids)
    constraint.accept(TOKENIZER.stop_ids[0])
    assert constraint.is_complete


def test_a_mask_of_a_wider_model_allows_nothing_beyond_the_vocabulary(compiler):
    constraint = compiler.constraint(turn_grammar())
    mask = np.full(NUM_WORDS + 3, 0xFFFFFFFF, np.uint32)
    constraint.fill(mask)
    assert np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist() == ids("<|channel|>")
    with pytest.raises(OssiaError, match="a mask of 5 words came"):
        constraint.fill(mask[:5])


def test_a_token_that_the_mask_does_not_allow_is_refused(compiler):
    constraint = compiler.constraint(turn_grammar())
    with pytest.raises(OssiaError, match="token 5 is not allowed here") as caught:
        constraint.accept(5)
    assert not isinstance(caught.value, InputError)


def test_constraints_of_one_grammar_do_not_disturb_each_other(compiler):
    grammar = turn_grammar(TOOLS)
    first, second = compiler.constraint(grammar), compiler.constraint(grammar)
    assert accepts(first, ids("<|channel|>final<|message|>Yes."))
    assert accepts(second, ids("<|channel|>analysis<|message|>So."))
    assert accepts(first, ids("<|return|>"))
    assert not second.is_complete


def test_constraints_may_be_made_and_used_in_many_threads(compiler):
    def turn(seed: int) -> list[int]:
        return Blind(seed).turn(compiler.constraint(turn_grammar(TOOLS), max_reasoning_tokens=9))

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(turn, range(12))) == [turn(seed) for seed in range(12)]


class Bytes:
    """A vocabulary of single bytes."""

    vocab_size = 263
    NUM_WORDS = -(-vocab_size // 32)

    def __init__(self) -> None:
        names = ("return", "constrain", "channel", "start", "end", "message", "call")
        self.special_tokens = {f"<|{name}|>": 256 + i for i, name in enumerate(names)}

    def token_bytes(self, token_id: int) -> bytes:
        return bytes([token_id]) if token_id < 256 else list(self.special_tokens)[token_id - 256].encode()

    def token_of(self, spelling: bytes) -> int | None:
        return spelling[0] if len(spelling) == 1 else None

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    @classmethod
    def draw(cls, random: random.Random, constraint: TurnConstraint) -> int:
        """Any token that may follow, and accept it; special ones more often, since they end things."""
        mask = np.zeros(cls.NUM_WORDS, np.uint32)
        constraint.fill(mask)
        allowed = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
        special = allowed[allowed >= 256]
        token_id = int(random.choice(special if len(special) and random.random() < 0.3 else allowed))
        constraint.accept(token_id)
        return token_id


def test_a_certain_text_may_be_spelled_as_the_vocabulary_spells_it_as_a_whole():
    """What is left of it may be spelled in another way when it is alone."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {one.encode(): 256 + i for i, one in enumerate(("is", "ys", "an", "al", "alys", "lys", "si"))}
    special = {f"<|{name}|>": 300 + i for i, name in enumerate(("return", "constrain", "channel", "start", "end"))}
    special |= {"<|message|>": 305, "<|call|>": 306, "<|endoftext|>": 307}
    vocabulary = Tokenizer(ranks, special)
    compiler = GrammarCompiler(vocabulary)
    for spelled in (vocabulary.encode("analysis"), [ranks[b"an"], ranks[b"alys"], ranks[b"is"]], list(b"analysis")):
        constraint = compiler.constraint(turn_grammar([]))
        for token_id in [special["<|channel|>"], *spelled, special["<|message|>"]]:
            mask = np.zeros(-(-vocabulary.vocab_size // 32), np.uint32)
            constraint.fill(mask)
            assert mask[token_id // 32] >> np.uint32(token_id % 32) & 1
            constraint.accept(token_id)


def test_any_vocabulary_will_do_that_has_harmonys_special_tokens():
    vocabulary = Bytes()
    compiler = GrammarCompiler(vocabulary)
    constraint = compiler.constraint(turn_grammar(output=Json()), max_reasoning_tokens=3)
    mask = np.zeros(-(-vocabulary.vocab_size // 32), np.uint32)
    special = vocabulary.special_tokens
    header = [special["<|channel|>"], *b"analysis", special["<|message|>"]]
    for token_id in [*header, *b"abc", special["<|end|>"], special["<|start|>"], *b"assistant"]:
        constraint.fill(mask)
        assert mask[token_id // 32] >> (token_id % 32) & 1
        constraint.accept(token_id)
    vocabulary.special_tokens = {name: i for name, i in special.items() if name != "<|call|>"}
    with pytest.raises(InputError, match=r"lacks <\|call\|>"):
        GrammarCompiler(vocabulary)


def test_the_latest_grammars_are_kept():
    compiler = GrammarCompiler(Bytes(), max_grammars=2)
    grammars = [turn_grammar(output=Schema({"const": i})) for i in range(3)]
    for grammar in (*grammars, grammars[1]):
        compiler.constraint(grammar)
    assert list(compiler._compiled) == [grammars[2].text, grammars[1].text]
    small = GrammarCompiler(Bytes(), max_grammar_chars=len(grammars[0].text))
    for grammar in grammars:
        small.constraint(grammar)
    assert list(small._compiled) == [grammars[2].text]


# Needs more states the more different texts it has seen.
GROWING = Schema({"type": "string", "pattern": "^[ab]*a[ab]{12}$"})


@pytest.mark.parametrize("cap", [None, 0, 4])
def test_a_grammar_that_much_was_sampled_under_goes_on_in_a_new_automaton(cap):
    compiler = GrammarCompiler(Bytes(), max_states=200)
    grammar = turn_grammar(output=GROWING, reasoning=cap != 0)
    # Kept, since a new one may get the place of one that is gone.
    used, draw = {}, random.Random(0)
    for _ in range(60):
        constraint = compiler.constraint(grammar, max_reasoning_tokens=cap)
        compiled = compiler._compiled[grammar.text if cap != 0 else grammar.rest]
        used[id(compiled)] = compiled
        for _ in range(60):
            if not constraint.is_complete:
                Bytes.draw(draw, constraint)
    assert len(used) > 1


def test_a_walk_that_was_begun_anew_allows_what_it_would_have_allowed():
    grammar = turn_grammar(output=GROWING, reasoning=False)
    small, large = GrammarCompiler(Bytes(), max_states=200), GrammarCompiler(Bytes())
    renewed = 0
    for seed in range(40):
        draw = random.Random(seed)
        one, other = small.constraint(grammar), large.constraint(grammar)
        masks = np.zeros((2, Bytes.NUM_WORDS), np.uint32)
        for _ in range(60):
            one.fill(masks[0]), other.fill(masks[1])
            assert np.array_equal(*masks)
            token_id = Bytes.draw(draw, one)
            other.accept(token_id)
            if one.is_complete:
                break
        renewed += one._walk._renewed_at is not None
    assert renewed


def test_a_turn_that_fills_an_automaton_by_itself_is_refused():
    compiler = GrammarCompiler(Bytes(), max_states=100)
    with pytest.raises(InputError, match=r"too many states.*make it simpler"):
        for seed in range(200):
            constraint = compiler.constraint(turn_grammar(output=GROWING, reasoning=False))
            draw = random.Random(seed)
            while not constraint.is_complete:
                Bytes.draw(draw, constraint)


# -- the engine ------------------------------------------------------------------------------------


class RandomRunner(Runner):
    """A model whose logits are noise, with Blind's bias."""

    window = 128

    def __init__(self) -> None:
        self.config = ModelConfig(num_layers=1, vocab_size=V, max_context=4_096, stop_token_ids=TOKENIZER.stop_ids)
        self.options = EngineConfig(max_context=4_096)
        self.num_blocks = NumBlocks(1_024, 1_024)
        self._random = np.random.default_rng(0)

    def run(self, batch: Batch) -> np.ndarray:
        noise = self._random.standard_normal((len(batch.logit_rows_R), V), np.float32)
        return noise + Blind.LOGITS_V


def check_engine(engine: Engine, compiler: GrammarCompiler, bias: dict[int, float], num_requests: int) -> float:
    """Whole turns of an engine are as bound, cut ones are known as such; the share of whole ones."""
    grammar = turn_grammar(TOOLS, output=Schema(ANSWER))
    constraints: dict[int, TurnConstraint] = {}
    for seed in range(num_requests):
        constraint = compiler.constraint(grammar, max_reasoning_tokens=5)
        params = SamplingParams(seed=seed, constraint=constraint, logit_bias=bias, max_tokens=200)
        constraints[engine.add_request(ids("<|start|>assistant"), params)] = constraint
    answers: dict[int, list[int]] = {request_id: [] for request_id in constraints}
    reasons = {}
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            answers[output.request_id].append(output.token_id)
            reasons[output.request_id] = output.finish_reason
    for request_id, constraint in constraints.items():
        assert constraint.is_complete == (reasons[request_id] == "stop")
        if constraint.is_complete:
            check_message(parsed(answers[request_id])[-1], ToolChoice(), ANSWER)
    return sum(constraint.is_complete for constraint in constraints.values()) / num_requests


def test_an_engine_samples_whole_turns_from_noise_at_temperature_one(compiler):
    assert check_engine(Engine(RandomRunner()), compiler, {}, 24) >= 0.8


@pytest.mark.slow
def test_an_engine_samples_whole_turns_from_random_weights_at_temperature_one(compiler, tmp_path):
    config = SHAPES["tiny"]
    write_random_checkpoint(tmp_path / "model", config)
    ops = load("reference")
    runner = Runner(ops, config, load_weights(Checkpoint.open(tmp_path / "model"), ops), EngineConfig())
    bias = {int(i): float(Blind.LOGITS_V[i]) for i in np.flatnonzero(Blind.LOGITS_V)}
    assert check_engine(Engine(runner), compiler, bias, 16) >= 0.8
