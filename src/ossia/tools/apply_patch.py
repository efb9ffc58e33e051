"""The tool `apply_patch`: the model edits files of one folder.

    tool = ApplyPatch(PatchFolder("project"), approve=ask)
    output = await tool.run("apply_patch", "*** Begin Patch\\n...")

The model calls it as `functions.apply_patch` with the patch as its argument. `approve` is shown the plan - what it
would do, and as a unified diff - before anything is written; without it every patch that fits is applied.

`ToolOutput.details`   {"files": [{"kind": "A" | "M" | "D", "path": ..., "move_to": ... or null}], "diff": unified diff,
                       "operations": as the Responses API's `apply_patch_call` has them; empty where a file moves}
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from typing import Any

from ossia.errors import OssiaError
from ossia.harmony import ToolDescription, ToolNamespace
from ossia.tools.base import ToolOutput
from ossia.tools.patch_files import PatchFolder, Plan
from ossia.tools.patch_format import PatchError, parse_patch, patch_argument, to_call_operation

_MAX_DIFF_CHARS = 200_000

DESCRIPTION = """\
Add, change, move or delete text files. The argument is a patch:
*** Begin Patch
*** Add File: path/new.txt
+every line of a new file begins with +
*** Update File: path/old.py
*** Move to: path/renamed.py
@@ class A
@@     def f(self):
 three lines of context, each after one blank
-a line that goes
+a line that comes
 three lines of context
*** Delete File: path/gone.txt
*** End Patch
Paths are relative. `*** Move to:` and the headers behind `@@` are optional; a header repeats a line of the file that \
is above the change, where context alone would fit several places. The patch is applied as a whole or not at all."""


class ApplyPatch:
    """The tool of one conversation, over one folder, which is closed with it."""

    def __init__(self, folder: PatchFolder, *, approve: Callable[[Plan], Awaitable[bool]] | None = None) -> None:
        self._folder = folder
        self._approve = approve

    @property
    def namespace(self) -> ToolNamespace:
        parameters = {"type": "string", "description": "The patch, from *** Begin Patch to *** End Patch."}
        return ToolNamespace.functions([ToolDescription("apply_patch", DESCRIPTION, parameters)])

    async def run(self, name: str, arguments: str) -> ToolOutput:
        if name not in ("apply_patch", ""):
            return ToolOutput(f"Error: there is no function {name!r}; expected apply_patch", is_error=True)
        try:
            plan, details = await asyncio.to_thread(self._plan, arguments)
            if self._approve is not None and not await self._approve(plan):
                return ToolOutput("Error: the user has declined this patch. No file was changed.", True, details)
            await _commit(plan)
        except OssiaError as error:
            return ToolOutput(f"Error: {error.message}", is_error=True)
        except OSError as error:
            return ToolOutput(f"Error: {error.strerror or error}", is_error=True)
        return ToolOutput(plan.summary(), details=details)

    def _plan(self, arguments: str) -> tuple[Plan, dict[str, Any]]:
        plan = self._folder.plan(parse_patch(patch_argument(arguments)))
        return plan, _details(plan)

    async def close(self) -> None:
        self._folder.close()


async def _commit(plan: Plan) -> None:
    """Apply in a thread; being cancelled, wait until it has gone back or is done, and leave no half of a patch."""
    is_cancelled = threading.Event()
    writing = asyncio.ensure_future(asyncio.to_thread(plan.commit, is_cancelled.is_set))
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        is_cancelled.set()
        await asyncio.wait([writing])
        # Whatever it says, nobody is there to hear it.
        if not writing.cancelled():
            writing.exception()
        raise


def _details(plan: Plan) -> dict[str, Any]:
    files = [{"kind": c.kind, "path": c.path, "move_to": c.move_to} for c in plan.changes]
    try:
        operations = [to_call_operation(operation) for operation in plan.operations]
    except PatchError:
        operations = []
    return {"files": files, "diff": plan.unified_diff()[:_MAX_DIFF_CHARS], "operations": operations}
