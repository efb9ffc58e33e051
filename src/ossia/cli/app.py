"""All commands in one place, with the help that `ossia --help` prints."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from ossia.cli import bench, chat, checkpoint, data, doctor, export, generate, mcp, prompts, ps, pull, serve, train

app = typer.Typer(
    name="ossia",
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


app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("serve")(serve.serve)
app.command("mcp")(mcp.mcp)
app.command("ps")(ps.ps)
app.command("doctor")(doctor.doctor)
app.command("bench")(bench.bench)
app.command("export")(export.export)
app.command("pull")(pull.pull)
app.add_typer(train.app, name="train")
app.add_typer(checkpoint.app, name="checkpoint")
app.add_typer(data.app, name="data")
app.command("tokenize")(prompts.tokenize)
app.command("render")(prompts.render)
app.command("parse")(prompts.parse)
