"""The part of JSON Schema that can be enforced while sampling, and a refusal that names everything else.

``enforceable`` rewrites a client's schema into one that llguidance follows exactly. What cannot be followed is an
InputError that names the keyword and where it stands, as a JSON pointer; nothing is silently made weaker. Keywords that
JSON Schema itself tells a reader to ignore (annotations, unknown words) are left out.

Enforced     type, enum, const, anyOf, allOf, oneOf where the options exclude each other, $ref inside the schema (also
             recursive), properties, required, additionalProperties, patternProperties, minProperties, maxProperties,
             items, prefixItems, minItems, maxItems, minLength, maxLength, pattern, format, minimum, maximum,
             exclusiveMinimum, exclusiveMaximum, multipleOf
Semantics    draft 2020-12; the older spellings ``items: [...]`` with ``additionalItems``, and ``definitions``, are read
             too. A property's place in ``properties`` is its place in the text.
Sources      https://json-schema.org/draft/2020-12; OpenAI's structured outputs guide; llguidance docs/json_schema.md.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import unquote

from ossia.errors import InputError

# Far above what OpenAI allows (10 levels, 5,000 properties, 1,000 enum values), and still milliseconds to compile.
MAX_DEPTH = 40
MAX_SUBSCHEMAS = 5_000
MAX_ENUM_VALUES = 10_000
MAX_CHARS = 250_000
MAX_PATTERN_CHARS = 1_000
# Each may be left out, so each doubles what a parser has to keep in mind at one place.
MAX_OPTIONAL_PROPERTIES = 400
# Integers above are not exact in the float64 that bounds are compared in.
MAX_NUMBER = 2**53
MAX_COUNT = 2**31 - 1
# Where schemas apply to the same value (allOf, $ref beside other keywords), llguidance multiplies them out.
MAX_EXPANDED_SUBSCHEMAS = 10_000
# In units of its last decimal. The automaton for "multiple of n" has some n states, and for several on one number as
# many as their least common multiple.
MAX_MULTIPLE = 1_000
MAX_COMMON_MULTIPLE = 10_000
# How far from an excluded whole number a range begins, as a part of it: some steps of float64, since llguidance may
# read one off by a step. From 0 it is as many decimals, each a state of the automaton.
NEXT_NUMBER = 2.0**-50
LEAST_NUMBER = 1e-30

_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_UNSUPPORTED = (
    "not",
    "if",
    "dependentSchemas",
    "dependentRequired",
    "dependencies",
    "propertyNames",
    "contains",
    "unevaluatedProperties",
    "unevaluatedItems",
    "$dynamicRef",
    "$recursiveRef",
)
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
_BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")

_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26]|0[48])00)"
_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = "[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
# What a format means is written out where llguidance's own reading is wider than the RFC: 30 February, hosts of any
# length. Within the RFC these are narrower: four-digit years from 1, no leap seconds, hosts of at most 4 labels,
# and, as llguidance has it, IPv6 addresses without a dotted end.
_FORMAT_PATTERNS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "hostname": rf"^{_LABEL}(?:\.{_LABEL}){{0,3}}$",
}
_LLGUIDANCE_FORMATS = ("duration", "email", "ipv4", "ipv6", "uuid", "uri")
FORMATS = (*_FORMAT_PATTERNS, *_LLGUIDANCE_FORMATS)

# One blank at most behind a comma or colon, none elsewhere: both spellings that models write, and nothing to run away.
_SEPARATORS = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_SHORT_ESCAPES = 'nrbtf\\"'


def any_json(json_type: str | None = None) -> dict[str, Any]:
    """Any JSON value, of one type if it is given, as a schema for llguidance."""
    options = {**_SEPARATORS, "json_allow_general_unicode_escapes": True}
    return {"x-guidance": options} if json_type is None else {"x-guidance": options, "type": json_type}


def enforceable(schema: object, param: str | None = None, *, root_type: str | None = None) -> dict[str, Any]:
    """A schema for llguidance that accepts what ``schema`` accepts, and no more.

    ``root_type`` is demanded of the whole value besides ("object" of arguments). Raises InputError with ``param`` for
    whatever cannot be enforced.
    """
    return _Reader(schema, param, root_type).read()


def is_enforceable(schema: object, *, root_type: str | None = None) -> bool:
    """Whether `enforceable` takes it."""
    try:
        enforceable(schema, root_type=root_type)
    except InputError:
        return False
    return True


def subschemas(schema: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    """The schemas directly inside one that ``enforceable`` has given, each with its JSON pointer in the client's."""
    for inner in schema.get("$defs", {}).values():
        if isinstance(inner, Mapping):
            yield inner["title"], inner
    for keyword in ("properties", "patternProperties"):
        for name, inner in schema.get(keyword, {}).items():
            yield _join(path, keyword, name), inner
    for keyword in ("anyOf", "allOf", "oneOf", "prefixItems"):
        for i, inner in enumerate(schema.get(keyword, ())):
            yield _join(path, keyword, i), inner
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield _join(path, keyword), schema[keyword]


