"""Python functions as tools: `@ossia.tool` on a typed function is all that the model needs to call it.

    @ossia.tool
    def weather(city: str, unit: Literal["C", "F"] = "C") -> str:
        \"""Tell the weather of a city.

        Args:
            city: Name of the city, in English.
        \"""

    weather("Oslo")                     still the function
    weather.parameters                  JSON Schema, strict: nothing else is accepted
    FunctionTools([weather])            the tool `functions` of one conversation

The schema comes from the signature by pydantic, in the part of JSON Schema that can be enforced while sampling;
descriptions come from `Annotated[..., "words"]`, pydantic's Field, or the docstring (Google, NumPy, Sphinx). Arguments
are validated and converted to what the signature says. A function that is not `async` runs in a thread of its own; a
thread cannot be stopped, so after a time-out it is left behind, and only so many of them are.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Annotated, Any, Generic, NamedTuple, ParamSpec, TypeVar, get_origin, get_type_hints, overload

from ossia.errors import InputError
from ossia.harmony import ToolDescription, ToolNamespace
from ossia.harmony.strict_schema import FORMATS, enforceable
from ossia.tools.base import ToolOutput
from ossia.tools.text import shortened

DEFAULT_TIMEOUT_S = 60.0
_MAX_RESULT_CHARS = 100_000
_MAX_LEFT_BEHIND = 8
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
# What pydantic says of a type and nobody can check while sampling; it is checked when the call is read.
_UNENFORCED = ("uniqueItems", "contentMediaType", "contentEncoding", "discriminator")

P = ParamSpec("P")
R = TypeVar("R")


class FunctionTool(Generic[P, R]):
    """A function that a model can call. Calling it from Python is calling the function."""

    def __init__(
        self,
        function: Callable[P, R],
        *,
        name: str | None = None,
        description: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> None:
        """Raises InputError naming the parameter for a signature that no schema can say."""
        self.function = function
        self.name = str(name or getattr(function, "__name__", ""))
        if not _NAME.fullmatch(self.name):
            raise InputError(f"the tool's name is {self.name!r}; expected 1 to 64 letters, digits, '_' or '-'")
        self.timeout_s = timeout_s
        documented, documented_parameters = _read_docstring(inspect.getdoc(function) or "")
        self.description = description if description is not None else documented
        self._signature = inspect.signature(function)
        self._model = _model(self.name, function, self._signature, documented_parameters)
        schema = _strict(self._model.model_json_schema(by_alias=True))
        schema.pop("title", None)
        self.parameters: Mapping[str, Any] = {"type": "object", "properties": {}, **schema}
        enforceable(self.parameters, f"tool {self.name}", root_type="object")
        self._num_left_behind = 0
        self.__doc__ = function.__doc__
        self.__name__ = self.name

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<tool {self.name}{self._signature}>"

    @property
    def declaration(self) -> ToolDescription:
        """How the model is told of it."""
        return ToolDescription(self.name, self.description, self.parameters)

    async def run(self, arguments: str) -> ToolOutput:
        """Run a call of the model. Raises nothing but CancelledError."""
        try:
            args, kwargs = self._read(arguments)
        except _BadArguments as error:
            return ToolOutput(f"Error: {error}", is_error=True)
        try:
            async with asyncio.timeout(self.timeout_s) as limit:
                result = await self._call(args, kwargs)
        except asyncio.CancelledError:
            if _is_cancelled():
                raise
            return ToolOutput(f"Error: {self.name} was cancelled", is_error=True)
        except _TooManyLeft:
            return ToolOutput(
                f"Error: {self.name} is still busy with {self._num_left_behind} earlier calls; try again later",
                is_error=True,
            )
        except (KeyboardInterrupt, GeneratorExit):
            raise
        # Whatever a user's function raises is an answer to the model, SystemExit included, which would end the loop.
        except BaseException as error:
            if limit.expired():
                return ToolOutput(f"Error: {self.name} gave no answer within {self.timeout_s:g} seconds", is_error=True)
            said = shortened(_words(error), 2_000)
            return ToolOutput(
                f"Error: {type(error).__name__}: {said}" if said else f"Error: {type(error).__name__}", is_error=True
            )
        return ToolOutput(shortened(_as_text(result), _MAX_RESULT_CHARS))

    def _read(self, arguments: str) -> tuple[list[Any], dict[str, Any]]:
        """Arguments as the function takes them."""
        from pydantic import ValidationError

        try:
            raw = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError) as error:
            raise _BadArguments(f"the arguments are not JSON: {shortened(str(error), 200)}") from None
        if not isinstance(raw, dict):
            raise _BadArguments(f"the arguments are {_kind(raw)}; expected an object")
        try:
            read = self._model.model_validate(raw)
        except ValidationError as error:
            faults = [
                f"{_place(fault['loc'])}: {shortened(fault['msg'], 300)}" for fault in error.errors(include_url=False)
            ]
            known = ", ".join(self.parameters["properties"]) or "none"
            raise _BadArguments(
                f"the arguments of {self.name} do not fit: {'; '.join(faults[:10])}. Its parameters: {known}"
            ) from None
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for field, parameter in zip(type(read).model_fields, self._signature.parameters.values(), strict=True):
            value = getattr(read, field)
            if parameter.kind is parameter.POSITIONAL_ONLY:
                args.append(value)
            # What was left out is the function's own default, as it stands there.
            elif field in read.model_fields_set:
                kwargs[parameter.name] = value
        return args, kwargs

    async def _call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if inspect.iscoroutinefunction(inspect.unwrap(self.function)):
            return await self.function(*args, **kwargs)  # type: ignore[misc]
        if self._num_left_behind >= _MAX_LEFT_BEHIND:
            raise _TooManyLeft
        result = await self._in_thread(lambda: self.function(*args, **kwargs))
        return await result if inspect.isawaitable(result) else result

    async def _in_thread(self, call: Callable[[], Any]) -> Any:
        """Call in a thread of its own, which neither holds up others nor the end of the process."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        context = contextvars.copy_context()

        def finish(result: Any, error: BaseException | None) -> None:
            if done.done():
                self._num_left_behind -= 1
            elif error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

        def work() -> None:
            result, error = None, None
            try:
                result = context.run(call)
            except Exception as raised:
                error = raised
            # A future cannot hold StopIteration, and SystemExit would end the loop.
            except BaseException as raised:
                error = RuntimeError(f"{type(raised).__name__}: {_words(raised)}")
            if isinstance(error, StopIteration):
                error = RuntimeError(f"StopIteration: {_words(error)}")
            try:
                loop.call_soon_threadsafe(finish, result, error)
            except RuntimeError:
                # The loop is closed: nobody waits any more.
                self._num_left_behind -= 1

        threading.Thread(target=work, name=f"tool-{self.name}", daemon=True).start()
        try:
            return await done
        except asyncio.CancelledError:
            if done.cancelled():
                self._num_left_behind += 1
            raise


