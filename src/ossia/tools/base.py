"""What a tool is that ossia runs itself.

A tool belongs to one conversation: its pages, variables and files are never shared. Whatever the model wrote or the
world answered, `Tool.run` returns a text for the model; it raises nothing but `asyncio.CancelledError`, and being
cancelled it stops what it started.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from ossia.harmony import ToolNamespace

# Names of the format itself, and of the tools that the model was trained with: no other namespace may have them.
RESERVED_NAMESPACES = frozenset({"functions", "browser", "python", "assistant", "user", "system", "developer", "tool"})


class ToolOutput(NamedTuple):
    """What came of one call."""

    # For the model, as it was trained to read it.
    text: str
    is_error: bool = False
    # For those who show or keep the call, never for the model: a JSON object whose fields the tool's module documents.
    details: Mapping[str, Any] = {}


class Tool(Protocol):
    """One tool of one conversation."""

    @property
    def namespace(self) -> ToolNamespace:
        """How the model is told of it."""

    async def run(self, name: str, arguments: str) -> ToolOutput:
        """Run a call: ``name`` is the function within the namespace ("" where the namespace is called itself, as
        ``python`` is), ``arguments`` the text of the model's message as it was sampled, valid or not."""

    async def close(self) -> None:
        """Free what the tool holds. More than once is harmless."""
