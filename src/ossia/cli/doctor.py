"""`ossia doctor`: what this machine and this installation can do, and what to do about the rest."""

from __future__ import annotations

import dataclasses
import json
import logging
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
    from rich.table import Table
    from rich.text import Text

    from ossia.cli.chat_text import harmless

    console = Console(highlight=False)
    table = Table.grid(padding=(0, 2, 0, 0))
    area = ""
    for one in findings:
        name, area = one.area if one.area != area else "", one.area
        style = "dim" if one.state == "info" else ""
        words = Text(harmless(one.words), style=style)
        if one.advice:
            words.append(f"\n-> {harmless(one.advice)}", style="default")
        if not console.is_terminal:
            # Lines are for searching: none is broken where no terminal shows them.
            plain = words.plain.replace("\n", f"\n{'':<15}")
            print(f"{name:<11}{_MARKS[one.state]:<4}{plain}")
            continue
        table.add_row(Text(name, style="bold"), Text(_MARKS[one.state], style=_COLOURS[one.state]), words)
    if console.is_terminal:
        console.print(table)
    counts = {state: sum(one.state == state for one in findings) for state in _MARKS}
    if counts["bad"]:
        console.print(f"\n{counts['bad']} broken, {counts['warn']} less than it could be.")
    elif counts["warn"]:
        console.print(f"\nNothing is broken; {counts['warn']} less than it could be.")
    else:
        console.print("\nAll is well.")
