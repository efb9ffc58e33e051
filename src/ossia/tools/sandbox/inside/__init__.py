"""What runs inside a sandbox: standard library only, sent to a bare interpreter over its control pipe.

`supervisor` holds the control pipe and everything that must be trusted; `worker` runs the model's code and holds
nothing. The modules are loaded in the order of `MODULES`, which is that of their imports.
"""

from __future__ import annotations

MODULES = (
    "wire",
    "seccomp",
    "landlock",
    "processes",
    "files",
    "display",
    "failure",
    "paths",
    "recording",
    "cells",
    "supervisor",
)