class _Reader:
    """One pass over one schema. Targets of ``$ref`` are collected under ``$defs``, wherever they stood."""

    def __init__(self, schema: object, param: str | None, root_type: str | None) -> None:
        self._root = schema
        self._param = param
        self._root_type = root_type
        self._num_subschemas = 0
        self._num_enum_values = 0
        self._num_chars = 0
        # Whether some object takes names beside those it declares: see _options.
        self._has_open_objects = False
        # JSON pointer of a target -> its name, for those that are read or still to be.
        self._names: dict[str, str] = {}
        # For each target, the targets that apply to the very same value.
        self._same_value: dict[str, list[str]] = {}
        self._reading = "#"

    def read(self) -> dict[str, Any]:
        root = self._read_target("#", self._root)
        definitions: dict[str, Any] = {}
        # Reading one target may name further ones.
        while len(definitions) < len(self._names):
            pointer = list(self._names)[len(definitions)]
            target = self._read_target(pointer, self._target(pointer))
            # An annotation, for `subschemas` to tell where it stood.
            definitions[self._names[pointer]] = target if isinstance(target, bool) else {"title": pointer, **target}
        self._refuse_cycles()
        _Expansion(self, root, definitions).check()
        if root is False:
            raise self.error("#", "the schema is false", "one that some value satisfies")
        out = {} if root is True else root
        if self._root_type is not None:
            types = out.get("type", self._root_type)
            if self._root_type not in ([types] if isinstance(types, str) else types):
                raise self.error("#/type", f"the type is {_short(types)}", f"{_short(self._root_type)}")
            out = {**out, "type": self._root_type}
        return {"x-guidance": self._options(), **out, **({"$defs": definitions} if definitions else {})}

    def _options(self) -> dict[str, Any]:
        # A name spelled with \u would not be recognised as one of the declared names, and escape its schema.
        return {**_SEPARATORS, "json_allowed_escapes": _SHORT_ESCAPES + ("" if self._has_open_objects else "u")}

    # -- one schema --------------------------------------------------------------------------------

    def _read_target(self, pointer: str, schema: object) -> Any:
        self._reading = pointer
        self._same_value[pointer] = []
        return self._schema(schema, pointer, 0, same_value=True)

    def _schema(self, schema: object, path: str, depth: int, *, same_value: bool = False) -> Any:
        self._num_subschemas += 1
        if self._num_subschemas > MAX_SUBSCHEMAS:
            raise self.error(path, f"the schema has more than {MAX_SUBSCHEMAS:,} parts", "a smaller one")
        if depth > MAX_DEPTH:
            raise self.error(path, f"the schema nests more than {MAX_DEPTH} levels deep", "a flatter one")
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, Mapping):
            raise self.error(path, f"{_short(schema)} stands for a schema", "an object, true or false")
        self._refuse_unsupported(schema, path)
        out: dict[str, Any] = {}
        # In the order given, which decides the order of properties that come from several places.
        for keyword, value in schema.items():
            here = _join(path, keyword)
            if keyword == "$ref":
                out["$ref"] = self._ref(value, here, same_value)
            elif keyword == "type":
                out["type"] = self._type(value, here)
            elif keyword in ("enum", "const"):
                out[keyword] = self._values(keyword, value, here)
            elif keyword in ("anyOf", "allOf", "oneOf"):
                options = self._list(value, here)
                out[keyword] = [
                    self._schema(inner, _join(here, i), depth + 1, same_value=same_value)
                    for i, inner in enumerate(options)
                ]
            elif keyword in ("properties", "patternProperties"):
                out[keyword] = self._named(keyword, value, here, depth)
            elif keyword == "additionalProperties":
                out[keyword] = self._schema(value, here, depth + 1)
            elif keyword == "required":
                out[keyword] = self._names_of(value, here)
            elif keyword in _COUNTS:
                out[keyword] = self._count(value, here)
            elif keyword in _BOUNDS:
                out[keyword] = self._number(value, here)
                if keyword.startswith("exclusive") and abs(out[keyword]) == MAX_NUMBER:
                    raise self.error(here, f"it is {_short(value)}", "a number nearer to 0: the next is not exact")
            elif keyword == "multipleOf":
                out[keyword] = self._multiple(value, here)
            elif keyword == "pattern":
                out["pattern"] = self._pattern(value, here)
        self._read_arrays(schema, out, path, depth)
        self._read_format(schema, out, path)
        _close_bounds(out)
        if isinstance(out.get("multipleOf"), int):
            # As fractions ("6.0") such numbers have beginnings that nothing completes.
            types = _listed(out.get("type", _TYPES))
            out["type"] = list(dict.fromkeys("integer" if kind == "number" else kind for kind in types))
        self._check_object(schema, out, path)
        # OpenAPI's word for what the model is told as "| null".
        if schema.get("nullable") is True and path != "#" and "null" not in _listed(out.get("type", ())):
            return {"anyOf": [out, {"type": "null"}]}
        return out

    def _refuse_unsupported(self, schema: Mapping[str, Any], path: str) -> None:
        for keyword in _UNSUPPORTED:
            if keyword in schema:
                raise self._unsupported(path, keyword)
        if schema.get("uniqueItems", False) is not False:
            raise self._unsupported(path, "uniqueItems")
        if "$id" in schema and path != "#":
            raise self._unsupported(path, "$id")

    def _type(self, value: object, path: str) -> str | list[str]:
        types: list[Any] = value if isinstance(value, list) else [value]
        if not types or any(kind not in _TYPES for kind in types):
            raise self.error(path, f"the type is {_short(value)}", "one or several of " + ", ".join(_TYPES))
        return value if isinstance(value, str) else list(dict.fromkeys(types))

    def _values(self, keyword: str, value: object, path: str) -> Any:
        values = [value] if keyword == "const" else self._list(value, path)
        self._num_enum_values += len(values)
        if self._num_enum_values > MAX_ENUM_VALUES:
            raise self.error(path, f"the schema has more than {MAX_ENUM_VALUES:,} enum values", "fewer")
        for i, item in enumerate(values):
            self._check_value(item, path if keyword == "const" else _join(path, i), 0)
        return value

    def _check_value(self, value: object, path: str, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self.error(path, f"the value nests more than {MAX_DEPTH} levels deep", "a flatter one")
        if isinstance(value, str):
            self._text(value, path)
        elif isinstance(value, bool) or value is None:
            pass
        elif isinstance(value, int | float):
            self._number(value, path)
        elif isinstance(value, list):
            for i, item in enumerate(value):
                self._check_value(item, _join(path, i), depth + 1)
        elif isinstance(value, Mapping):
            for name, item in value.items():
                self._check_value(self._text(name, path), path, depth + 1)
                self._check_value(item, _join(path, name), depth + 1)
        else:
            raise self.error(path, f"{_short(value)} is no JSON value", "one")

    def _named(self, keyword: str, value: object, path: str, depth: int) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise self.error(path, f"{keyword} is {_short(value)}", "an object of schemas")
        out = {}
        for name, inner in value.items():
            here = _join(path, name)
            key = self._pattern(name, here) if keyword == "patternProperties" else self._text(name, here)
            out[key] = self._schema(inner, here, depth + 1)
        return out

    def _read_arrays(self, schema: Mapping[str, Any], out: dict[str, Any], path: str, depth: int) -> None:
        items = schema.get("items")
        if isinstance(items, list):  # As drafts before 2020-12 have it.
            if "prefixItems" in schema:
                raise self.error(_join(path, "items"), "items is a list beside prefixItems", "a schema")
            prefix, where, rest = items, "items", "additionalItems"
        else:
            prefix, where, rest = schema.get("prefixItems", ()), "prefixItems", "items"
        if where in schema:
            here = _join(path, where)
            out["prefixItems"] = [
                self._schema(inner, _join(here, i), depth + 1) for i, inner in enumerate(self._list(prefix, here))
            ]
        if rest in schema:
            out["items"] = self._schema(schema[rest], _join(path, rest), depth + 1)

    def _read_format(self, schema: Mapping[str, Any], out: dict[str, Any], path: str) -> None:
        if "format" not in schema:
            return
        name = schema["format"]
        if name not in FORMATS:
            raise self.error(
                _join(path, "format"), f"the format {_short(name)} cannot be enforced", "one of " + ", ".join(FORMATS)
            )
        if name in _LLGUIDANCE_FORMATS:
            out["format"] = name
        elif "pattern" in out:
            out["allOf"] = [*out.get("allOf", ()), {"pattern": _FORMAT_PATTERNS[name]}]
        else:
            out["pattern"] = _FORMAT_PATTERNS[name]

    def _check_object(self, schema: Mapping[str, Any], out: dict[str, Any], path: str) -> None:
        required = out.get("required", [])
        properties = out.get("properties", {})
        if len(properties.keys() - set(required)) > MAX_OPTIONAL_PROPERTIES:
            raise self.error(
                path,
                f"{len(properties.keys() - set(required))} properties may be left out",
                f"at most {MAX_OPTIONAL_PROPERTIES} that are not required",
            )
        # Names beside the declared ones may come twice, and count once.
        if out.get("minProperties", 0) > len(required) + 1:
            raise self.error(
                _join(path, "minProperties"),
                f"minProperties is {out['minProperties']} with {len(required)} required",
                "at most one more than are required; more cannot be enforced",
            )
        names = out.keys() & {"properties", "patternProperties", "required"}
        if "patternProperties" in out or (names and out.get("additionalProperties") is not False):
            self._has_open_objects = True

    # -- references --------------------------------------------------------------------------------

    def _ref(self, value: object, path: str, same_value: bool) -> str:
        if not isinstance(value, str) or not (value == "#" or value.startswith("#/")):
            raise self.error(
                path, f"$ref is {_short(value)}", "a JSON pointer into this schema, such as '#/$defs/name'"
            )
        if same_value:
            self._same_value[self._reading].append(value)
        if value not in self._names:
            self._target(value, path)
            self._names[value] = f"d{len(self._names)}"
        return f"#/$defs/{self._names[value]}"

    def _target(self, pointer: str, path: str = "#") -> Any:
        target: Any = self._root
        for part in pointer.split("/")[1:]:
            key = unquote(part).replace("~1", "/").replace("~0", "~")
            if isinstance(target, Mapping) and key in target:
                target = target[key]
            elif isinstance(target, list) and _INDEX.fullmatch(key) and int(key) < len(target):
                target = target[int(key)]
            else:
                raise self.error(path, f"$ref is {_short(pointer)}, where nothing is", "a place in this schema")
        return target

    def _refuse_cycles(self) -> None:
        """Refuse targets that mean themselves, without an array or object in between."""
        done: set[str] = set()
        for first in self._same_value:
            under_way: list[str] = []
            stack = [(first, False)]
            while stack:
                pointer, left = stack.pop()
                if left:
                    done.add(under_way.pop())
                elif pointer in under_way:
                    raise self.error(pointer, "the $ref leads back to itself for the same value", "one that ends")
                elif pointer not in done:
                    under_way.append(pointer)
                    stack.append((pointer, True))
                    stack += [(inner, False) for inner in self._same_value[pointer]]

    # -- values of keywords ------------------------------------------------------------------------

    def _list(self, value: object, path: str) -> list[Any]:
        if not isinstance(value, list) or not value:
            raise self.error(path, f"{_short(value)} stands for a list", "a list with at least one entry")
        return value

    def _names_of(self, value: object, path: str) -> list[str]:
        if not isinstance(value, list):
            raise self.error(path, f"required is {_short(value)}", "a list of names")
        return list(dict.fromkeys(self._text(name, path) for name in value))

    def _count(self, value: object, path: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
            raise self.error(path, f"it is {_short(value)}", "a whole number")
        if not 0 <= value <= MAX_COUNT:
            raise self.error(path, f"it is {_short(value)}", f"0 to {MAX_COUNT}")
        return int(value)

    def _number(self, value: object, path: str) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.error(path, f"it is {_short(value)}", "a number")
        if abs(value) > MAX_NUMBER:
            raise self.error(path, f"it is {_short(value)}", "a number between -2^53 and 2^53, which are exact")
        # 3 and 3.0 are the same number; llguidance reads only the first as an integer.
        return int(value) if value == value // 1 else value

    def _multiple(self, value: object, path: str) -> int | float:
        number = self._number(value, path)
        if number <= 0:
            raise self.error(path, f"multipleOf is {_short(value)}", "a number above 0")
        if _units([Decimal(repr(number))]) > MAX_MULTIPLE:
            raise self.error(
                path,
                f"multipleOf {_short(value)} needs too many states",
                f"at most {MAX_MULTIPLE:,} of its last decimal",
            )
        return number

    def _pattern(self, value: object, path: str) -> str:
        pattern = self._text(value, path)
        if len(pattern) > MAX_PATTERN_CHARS:
            raise self.error(path, f"the pattern has {len(pattern)} characters", f"at most {MAX_PATTERN_CHARS}")
        if (fault := pattern_fault(pattern)) is not None:
            raise self.error(path, f"the pattern {_short(pattern)} has {fault}", "a pattern without it")
        return pattern

    def _text(self, value: object, path: str) -> str:
        if not isinstance(value, str):
            raise self.error(path, f"{_short(value)} stands for a text", "a text")
        if _UNWRITABLE.search(value):
            raise self.error(path, f"the text {_short(value)} has a control character or half a surrogate", "none")
        self._num_chars += len(value)
        if self._num_chars > MAX_CHARS:
            raise self.error(path, f"the schema's names and values have more than {MAX_CHARS:,} characters", "fewer")
        return value

    # -- refusals ----------------------------------------------------------------------------------

    def _unsupported(self, path: str, keyword: str) -> InputError:
        return self.error(
            _join(path, keyword),
            f"{keyword!r} cannot be enforced while sampling",
            "a schema without it, or strict set to false",
        )

    def error(self, path: str, met: str, expected: str) -> InputError:
        where = f"{self._param}: at {path}" if self._param else f"at {path}"
        return InputError(f"{where}, {met}; expected {expected}", param=self._param)


class _Size(NamedTuple):
    """What a schema comes to: alternatives for one value, subschemas in all, every multipleOf of the one value."""

    alternatives: int
    subschemas: int
    multiples: frozenset[Decimal] = frozenset()


class _Expansion:
    """How much larger a schema becomes when all that applies to the same value is multiplied out."""

    def __init__(self, reader: _Reader, root: Any, definitions: Mapping[str, Any]) -> None:
        self._reader = reader
        self._root = root
        self._definitions = definitions
        # Name of a definition -> what it comes to; None while that is being found out.
        self._known: dict[str, _Size | None] = {}

    def check(self) -> None:
        self._of(self._root, "#", False)
        for schema in self._definitions.values():
            if isinstance(schema, dict):
                self._of(schema, schema["title"], False)

    def _of(self, schema: Any, path: str, merged: bool) -> _Size:
        """``merged`` is whether something else applies to the same value."""
        if not isinstance(schema, Mapping):
            return _Size(1, 1)
        merged = merged or len(schema.keys() - {"title", "$defs", "x-guidance"}) > 1
        groups = [self._of(inner, path, True) for inner in schema.get("allOf", ())]
        for keyword in ("anyOf", "oneOf"):
            if keyword in schema:
                options = [self._of(inner, path, merged) for inner in schema[keyword]]
                multiples = frozenset[Decimal]().union(*(option.multiples for option in options))
                groups.append(
                    _Size(sum(o.alternatives for o in options), sum(o.subschemas for o in options), multiples)
                )
        if merged and "$ref" in schema:
            groups.append(self._target(schema["$ref"].removeprefix("#/$defs/"), path))
        around = {keyword: value for keyword, value in schema.items() if keyword not in _SAME_VALUE}
        size = 1 + sum(self._of(inner, inner_path, False).subschemas for inner_path, inner in subschemas(around, path))
        alternatives = 1
        multiples = frozenset([Decimal(repr(schema["multipleOf"]))] if "multipleOf" in schema else [])
        for group in groups:
            # Each alternative of the one is joined with each of the other.
            size = size * group.alternatives + group.subschemas * alternatives
            alternatives *= group.alternatives
            multiples |= group.multiples
        if size > MAX_EXPANDED_SUBSCHEMAS or _units(multiples) > MAX_COMMON_MULTIPLE:
            raise self._reader.error(
                path, "the schema multiplies out to too much", "less under allOf, or beside anyOf, oneOf and $ref"
            )
        return _Size(alternatives if merged else 1, size, multiples)

    def _target(self, name: str, path: str) -> _Size:
        if name not in self._known:
            self._known[name] = None
            self._known[name] = self._of(self._definitions[name], path, True)
        known = self._known[name]
        if known is None:
            raise self._reader.error(path, "a $ref beside other keywords leads back to itself", "the $ref alone")
        return known


def _units(multiples: Collection[Decimal]) -> int:
    """The least common multiple, counted in the last decimal of all."""
    last = max((-int(multiple.as_tuple().exponent) for multiple in multiples), default=0)
    return math.lcm(*(int(multiple.scaleb(max(last, 0))) for multiple in multiples))


def _listed(types: str | Sequence[str]) -> Sequence[str]:
    return [types] if isinstance(types, str) else types


def _close_bounds(out: dict[str, Any]) -> None:
    """Write the bound nearer to 0, if it excludes a whole number, as one that includes the next number beyond it.

    llguidance allows the excluded number where the range ends before the next whole number: of (0, 0.5], 0 too.
    """
    for open_bound, bound, sign, tighter in (
        ("exclusiveMinimum", "minimum", 1, max),
        ("exclusiveMaximum", "maximum", -1, min),
    ):
        number = out.get(open_bound)
        # No whole number may lie between.
        if isinstance(number, int) and 0 <= sign * number * NEXT_NUMBER < 1:
            beyond = number + sign * max(abs(number) * NEXT_NUMBER, LEAST_NUMBER)
            out[bound] = tighter(out.get(bound, beyond), beyond)
            del out[open_bound]


_SAME_VALUE = ("anyOf", "oneOf", "allOf", "$defs")

# A place in a list, as a JSON pointer has it.
_INDEX = re.compile("0|[1-9][0-9]{0,8}")

# Characters that a JSON text writes as \u, which sampling only allows in part, and halves that no UTF-8 text has.
_UNWRITABLE = re.compile("[\x00-\x07\x0b\x0e-\x1f\x7f\ud800-\udfff]")

_Faults = tuple[tuple[re.Pattern[str], str], ...]
_PATTERN_FAULTS: _Faults = (
    (re.compile(r"\(\?<?[=!]"), "a lookaround"),
    (re.compile(r"\(\?(?!:|P?<[A-Za-z_])"), "inline flags"),
    (re.compile(r"(?:[*+?]|\{[0-9,]+\})\+"), "a possessive quantifier"),
    # "[]a]" and "[^]a]" hold a bracket in some dialects and are empty in others.
    (re.compile(r"\[\^?\]"), "a character class that begins with ']'"),
)
_CLASS_FAULTS: _Faults = (
    (re.compile(r"\["), "an unescaped '[' inside a character class"),
    (re.compile(r"&&|--|~~"), "a set operation inside a character class"),
)
_ESCAPE_FAULTS: _Faults = (
    (re.compile(r"[0-9]|k<"), "a backreference"),
    (re.compile(r"[bB<>]"), "a word boundary"),
    (re.compile(r"[AzZG]"), "an anchor other than ^ and $"),
)


def pattern_fault(pattern: str) -> str | None:
    """What a pattern has that llguidance would refuse, or read otherwise than ECMA 262; None if there is nothing."""
    i, in_class = 0, False
    while i < len(pattern):
        escaped = pattern[i] == "\\"
        i += escaped
        for rule, name in _ESCAPE_FAULTS if escaped else _CLASS_FAULTS if in_class else _PATTERN_FAULTS:
            if rule.match(pattern, i):
                return name
        if not escaped:
            in_class = pattern[i] == "[" or (in_class and pattern[i] != "]")
        i += 1
    return None


def _join(path: str, *parts: str | int) -> str:
    return "/".join([path, *(str(part).replace("~", "~0").replace("/", "~1") for part in parts)])


def _short(value: object) -> str:
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
