"""`ossia pull`: fetch a published checkpoint."""

from __future__ import annotations

import sys
from typing import Annotated

import typer


def pull(
    name: Annotated[
        str,
        typer.Argument(
            help="gpt-oss-20b, gpt-oss-120b, gpt-oss-safeguard-20b, ... or owner/name; owner/name:Q8_0 is one of "
            "several GGUF files."
        ),
    ],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; the latest by default.")] = None,
) -> None:
    """Download a checkpoint into the ordinary Hugging Face cache, where `--model NAME` finds it.

    An interrupted download goes on where it stopped: run the same command again.
    """
    from ossia.model import hub

    print(hub.pull(name, revision, show_progress=sys.stderr.isatty()))
    print(f"ossia: ready: ossia generate 'Hello' --model {name}", file=sys.stderr)
