"""`ossia mcp`: ossia's tools for other programs, over the Model Context Protocol."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ossia.cli import options

if TYPE_CHECKING:
    from ossia.config import Config
    from ossia.tools.mcp_server import ToolServer


def mcp(
    tools: Annotated[
        str,
        typer.Option(
            "--tools", help="python, browser, apply_patch, with commas between; module:function is a function of yours."
        ),
    ] = "apply_patch",
    http: Annotated[
        bool, typer.Option("--http", help="Serve HTTP at /mcp instead of standard input and output.")
    ] = False,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one. [default: 8000]")
    ] = None,
    key_file: Annotated[
        str | None, typer.Option(help="Ask for one of the API keys whose hashes are in here; see `ossia serve`.")
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open-to-all", help="Listen where others reach it without asking for a key.")
    ] = False,
    patch_folder: Annotated[str | None, typer.Option(help="Folder that apply_patch works in.")] = None,
    browser: options.Browser = None,
    browser_root: options.BrowserRoot = None,
    python_sandbox: options.PythonSandbox = None,
    unsafe_python: options.UnsafePython = False,
    audit_log: Annotated[str | None, typer.Option(help="Log every call to this file, a JSON line each.")] = None,
) -> None:
    """Offer tools to other programs over the Model Context Protocol: python, browser, apply_patch, functions of yours.

    Each session of a client has tools of its own. A client starts the command itself, or asks a server that runs with
    `--http`.

    Example: ossia mcp --tools python,browser --browser-root docs/
    """
    settings = options.settings_of(locals(), without=("tools",))
    import asyncio

    from ossia.errors import ConfigError

    names = list(dict.fromkeys(name.strip() for name in tools.split(",") if name.strip()))
    if not names:
        raise ConfigError("--tools names no tool; expected names with commas between")
    # Ctrl-C has ended the server in good order.
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_offer(names, settings, unsafe_python=unsafe_python, is_http=http))


async def _offer(names: list[str], settings: Config, *, unsafe_python: bool, is_http: bool) -> None:
    """Make the tools once, so that a fault is told now and not to the first client, and serve."""
    from ossia.tools.audit import AuditLog
    from ossia.tools.mcp_server import ToolServer, offers
    from ossia.tools.registry import Workshop

    workshop = Workshop(settings, unsafe_python=unsafe_python)
    audit: AuditLog | None = None
    try:
        tools = [workshop.make(name) for name in names]
        offers(tools)
        described = [tool.namespace.description for tool in tools if tool.namespace.tools]
        for tool in tools:
            await tool.close()
        if settings.audit_log:
            path = Path(os.path.expanduser(settings.audit_log))
            audit = AuditLog(path, with_contents=settings.audit_contents == "yes")
        server = ToolServer(
            lambda: [workshop.make(name) for name in names],
            audit=audit,
            instructions="\n\n".join(one for one in described if one),
        )
        if unsafe_python and "python" in names:
            print("ossia: --unsafe-python: code of the model runs as you, with all that you may do", file=sys.stderr)
        for words in await workshop.start():
            print(f"ossia: {words}", file=sys.stderr)
        if is_http:
            await _serve(server, settings)
        else:
            await server.run_stdio()
    finally:
        await workshop.close()
        if audit is not None:
            audit.close()


async def _serve(server: ToolServer, settings: Config) -> None:
    import uvicorn

    from ossia.cli.listening import listen, take_address
    from ossia.errors import AuthError
    from ossia.server.limits import Keys, check_bind
    from ossia.tools.mcp_server import PATH

    keys = Keys.read(Path(os.path.expanduser(settings.key_file))) if settings.key_file else Keys()
    check_bind(settings.host, keys, is_open_allowed=settings.open_to_all == "yes")

    def name_of_key(key: str | None) -> str | None:
        try:
            return keys.check(f"Bearer {key}" if key else None)
        except AuthError:
            return None

    app = server.http_app(host=settings.host, name_of_key=name_of_key if keys else None)
    taken, url = take_address(settings)
    with taken:
        listen(taken)
        print(f"ossia: serving tools on {url}{PATH}", file=sys.stderr, flush=True)
        uvicorn_server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        await uvicorn_server.serve(sockets=[taken])
