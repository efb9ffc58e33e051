"""`ossia mcp`: ossia's tools for other programs, over the Model Context Protocol."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from ossia.config import Config
    from ossia.tools.mcp_server import ToolServer


def mcp(
    tools: Annotated[
        str, typer.Option("--tools", help="Names with commas between; module:function is a function of yours.")
    ] = "apply_patch",
    http: Annotated[
        bool, typer.Option("--http", help="Serve HTTP at /mcp instead of standard input and output.")
    ] = False,
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, help="Port to listen on; 0 for a free one. [default: 8000]")
    ] = None,
    key_file: Annotated[
        str | None, typer.Option(help="Ask for one of the API keys whose hashes are in here; see `ossia serve`.")
    ] = None,
    open_to_all: Annotated[
        bool, typer.Option("--open-to-all", help="Listen where others reach it without asking for a key.")
    ] = False,
    patch_folder: Annotated[str | None, typer.Option(help="Folder that apply_patch works in.")] = None,
    audit_log: Annotated[str | None, typer.Option(help="Log every call to this file, a JSON line each.")] = None,
) -> None:
    """Offer tools to other programs over the Model Context Protocol.

    Each session of a client has tools of its own. A client starts the command itself, or asks a server that runs with
    `--http`.

    Example: ossia mcp --tools apply_patch --patch-folder project
    """
    from ossia import config
    from ossia.errors import ConfigError
    from ossia.tools.audit import AuditLog
    from ossia.tools.mcp_server import ToolServer
    from ossia.tools.registry import make

    settings = config.load(
        {
            "host": host,
            "port": port,
            "key_file": key_file,
            "open_to_all": "yes" if open_to_all else None,
            "patch_folder": patch_folder,
            "audit_log": audit_log,
        }
    )
    names = [name.strip() for name in tools.split(",") if name.strip()]
    if not names:
        raise ConfigError("--tools names no tool; expected names with commas between")
    # A fault is told now, not to the first client.
    _check(names, settings)
    audit = None
    if settings.audit_log:
        path = Path(settings.audit_log).expanduser()
        audit = AuditLog(path, with_contents=settings.audit_contents == "yes")
    server = ToolServer(lambda: [make(name, settings) for name in names], audit=audit)
    if http:
        _serve(server, settings)
        return
    import asyncio

    asyncio.run(server.run_stdio())


def _check(names: list[str], settings: Config) -> None:
    import asyncio

    from ossia.tools.mcp_server import offers
    from ossia.tools.registry import make

    async def check() -> None:
        made = []
        try:
            for name in names:
                made.append(make(name, settings))
            offers(made)
        finally:
            for tool in made:
                await tool.close()

    asyncio.run(check())


def _serve(server: ToolServer, settings: Config) -> None:
    import socket

    import uvicorn

    from ossia.errors import AuthError
    from ossia.server.limits import Keys, check_bind
    from ossia.tools.mcp_server import PATH

    keys = Keys.read(Path(settings.key_file).expanduser()) if settings.key_file else Keys()
    check_bind(settings.host, keys, is_open_allowed=settings.open_to_all == "yes")

    def name_of_key(key: str | None) -> str | None:
        try:
            return keys.check(f"Bearer {key}" if key else None)
        except AuthError:
            return None

    app = server.http_app(host=settings.host, name_of_key=name_of_key if keys else None)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.create_server((settings.host, settings.port), family=family) as listening:
        port = listening.getsockname()[1]
        print(f"ossia: serving tools on http://{settings.host}:{port}{PATH}", file=sys.stderr, flush=True)
        uvicorn_server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
        uvicorn_server.run(sockets=[listening])