@overload
def tool(function: Callable[P, R], /) -> FunctionTool[P, R]: ...
@overload
def tool(
    *, name: str | None = None, description: str | None = None, timeout_s: float = DEFAULT_TIMEOUT_S
) -> Callable[[Callable[P, R]], FunctionTool[P, R]]: ...
def tool(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    description: str | None = None,
    timeout_s: float = DEFAULT_TIMEOUT_S,
) -> Any:
    """Make a typed function one that a model can call: `@tool`, or `@tool(name=..., timeout_s=...)`.

    Raises InputError for a parameter without a type, or with one that no schema can say.
    """
    if function is None:
        return lambda given: FunctionTool(given, name=name, description=description, timeout_s=timeout_s)
    return FunctionTool(function)


class FunctionTools:
    """Functions as the tool `functions` of one conversation."""

    def __init__(self, functions: Sequence[Callable[..., Any]]) -> None:
        """Raises InputError for two functions of one name."""
        tools = [one if isinstance(one, FunctionTool) else FunctionTool(one) for one in functions]
        self._tools = {one.name: one for one in tools}
        if len(self._tools) < len(tools):
            raise InputError(f"two functions have one name among {', '.join(t.name for t in tools)}; rename one")

    @property
    def namespace(self) -> ToolNamespace:
        return ToolNamespace.functions([one.declaration for one in self._tools.values()])

    async def run(self, name: str, arguments: str) -> ToolOutput:
        if name not in self._tools:
            return ToolOutput(
                f"Error: there is no function {name!r}; expected one of {', '.join(self._tools)}", is_error=True
            )
        return await self._tools[name].run(arguments)

    async def close(self) -> None:
        """Nothing is held."""


