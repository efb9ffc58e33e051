"""Declarations of schemas that openai-harmony cannot take, and a few that are read by eye."""

import math
from typing import Any

import pytest

from ossia.harmony.typescript import compact_json, typescript


def nested(depth: int, keyword: str) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        if keyword == "items":
            schema = {"type": "array", "items": schema}
        elif keyword == "oneOf":
            schema = {"oneOf": [schema]}
        else:
            schema = {"type": "object", "properties": {"a": schema}}
    return schema


def itself() -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "object", "default": []}
    schema["properties"] = {"again": schema}
    schema["default"].append(schema["default"])
    return schema


@pytest.mark.parametrize("keyword", ["items", "oneOf", "properties"])
def test_deep_schema_is_cut_and_not_a_crash(keyword: str) -> None:
    assert "any" in typescript(nested(10_000, keyword))
    assert "string" in typescript(nested(100, keyword))


@pytest.mark.parametrize(
    "schema",
    [
        None,
        True,
        [],
        "string",
        {},
        {"$ref": "#"},
        {"anyOf": [{"type": "string"}]},
        {"type": None},
        {"type": "tuple"},
        {"oneOf": {}, "properties": []},
        {"const": {1, 2}},
    ],
)
def test_schema_without_a_known_type_is_any(schema: Any) -> None:
    assert typescript(schema) == "any"


def test_schema_that_holds_itself_ends() -> None:
    assert typescript(itself()).count("again") < 200


def test_alternatives_that_are_no_schema_are_any() -> None:
    assert typescript({"oneOf": [True, {"type": "null", "nullable": True}]}) == "\n | any\n | any | null"
    assert typescript({"type": "object", "properties": {"a": {"oneOf": [None]}}}) == "{\na?:\n | any\n,\n}"


def test_keys_and_values_that_are_no_json_are_spelled() -> None:
    schema = {"type": "object", "properties": {1: {"type": "string", "default": {3}}, None: {"default": {2: math.nan}}}}
    assert typescript(schema) == '{\n1?: string, // default: "{3}"\nnull?: any, // default: {"2":null}\n}'


def test_object_is_declared_as_in_training() -> None:
    schema = {
        "type": "object",
        "properties": {
            "location": {"type": "string", "description": "The city"},
            "format": {"type": "string", "enum": ["celsius", "fahrenheit"], "default": "celsius"},
            "days": {"type": "array", "items": {"type": "integer"}},
            "near": {"type": "object", "properties": {"x": {"type": "number", "nullable": True}}, "required": ["x"]},
        },
        "required": ["location"],
    }
    assert typescript(schema) == (
        "{\n// The city\nlocation: string,\n"
        'format?: "celsius" | "fahrenheit", // default: celsius\n'
        "days?: number[],\nnear?: {\n    x: number | null,\n    },\n}"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e100, "1e100"),
        (1.5e-7, "1.5e-7"),
        (1e-5, "0.00001"),
        (-1.25e-5, "-0.0000125"),
        (1e16, "1e16"),
        (-0.0, "-0.0"),
        (2**64, "1.8446744073709552e19"),
        (10**400, "null"),
        (math.inf, "null"),
        (True, "true"),
        ((1, "é\n"), '[1,"é\\n"]'),
    ],
)
def test_values_are_spelled_as_the_format_spells_them(value: Any, text: str) -> None:
    assert compact_json(value) == text
