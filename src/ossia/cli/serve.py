"""`ossia serve`: a model behind OpenAI's APIs."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ossia.cli import options
from ossia.cli.listening import listen, take_address
from ossia.cli.team import follows

if TYPE_CHECKING:
    from ossia.config import Config
    from ossia.engine import AsyncEngine
    from ossia.local import LocalModel
    from ossia.responses.loop import Model, TokenSource
    from ossia.responses.seal import Seal
    from ossia.responses.toolbox import Toolboxes
    from ossia.server.limits import Keys
    from ossia.server.service import Service

_GRACE_S = 30


Host = Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")]
Port = Annotated[
    int | None, typer.Option(min=0, max=65535, help="Port to listen on; 0 for a free one. [default: 8000]")
]
Name = Annotated[str, typer.Option(help="What clients call the model; the checkpoint's name by default.")]
Adapters = Annotated[
    list[str] | None,
    typer.Option(
        "--adapter", metavar="NAME=PATH", help="Offer a LoRA adapter, which clients choose as a model; repeatable."
    ),
]
AdapterDir = Annotated[
    str | None, typer.Option(help="Let clients load adapters from this folder, and unload any. [default: none]")
]
Store = Annotated[
    str | None, typer.Option(help="Keep responses at this SQLAlchemy URL. [default: a file in the data folder]")
]
KeyFile = Annotated[str | None, typer.Option(help="Ask for one of the API keys whose hashes are in here.")]
NewKey = Annotated[str, typer.Option("--new-key", metavar="NAME", help="Add a key to --key-file, print it, and leave.")]
OpenToAll = Annotated[
    bool, typer.Option("--open-to-all", help="Listen where others reach it without asking for a key.")
]
MaxRunning = Annotated[int | None, typer.Option(min=1, help="Requests that are answered at once. [default: 64]")]
MaxQueued = Annotated[int | None, typer.Option(min=0, help="Requests that may wait for their turn. [default: 256]")]
MaxPerMinute = Annotated[
    int | None, typer.Option(min=0, help="Requests of one key in a minute; 0 for no limit. [default: 0]")
]
Traces = Annotated[
    str | None, typer.Option(help="Tell an OpenTelemetry collector at this URL where time goes. [default: none]")
]
Tools = Annotated[
    str | None,
    typer.Option(help="Tools to run for clients that ask: python, browser, mcp, with commas; or none. [default: auto]"),
]
AuditLogFile = Annotated[str | None, typer.Option(help="Append a line for every call of a tool to this file.")]
AskAfterUntrusted = Annotated[
    bool,
    typer.Option("--ask-after-untrusted", help="Ask before MCP and functions once a tool's answer is in the context."),
]


def serve(
    model: options.Model = None,
    host: Host = None,
    port: Port = None,
    name: Name = "",
    adapters: Adapters = None,
    adapter_dir: AdapterDir = None,
    adapter_memory: options.AdapterMemory = None,
    store: Store = None,
    key_file: KeyFile = None,
    new_key: NewKey = "",
    open_to_all: OpenToAll = False,
    max_running: MaxRunning = None,
    max_queued: MaxQueued = None,
    max_per_minute: MaxPerMinute = None,
    traces: Traces = None,
    tools: Tools = None,
    browser: options.Browser = None,
    browser_root: options.BrowserRoot = None,
    python_sandbox: options.PythonSandbox = None,
    unsafe_python: options.UnsafePython = False,
    audit_log: AuditLogFile = None,
    ask_after_untrusted: AskAfterUntrusted = False,
    backend: options.Backend = None,
    threads: options.Threads = None,
    dense: options.Dense = None,
    kv: options.KeysAndValues = None,
    kv_memory: options.KvMemory = None,
    gpu_memory: options.GpuMemory = None,
    tp: options.Tp = None,
    max_context: options.MaxContext = None,
) -> None:
    """Serve a model to OpenAI's clients: Responses, Chat Completions, and Anthropic's Messages.

    Settings may also come from OSSIA_* variables and ~/.config/ossia/config.toml; /docs on the running server tells
    every endpoint. Where a request names no temperature, top_p, top_k, min_p or repetition_penalty, those of the
    checkpoint's generation_config.json hold.

    Example: ossia serve --model gpt-oss-20b
    """
    settings = options.settings_of(locals())
    # The server's libraries take a second to import; nothing else waits for them.
    from ossia.errors import ConfigError
    from ossia.server.limits import Keys, check_bind

    if new_key:
        if not settings.key_file:
            raise ConfigError("--new-key needs --key-file: the file that keeps the key's hash")
        print(Keys.make(Path(os.path.expanduser(settings.key_file)), new_key))
        return
    if follows(settings):
        return
    keys = Keys.read(Path(os.path.expanduser(settings.key_file))) if settings.key_file else Keys()
    check_bind(settings.host, keys, is_open_allowed=settings.open_to_all == "yes")
    wanted = _wanted(settings)
    offered = open_tools(settings, wanted, unsafe_python)
    taken, url = take_address(settings)
    with taken:
        # What is kept tells servers apart by their ports.
        settings = dataclasses.replace(settings, port=taken.getsockname()[1])
        service, engine = _open(settings, keys, name, offered)
        try:
            _run(service, taken, url, required=wanted if settings.tools != "auto" else [])
        finally:
            engine.close()


def _wanted(settings: Config) -> list[str]:
    """Names of the tools that are to be offered. Raises ConfigError."""
    from ossia.errors import ConfigError

    known = ("python", "browser", "mcp")
    if settings.tools == "auto":
        return ["python", "mcp", *(["browser"] if settings.browser else [])]
    names = [one.strip() for one in settings.tools.split(",") if one.strip() and one.strip() != "none"]
    for one in names:
        if one not in known:
            raise ConfigError(f"tools names {one!r}; expected some of: {', '.join(known)}; or none, or auto")
    return names


def open_tools(settings: Config, wanted: list[str], unsafe_python: bool) -> Toolboxes:
    """What is offered, with the reasons why the rest is not; the sandbox is proven when the server starts."""
    from importlib.util import find_spec

    from ossia.config import data_folder
    from ossia.errors import ConfigError
    from ossia.responses.seal import Seal
    from ossia.responses.toolbox import Toolboxes
    from ossia.tools.audit import AuditLog
    from ossia.tools.browser import BrowserRules
    from ossia.tools.mcp import Approvals, McpPool
    from ossia.tools.python import PythonSessions
    from ossia.tools.web.backend import open_backend

    # Of a tool that nobody asked for there is nothing to tell.
    off: dict[str, str] = {}
    if settings.tools == "auto" and not settings.browser:
        off["browser"] = "no --browser-root FOLDER or --browser says where it searches"
    if "browser" in wanted and not settings.browser:
        raise ConfigError("tools names browser; say where it searches, with --browser-root FOLDER or --browser")
    if "mcp" in wanted and find_spec("mcp") is None:
        off["mcp"] = "the package mcp is not installed; pip install 'ossia[mcp]'"
    if unsafe_python:
        print("ossia: --unsafe-python: code of the model runs as you, with all that you may do", file=sys.stderr)
    contents = settings.audit_contents == "yes"
    audit_log = Path(os.path.expanduser(settings.audit_log))
    audit = AuditLog(audit_log, with_contents=contents) if settings.audit_log else None
    python = PythonSessions(settings.python_sandbox, unsafe_python=unsafe_python) if "python" in wanted else None
    return Toolboxes(
        python=python,
        browser=open_backend(settings.browser, key=settings.browser_key) if "browser" in wanted else None,
        mcp=settings.mcp,
        mcp_pool=McpPool() if "mcp" in wanted and "mcp" not in off else None,
        approvals=Approvals(Seal.at(data_folder() / "seal.key").derived("approvals")),
        audit=audit,
        rules=BrowserRules.of(settings),
        links=settings.browser_links,
        asks_after_untrusted=settings.ask_after_untrusted == "yes",
        off=off,
    )


def _open(settings: Config, keys: Keys, name: str, tools: Toolboxes) -> tuple[Service, AsyncEngine]:
    """The model, its engine in a thread, and the store."""
    import datetime

    from ossia.config import data_folder
    from ossia.engine import AsyncEngine
    from ossia.errors import ConfigError
    from ossia.local import LocalModel, demonstration
    from ossia.responses.seal import Seal
    from ossia.server.adapters import Adapters
    from ossia.server.limits import Admission, Rates
    from ossia.server.service import Service
    from ossia.server.store import Store
    from ossia.server.tracing import Tracing

    folder = data_folder()
    url = settings.store or f"sqlite:///{folder / 'responses.db'}"
    store = Store(
        url,
        ttl_s=settings.store_days * 86_400,
        max_bytes=settings.store_size,
        server=f"{socket.gethostname()}:{settings.port}",
    )
    adapter_dir = Path(os.path.expanduser(settings.adapter_dir)) if settings.adapter_dir else None
    if adapter_dir is not None and not adapter_dir.is_dir():
        raise ConfigError(f"adapter_dir is {settings.adapter_dir!r}, which is no folder", param="adapter_dir")
    local = LocalModel.open(dataclasses.replace(settings, adapters={}))
    called = name or Path(settings.model).name.removesuffix(".gguf")
    engine = AsyncEngine(local.engine)
    model = answering(local, called, engine, settings, Seal.at(folder / "seal.key"))
    aliases = _aliases(called)
    adapters = Adapters(engine, local.read_adapter, taken=(called, *aliases), folder=adapter_dir)
    for adapter_name, path in settings.adapters.items():
        adapters.load(adapter_name, Path(path), model)
    service = Service(
        model,
        store,
        aliases=aliases,
        adapters=adapters,
        keys=keys,
        rates=Rates(settings.max_per_minute),
        admission=Admission(settings.max_running, settings.max_queued),
        max_request_bytes=settings.max_request,
        tools=tools,
        tracing=Tracing.to_collector(settings.traces) if settings.traces else None,
        refuses_pages=not keys and settings.open_to_all != "yes",
        created_at=int(datetime.datetime.now(datetime.UTC).timestamp()),
        context=local.engine.max_context,
        notice=demonstration(settings),
    )
    service.watch(engine.stats)
    return service, engine


def answering(local: LocalModel, name: str, engine: TokenSource, settings: Config, seal: Seal | None = None) -> Model:
    """An opened model as responses are made of it; what is special about its answers is told."""
    from ossia.engine.masks import GrammarCompiler
    from ossia.responses.constrain import Grammars
    from ossia.responses.loop import Budget, Model
    from ossia.responses.seal import Seal

    if local.checkpoint.has_random_weights:
        print("ossia: the weights of this checkpoint are random: answers will be noise", file=sys.stderr)
    if local.sampling:
        named = ", ".join(f"{field} {value:g}" for field, value in local.sampling.items())
        print(f"ossia: where nothing else is said, sampled as the checkpoint says: {named}", file=sys.stderr)
    return Model(
        name,
        engine,
        local.tokenizer,
        seal or Seal.ephemeral(),
        constrain=Grammars(GrammarCompiler(local.tokenizer)),
        budget=Budget(settings.max_tool_calls, settings.max_tool_seconds, settings.max_tool_tokens),
        sampling=local.sampling,
    )


def _aliases(name: str) -> list[str]:
    """How other servers call the same model: openai/gpt-oss-20b, gpt-oss:20b."""
    family, _, size = name.rpartition("-")
    return [f"openai/{name}", f"{family}:{size}"] if name.startswith("gpt-oss") else []


def _run(service: Service, taken: socket.socket, url: str, required: list[str]) -> None:
    import asyncio
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    # Ctrl-C has ended the server in good order.
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(service, taken, url, required))


async def _serve(service: Service, taken: socket.socket, url: str, required: list[str]) -> None:
    """Prove what was asked for, then serve, in one event loop. Raises UnavailableError for a tool that is off."""
    import uvicorn

    from ossia.cli.ps import listed
    from ossia.server.app import create_app
    from ossia.server.protocol import Protocol

    try:
        on, off = await service.tools.start(required)
    except BaseException:
        await service.stop(0)
        raise
    print(f"ossia: tools: {', '.join(on) or 'none'}", file=sys.stderr)
    for name, reason in off.items():
        print(f"ossia: {name} is off: {reason}", file=sys.stderr)
    if service.adapters is not None and service.adapters.offered:
        print(f"ossia: adapters: {', '.join(service.adapters.offered)}", file=sys.stderr)
    config = uvicorn.Config(
        create_app(service),
        http=Protocol,
        ws="none",
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GRACE_S,
    )
    with listed(url, service.model.name):
        listen(taken)
        print(f"ossia: serving {service.model.name} on {url}/v1, and a page to chat on at {url}/", file=sys.stderr)
        await uvicorn.Server(config).serve(sockets=[taken])