# The signature ---------------------------------------------------------------------------------------------------


def _model(
    name: str, function: Callable[..., Any], signature: inspect.Signature, documented: Mapping[str, str]
) -> type[Any]:
    """A pydantic model of the parameters, in their order."""
    from pydantic import ConfigDict, Field, PydanticUserError, create_model
    from pydantic.fields import FieldInfo
    from pydantic_core import SchemaError

    try:
        hints = get_type_hints(inspect.unwrap(function), include_extras=True)
    except (NameError, TypeError) as error:
        raise InputError(f"tool {name}: its types cannot be read: {error}") from None
    fields: dict[str, Any] = {}
    for i, parameter in enumerate(signature.parameters.values()):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise InputError(f"tool {name}: {parameter} has no fixed names; expected parameters one by one")
        if parameter.name not in hints:
            hint = "; of a method, take the bound one: tool(thing.method)" if parameter.name == "self" else ""
            raise InputError(f"tool {name}: the parameter {parameter.name!r} has no type; expected one{hint}")
        hint = hints[parameter.name]
        if get_origin(hint) is Annotated:
            # A text beside a type is its description.
            words = next((one for one in hint.__metadata__ if isinstance(one, str)), None)
            hint = Annotated[hint, Field(description=words)] if words else hint
            described = words or any(isinstance(m, FieldInfo) and m.description for m in hint.__metadata__)
        else:
            described = None
        default = ... if parameter.default is parameter.empty else parameter.default
        options: dict[str, Any] = {"alias": parameter.name}
        if not described and documented.get(parameter.name):
            options["description"] = documented[parameter.name]
        # Names that pydantic keeps for itself, such as _x, json or model_config, are a parameter's by its alias.
        if isinstance(default, FieldInfo):
            raise InputError(f"tool {name}: the default of {parameter.name!r} is a Field; put it into Annotated")
        fields[f"p{i}_"] = (hint, Field(default, **options))
    try:
        return create_model(name, __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=False), **fields)
    except (PydanticUserError, SchemaError, TypeError, NameError) as error:
        said = str(error).splitlines()[0]
        raise InputError(f"tool {name}: a parameter's type has no JSON form: {said}") from None


