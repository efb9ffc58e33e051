"""All commands in one place, with the help that `ossia --help` prints."""

from __future__ import annotations

import typer

from ossia.cli import checkpoint, generate, prompts, pull

app = typer.Typer(
    name="ossia",
    help="Run gpt-oss models from their published checkpoints.\n\n"
    "Get one with `ossia pull gpt-oss-20b`, then ask it: `ossia generate 'Why is the sky blue?' --model gpt-oss-20b`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=False)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and leave.", is_eager=True),
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"ossia {installed('ossia')}")
        raise typer.Exit


app.command("generate")(generate.generate)
app.command("pull")(pull.pull)
app.add_typer(checkpoint.app, name="checkpoint")
app.command("tokenize")(prompts.tokenize)
app.command("render")(prompts.render)
app.command("parse")(prompts.parse)
