"""The command `ossia`.

Exit codes: 0 done, 1 an error that the message explains (or a check that found problems), 2 wrong usage, 130
interrupted. What a command was asked for goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

from ossia.errors import OssiaError


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. ``argv`` None takes the process's own arguments."""
    # Where whoever started the command has closed a stream, Python has None in its place.
    sys.stdout = sys.stdout or _nowhere()
    sys.stderr = sys.stderr or _nowhere()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A character that the terminal's encoding lacks becomes a question mark, and no traceback.
        sys.stdout.reconfigure(errors="replace")
    code = _run(argv)
    try:
        sys.stdout.flush()
    except OSError as error:
        # Or Python would try again at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1 if isinstance(error, BrokenPipeError) else _fail(_reason(error))
    return code


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _run(argv: list[str] | None) -> int:
    # typer is wanted by the command line alone, not by whoever imports this package for its layers.
    from ossia.cli.app import app

    try:
        app(argv, prog_name="ossia")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except OssiaError as error:
        return _fail(error.message)
    except OSError as error:
        # What the system refuses is the user's to mend: a full disk, a file without permission, a name too long.
        return _fail(_reason(error))
    return 0


def _reason(error: OSError) -> str:
    named = f"{error.filename}: " if error.filename is not None else ""
    return f"{named}{error.strerror or error}"


def _fail(message: str) -> int:
    print(f"ossia: {message}", file=sys.stderr)
    return 1