def _strict(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema that pydantic has made, in the form that the model is shown and the sampler can follow."""
    return _Simplifier(schema).root()


class _Simplifier:
    """Definitions in their places, options as lists of types, nothing that is only for people."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._schema = schema
        self._definitions: Mapping[str, Any] = schema.get("$defs", {})
        self._under_way: list[str] = []
        # Those that contain themselves stay definitions.
        self._recursive: dict[str, Any] = {}
        for name in self._definitions:
            if name in self._reachable(name):
                self._recursive[name] = None

    def root(self) -> dict[str, Any]:
        out = self._simplified({key: value for key, value in self._schema.items() if key != "$defs"})
        if self._recursive:
            out["$defs"] = {name: self._simplified(self._definitions[name]) for name in self._recursive}
        return out

    def _reachable(self, name: str) -> set[str]:
        seen: set[str] = set()
        waiting = [name]
        while waiting:
            for inner in _references(self._definitions[waiting.pop()]):
                if inner not in seen:
                    seen.add(inner)
                    waiting.append(inner)
        return seen

    def _simplified(self, schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        if "$ref" in schema:
            name = schema["$ref"].rpartition("/")[2]
            if name in self._recursive:
                return {key: value for key, value in schema.items() if key != "title"}
            # What stands beside a reference is said of this use of it.
            schema = {**self._definitions[name], **{k: v for k, v in schema.items() if k != "$ref"}}
            return self._simplified(schema)
        out: dict[str, Any] = {}
        for key, value in schema.items():
            if key == "title" or key in _UNENFORCED or (key == "format" and value not in FORMATS):
                continue
            if key in ("properties", "patternProperties"):
                out[key] = {name: self._simplified(inner) for name, inner in value.items()}
            elif key in ("anyOf", "oneOf", "allOf", "prefixItems"):
                out[key] = [self._simplified(inner) for inner in value]
            elif key in ("items", "additionalProperties"):
                out[key] = self._simplified(value)
            elif key == "const":
                out["enum"] = [value]
            else:
                out[key] = value
        if out.get("type") == "object" and "properties" in out:
            out.setdefault("additionalProperties", False)
        if "pattern" in out and "format" not in out and _is_unwritable(out["pattern"]):
            del out["pattern"]
        options = out.pop("oneOf", None) or out.pop("anyOf", None)
        return out if options is None else {**_union(options), **out}


def _references(schema: Any) -> Iterator[str]:
    if isinstance(schema, dict):
        for key, value in schema.items():
            if key == "$ref" and isinstance(value, str):
                yield value.rpartition("/")[2]
            else:
                yield from _references(value)
    elif isinstance(schema, list):
        for item in schema:
            yield from _references(item)


def _union(options: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Options in the shortest form: a list of types where they are nothing more, `oneOf`, which the model is shown,
    where no value fits two, else `anyOf`."""
    plain = [option for option in options if option.keys() == {"type"} and isinstance(option["type"], str)]
    rest = [option for option in options if option not in plain]
    types = list(dict.fromkeys(option["type"] for option in plain))
    if not rest:
        return {"type": types if len(types) > 1 else types[0]}
    kinds = [set(_types(option)) for option in options]
    exclusive = all(kinds) and sum(map(len, kinds)) == len(set().union(*kinds))
    if exclusive and types == ["null"] and len(rest) == 1 and "enum" not in rest[0]:
        kind = rest[0].get("type")
        # Of the model's words for a list of types only the types are left: no items, no properties.
        if isinstance(kind, str) and kind not in ("array", "object"):
            return {**rest[0], "type": [kind, "null"]}
    return {"oneOf" if exclusive else "anyOf": list(options)}


def _types(option: Mapping[str, Any]) -> list[str]:
    kind = option.get("type", [])
    kinds = [kind] if isinstance(kind, str) else list(kind)
    # Every integer is a number.
    return [*kinds, "integer"] if "number" in kinds else kinds


def _is_unwritable(pattern: str) -> bool:
    # Of pydantic's own types (Decimal), not of the user.
    return pattern.startswith("^(?!")


# Docstrings ------------------------------------------------------------------------------------------------------


class _Documented(NamedTuple):
    description: str
    parameters: dict[str, str]


def _read_docstring(text: str) -> _Documented:
    """What a docstring says of the function and of its parameters, in any of the usual styles."""
    import docstring_parser

    try:
        read = docstring_parser.parse(text)
    except docstring_parser.ParseError:
        return _Documented(text.strip(), {})
    parameters = {one.arg_name.lstrip("*"): " ".join((one.description or "").split()) for one in read.params}
    return _Documented(read.description or "", parameters)


# Results ---------------------------------------------------------------------------------------------------------


class _BadArguments(Exception):
    pass


class _TooManyLeft(Exception):
    pass


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _as_text(result: Any) -> str:
    if isinstance(result, str):
        return result
    if isinstance(result, ToolOutput):
        return result.text
    from pydantic_core import PydanticSerializationError, to_json

    try:
        return to_json(result, fallback=_fallback, bytes_mode="base64", inf_nan_mode="strings").decode()
    except (PydanticSerializationError, ValueError, RecursionError):
        return _words(result)


def _fallback(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return vars(value)
    return _words(value)


def _words(value: Any) -> str:
    """A value as text, also where it can say nothing of itself."""
    try:
        return str(value)
    # Whatever a user's `__str__` raises.
    except Exception as error:
        return f"<{type(value).__name__}, whose text fails with {type(error).__name__}>"


def _place(location: Sequence[str | int]) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text or "arguments"


def _kind(value: Any) -> str:
    if isinstance(value, list):
        return "a list"
    return "null" if value is None else repr(value)[:80]
