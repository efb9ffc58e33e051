"""All commands in one place, with the help that `ossia --help` prints.

A command's module is imported when the command is asked for: `ossia generate` waits for no setting of `ossia train`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

# Commands in the order of the help, and the modules that hold them: a function of that name, or an `app` of several.
_HOMES = {
    "generate": "generate",
    "chat": "chat",
    "serve": "serve",
    "mcp": "mcp",
    "ps": "ps",
    "doctor": "doctor",
    "bench": "bench",
    "export": "export",
    "pull": "pull",
    "tokenize": "prompts",
    "render": "prompts",
    "parse": "prompts",
    "train": "train",
    "checkpoint": "checkpoint",
    "data": "data",
    "eval": "evals",
}


class _Commands(Mapping[str, TyperCommand | TyperGroup]):
    """The commands by name, each made when it is looked up."""

    def __getitem__(self, name: str) -> TyperCommand | TyperGroup:
        module = importlib.import_module(f"ossia.cli.{_HOMES[name]}")
        one = typer.Typer(rich_markup_mode="markdown", callback=_root)
        if hasattr(module, "app"):
            one.add_typer(module.app, name=name)
        else:
            one.command(name)(getattr(module, name))
        group: Any = typer.main.get_command(one)
        return group.commands[name]

    def __iter__(self) -> Iterator[str]:
        return iter(_HOMES)

    def __len__(self) -> int:
        return len(_HOMES)


class _Root(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        # typer reads the commands and never adds one.
        self.commands = cast(Any, _Commands())


app = typer.Typer(
    name="ossia",
    cls=_Root,
    help="Run gpt-oss models from their published checkpoints.\n\n"
    "Get one with `ossia pull gpt-oss-20b`, then ask it: `ossia generate 'Why is the sky blue?' --model gpt-oss-20b`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ossia {version('ossia')}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None: ...
