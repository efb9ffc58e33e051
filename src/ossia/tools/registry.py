"""The tools that ossia runs, by name: one line for each.

    tool = make("apply_patch", settings)        one conversation's own; close it with the conversation
    tool = make("weather:forecast", settings)   a function of a module of the user's

A name with a colon is a Python function, `module:function`, or with `module:` all `@ossia.tool` functions of a module.
It is imported, so such names come from whoever runs ossia and never from a request.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence

from ossia.config import Config
from ossia.errors import ConfigError, InputError
from ossia.harmony import ToolNamespace
from ossia.tools.base import Tool


def make(name: str, settings: Config) -> Tool:
    """A tool of one conversation. Raises ConfigError for a name that is not known or a setting that it lacks."""
    if ":" in name:
        return _functions(name)
    if name not in TOOLS:
        raise ConfigError(
            f"there is no tool {name!r}; expected one of: {', '.join(sorted(TOOLS))}, or module:function", param="tools"
        )
    return TOOLS[name](settings)


def merged(tools: Iterable[Tool]) -> tuple[ToolNamespace, ...]:
    """The namespaces of several tools as the model is told of them: those of one name are one.

    Raises InputError for two functions of one name.
    """
    merged: dict[str, ToolNamespace] = {}
    for tool in tools:
        space = tool.namespace
        known = merged.get(space.name)
        if known is None:
            merged[space.name] = space
            continue
        names = {one.name for one in known.tools} & {one.name for one in space.tools}
        if names or not (known.tools and space.tools):
            raise InputError(f"two tools are named {space.name}{'.' if names else ''}{min(names, default='')}")
        merged[space.name] = ToolNamespace(
            space.name, known.description or space.description, known.tools + space.tools
        )
    return tuple(merged.values())


def find(tools: Sequence[Tool], recipient: str) -> tuple[Tool, str] | None:
    """The tool that a recipient means, and the name that its `run` takes; None if it is nobody's."""
    for tool in tools:
        space = tool.namespace
        if not space.tools and recipient == space.name:
            return tool, ""
        prefix, dot, name = recipient.partition(".")
        if dot and prefix == space.name and any(one.name == name for one in space.tools):
            return tool, name
    return None


def _apply_patch(settings: Config) -> Tool:
    from ossia.tools.apply_patch import ApplyPatch
    from ossia.tools.patch_files import PatchFolder

    if not settings.patch_folder:
        raise ConfigError("the tool apply_patch needs patch_folder: the folder that it works in", param="patch_folder")
    return ApplyPatch(PatchFolder(settings.patch_folder))


def _functions(name: str) -> Tool:
    from ossia.tools.functions import FunctionTool, FunctionTools

    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"the tool {name!r}: the module {module_name!r} cannot be imported: {error}") from None
    if not function_name:
        found = [one for one in vars(module).values() if isinstance(one, FunctionTool)]
        if not found:
            raise ConfigError(f"the tool {name!r}: the module has no function with @ossia.tool")
        return FunctionTools(found)
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ConfigError(f"the tool {name!r}: the module has no function {function_name!r}")
    return FunctionTools([function])


# Name -> how one conversation's own is made.
TOOLS: Mapping[str, Callable[[Config], Tool]] = {
    "apply_patch": _apply_patch,
}
