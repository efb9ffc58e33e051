"""`ossia doctor`: what this machine and this installation can do, and what to do about the rest."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ossia.cli.findings import Finding

_MARKS = {"ok": "ok", "info": "-", "warn": "!", "bad": "BAD"}
_COLOURS = {"ok": "green", "info": "dim", "warn": "yellow", "bad": "bold red"}


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Tell what works on this machine: kernels, memory, sandbox, browser, MCP, GPU, ports, disks and settings.

    Nothing is changed, no model is loaded and no network is asked. Exit code 1 means that something is broken that
    ossia cannot do without, or that the settings ask for.

    Example: ossia doctor
    """
    from ossia.cli.findings import look

    # What is wrong is among the findings, each once.
    logging.getLogger("ossia").addHandler(logging.NullHandler())
    findings = look()
    is_well = not any(one.state == "bad" for one in findings)
    if as_json:
        print(json.dumps({"ok": is_well, "findings": [dataclasses.asdict(one) for one in findings]}))
    else:
        _show(findings)
    raise typer.Exit(int(not is_well))


def _show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.text import Text

    from ossia.cli.chat_text import harmless

    # Lines are for reading and for searching: none is broken where nobody sees them on a terminal.
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    area = ""
    for one in findings:
        name = one.area if one.area != area else ""
        area = one.area
        line = Text(f"{name:<11}", style="bold")
        line.append(f"{_MARKS[one.state]:<4}", style=_COLOURS[one.state])
        line.append(harmless(one.words), style="dim" if one.state == "info" else "default")
        console.print(line)
        if one.advice:
            console.print(Text(f"{'':<15}-> {harmless(one.advice)}"))
    counts = {state: sum(one.state == state for one in findings) for state in _MARKS}
    console.print()
    if counts["bad"]:
        console.print(f"{counts['bad']} broken, {counts['warn']} less than it could be.")
    elif counts["warn"]:
        console.print(f"Nothing is broken; {counts['warn']} less than it could be.")
    else:
        console.print("All is well.")
