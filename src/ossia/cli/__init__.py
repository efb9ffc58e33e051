"""The command `ossia`.

Exit codes: 0 done, 1 an error that the message explains (or a check that found problems), 2 wrong usage, 130
interrupted. What a command was asked for goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import sys

from ossia.errors import OssiaError


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. ``argv`` None takes the process's own arguments."""
    # typer is wanted by the command line alone, not by whoever imports this package for its layers.
    from ossia.cli.app import app

    try:
        app(argv, prog_name="ossia")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except OssiaError as error:
        print(f"ossia: {error.message}", file=sys.stderr)
        return 1
    return 0
