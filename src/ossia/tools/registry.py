"""The tools that ossia runs, by name: one line for each.

    workshop = Workshop(settings)
    tool = workshop.make("python")              one conversation's own; close it with the conversation
    tool = workshop.make("weather:forecast")    a function of a module of the user's
    await workshop.start()                      the sandbox is proven here

A name with a colon is a Python function, `module:function`, or with `module:` all `@ossia.tool` functions of a module.
It is imported, so such names come from whoever runs ossia and never from a request.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ossia.config import Config
from ossia.errors import ConfigError, InputError
from ossia.harmony import ToolNamespace
from ossia.tools.base import Tool

if TYPE_CHECKING:
    from ossia.tools.python import PythonSessions
    from ossia.tools.web.backend import Backend


class Workshop:
    """Makes tools by their names, and holds what the tools of all conversations share: sandboxes, and what the browser
    searches. Used in one event loop; close with `close`."""

    def __init__(self, settings: Config, *, unsafe_python: bool = False) -> None:
        self.settings = settings
        self._is_python_unsafe = unsafe_python
        self._sessions: PythonSessions | None = None
        self._backend: Backend | None = None

    def make(self, name: str) -> Tool:
        """A tool of one conversation. Raises ConfigError for a name that is not known or a setting that it lacks."""
        if ":" in name:
            return _functions(name)
        if name not in TOOLS:
            known = ", ".join(sorted(TOOLS))
            raise ConfigError(f"there is no tool {name!r}; expected one of: {known}, or module:function", param="tools")
        return TOOLS[name](self)

    async def start(self) -> list[str]:
        """Prove the sandbox, if python was made or is to be; what is in use, in words.

        Raises UnavailableError if no sandbox holds.
        """
        words = []
        if self._sessions is not None:
            words.append(f"python ({await self._sessions.check()})")
        if self._backend is not None:
            words.append(f"browser ({self._backend.name})")
        return words

    async def close(self) -> None:
        """End what is shared. More than once is harmless."""
        if self._sessions is not None:
            await self._sessions.aclose()
        if self._backend is not None:
            await asyncio.to_thread(self._backend.close)

    @property
    def sessions(self) -> PythonSessions:
        """The notebooks of all conversations."""
        if self._sessions is None:
            from ossia.tools.python import PythonSessions

            self._sessions = PythonSessions(self.settings.python_sandbox, unsafe_python=self._is_python_unsafe)
        return self._sessions

    @property
    def backend(self) -> Backend:
        """What the browser searches. Raises ConfigError where the settings do not say."""
        if self._backend is None:
            from ossia.tools.web.backend import backend_of

            self._backend = backend_of(self.settings)
        if self._backend is None:
            raise ConfigError(
                "the tool browser needs browser: where it searches, such as local:FOLDER", param="browser"
            )
        return self._backend


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


def _apply_patch(workshop: Workshop) -> Tool:
    from ossia.tools.apply_patch import ApplyPatch
    from ossia.tools.patch_files import PatchFolder

    folder = workshop.settings.patch_folder
    if not folder:
        raise ConfigError("the tool apply_patch needs patch_folder: the folder that it works in", param="patch_folder")
    return ApplyPatch(PatchFolder(folder))


def _python(workshop: Workshop) -> Tool:
    return workshop.sessions.own_tool()


def _browser(workshop: Workshop) -> Tool:
    from ossia.tools.browser import Browser, BrowserRules

    rules = BrowserRules.of(workshop.settings)
    # What else the conversation knows cannot be seen from here: a page could have it carried out in a URL.
    rules = replace(rules, seen_links_only=workshop.settings.browser_links != "any")
    return Browser(workshop.backend, rules)


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
TOOLS: Mapping[str, Callable[[Workshop], Tool]] = {
    "apply_patch": _apply_patch,
    "browser": _browser,
    "python": _python,
}
