"""ossia: the whole gpt-oss system in one package.

import ossia

model = ossia.load("gpt-oss-20b")
for delta in model.generate("Why is the sky blue?"):
    print(delta.text, end="")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ossia.agent import Agent as Agent
    from ossia.agent import Answer as Answer
    from ossia.errors import OssiaError as OssiaError
    from ossia.harmony import (
        Conversation as Conversation,
    )
    from ossia.harmony import (
        Delta as Delta,
    )
    from ossia.harmony import (
        Effort as Effort,
    )
    from ossia.harmony import (
        Message as Message,
    )
    from ossia.harmony import (
        ToolDescription as ToolDescription,
    )
    from ossia.local import Generation as Generation
    from ossia.local import LocalModel as LocalModel
    from ossia.local import load as load
    from ossia.tools.functions import FunctionTool as FunctionTool
    from ossia.tools.functions import tool as tool

# Public names and the modules that hold them; a name costs its import when it is first used.
_HOMES = {
    "Agent": "ossia.agent",
    "Answer": "ossia.agent",
    "Conversation": "ossia.harmony",
    "Delta": "ossia.harmony",
    "Effort": "ossia.harmony",
    "FunctionTool": "ossia.tools.functions",
    "Generation": "ossia.local",
    "LocalModel": "ossia.local",
    "Message": "ossia.harmony",
    "OssiaError": "ossia.errors",
    "ToolDescription": "ossia.harmony",
    "load": "ossia.local",
    "tool": "ossia.tools.functions",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ossia' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
