"""JSON Schema to the TypeScript-like declarations in which gpt-oss was shown its tools.

The text is a prompt, not a program: what matters is that it is the text of training. So keywords that the trained
format does not know (anyOf, allOf, const, $ref, not, patterns, limits) give ``any``, exactly as openai-harmony gives,
and the whole schema reaches the model's output another way, through the grammar. Nothing here raises: a schema that
is no schema is ``any`` too.

Source   openai/harmony, its rendering of tool declarations, compared token for token in tests/harmony/.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

# Deeper schemas end in ``any``. JSON parsers in use refuse nesting beyond 128, so no real schema is cut.
_MAX_DEPTH = 128

_PRIMITIVES = {"number": "number", "integer": "number", "boolean": "boolean"}


def typescript(schema: object) -> str:
    """Declaration of a value that ``schema`` describes."""
    return _type(schema, "", 0)


def compact_json(value: object, depth: int = 0) -> str:
    """JSON without blanks, with numbers spelled as serde_json spells them; never raises, whatever ``value`` is."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int):
        # Integers beyond 64 bits become floating point there.
        return str(value) if -(2**63) <= value < 2**64 else _float(_as_float(value))
    if isinstance(value, float):
        return _float(value)
    if depth > _MAX_DEPTH:
        return "null"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_key(k)}:{compact_json(v, depth + 1)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(compact_json(item, depth + 1) for item in value) + "]"
    return json.dumps(str(value), ensure_ascii=False)


def _type(schema: object, indent: str, depth: int) -> str:
    if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
        return "any"
    if _is_list(one_of := schema.get("oneOf")):
        return "".join(f"\n{indent} | {_variant(v, indent, depth)}{_comment(v)}" for v in one_of)
    kind = schema.get("type")
    if _is_list(kind):
        named = ["number" if k == "integer" else k for k in kind if isinstance(k, str)]
        return " | ".join(named) if named else "any"
    if not isinstance(kind, str):
        return "any"
    if kind == "object":
        return _object(schema, indent, depth)
    if kind == "array":
        return f"{_type(schema['items'], indent, depth + 1)}[]" if "items" in schema else "Array<any>"
    if kind == "string":
        values = schema.get("enum")
        quoted = [f'"{v}"' for v in values if isinstance(v, str)] if _is_list(values) else []
        return " | ".join(quoted) or "string"
    return _PRIMITIVES.get(kind, "any")


def _object(schema: Mapping[str, Any], indent: str, depth: int) -> str:
    out = [f"{indent}// {schema['description']}\n"] if isinstance(schema.get("description"), str) else []
    out.append("{\n")
    properties = schema.get("properties")
    if isinstance(properties, Mapping):
        listed = schema.get("required")
        required = {r for r in listed if isinstance(r, str)} if _is_list(listed) else set()
        for key, value in properties.items():
            name = key if isinstance(key, str) else _key(key)[1:-1]
            optional = "" if name in required else "?"
            out += _property(f"{indent}{name}{optional}:", value, indent, depth)
    out.append(f"{indent}}}")
    return "".join(out)


def _property(head: str, value: object, indent: str, depth: int) -> Iterable[str]:
    if not isinstance(value, Mapping):
        yield f"{head} any,\n"
        return
    one_of = value.get("oneOf")
    description = value.get("description")
    if isinstance(value.get("title"), str):
        yield f"{indent}// {value['title']}\n{indent}//\n"
    if "oneOf" not in value and isinstance(description, str):
        yield f"{indent}// {description}\n"
    if _is_list(examples := value.get("examples")) and examples:
        yield f"{indent}// Examples:\n"
        yield from (f'{indent}// - "{example}"\n' for example in examples if isinstance(example, str))
    if _is_list(one_of):
        yield from _one_of_property(head, value, one_of, indent, depth)
        return
    default = f" // {_default(value)}" if "default" in value and "oneOf" not in value else ""
    yield f"{head} {_nullable(value, _type(value, indent + '    ', depth + 1))},{default}\n"


def _one_of_property(
    head: str, value: Mapping[str, Any], variants: Sequence[Any], indent: str, depth: int
) -> Iterable[str]:
    """A property with alternatives: one line each, its description not said twice."""
    description = value.get("description") if isinstance(value.get("description"), str) else None
    first = variants[0].get("description") if variants and isinstance(variants[0], Mapping) else None
    described_above = description is not None and description != first
    if described_above:
        yield f"{indent}// {description}\n"
    if "default" in value:
        yield f"{indent}// {_default(value)}\n"
    yield f"{head}\n"
    for i, variant in enumerate(variants):
        comments = []
        if isinstance(variant, Mapping):
            own = variant.get("description")
            if isinstance(own, str) and own != description and not (i == 0 and described_above):
                comments.append(own)
            if "default" in variant:
                comments.append(_default(variant))
        comment = f" // {' '.join(comments)}" if comments else ""
        yield f"{indent} | {_variant(variant, indent, depth)}{comment}\n"
    yield f"{indent},\n"


def _variant(variant: object, indent: str, depth: int) -> str:
    return _nullable(variant, _type(variant, indent + "   ", depth + 1))


def _nullable(schema: object, text: str) -> str:
    nullable = isinstance(schema, Mapping) and schema.get("nullable") is True
    return f"{text} | null" if nullable and "null" not in text else text


def _comment(variant: object) -> str:
    """What follows an alternative outside of properties."""
    if not isinstance(variant, Mapping):
        return ""
    comments = [variant["description"]] if isinstance(variant.get("description"), str) else []
    if "default" in variant:
        # Here, unlike in properties, the default of an enum is quoted.
        default = variant["default"]
        quote = _has_enum(variant) or not isinstance(default, str)
        comments.append("default: " + (compact_json(default) if quote else f'"{default}"'))
    return f" // {' '.join(comments)}" if comments else ""


def _default(schema: Mapping[str, Any]) -> str:
    default = schema["default"]
    if not isinstance(default, str):
        return f"default: {compact_json(default)}"
    return f"default: {default}" if _has_enum(schema) else f'default: "{default}"'


def _has_enum(schema: Mapping[str, Any]) -> bool:
    return _is_list(schema.get("enum")) and bool(schema["enum"])


def _is_list(value: object) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, list | tuple)


def _key(key: object) -> str:
    """An object's key as JSON spells it; Python's other keys are spelled as json.dumps spells them."""
    return json.dumps(key if isinstance(key, str) else compact_json(key), ensure_ascii=False)


def _as_float(value: int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _float(value: float) -> str:
    """Shortest decimal that reads back, spelled 1e100, 1e-7 and 0.00001; what JSON cannot say is null."""
    if not math.isfinite(value):
        return "null"
    text = repr(value)
    if "e" not in text:
        return text
    digits, _, exponent = text.partition("e")
    if exponent == "-05":
        sign, digits = ("-", digits[1:]) if digits[0] == "-" else ("", digits)
        return f"{sign}0.0000{digits.replace('.', '')}"
    return f"{digits}e{int(exponent)}"
