"""`ossia serve`: a model behind OpenAI's APIs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ossia.cli import options

if TYPE_CHECKING:
    from ossia.config import Config
    from ossia.server.service import Service

_GRACE_S = 30


def serve(
    model: options.Model = "",
    host: Annotated[str | None, typer.Option(help="Address to listen on. [default: 127.0.0.1]")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, help="Port to listen on; 0 for a free one. [default: 8000]")
    ] = None,
    name: Annotated[str, typer.Option(help="What clients call the model; the checkpoint's name by default.")] = "",
    store: Annotated[
        str | None, typer.Option(help="Keep responses at this SQLAlchemy URL. [default: a file in the data folder]")
    ] = None,
    key_file: Annotated[str | None, typer.Option(help="Ask for one of the API keys whose hashes are in here.")] = None,
    new_key: Annotated[
        str, typer.Option("--new-key", metavar="NAME", help="Add a key to --key-file, print it, and leave.")
    ] = "",
    open_to_all: Annotated[
        bool, typer.Option("--open-to-all", help="Listen where others reach it without asking for a key.")
    ] = False,
    max_running: Annotated[
        int | None, typer.Option(min=1, help="Requests that are answered at once. [default: 64]")
    ] = None,
    max_queued: Annotated[
        int | None, typer.Option(min=0, help="Requests that may wait for their turn. [default: 256]")
    ] = None,
    max_per_minute: Annotated[
        int | None, typer.Option(min=0, help="Requests of one key in a minute; 0 for no limit. [default: 0]")
    ] = None,
    traces: Annotated[
        str | None,
        typer.Option(help="Tell an OpenTelemetry collector at this URL where time goes. [default: none]"),
    ] = None,
    backend: options.Backend = None,
    threads: options.Threads = None,
    dense: options.Dense = None,
    kv: options.KeysAndValues = None,
    kv_memory: options.KvMemory = None,
    max_context: options.MaxContext = None,
) -> None:
    """Serve a model to OpenAI's clients: Responses, Chat Completions, and Anthropic's Messages.

    Settings may also come from OSSIA_* variables and ~/.config/ossia/config.toml; /docs on the running server tells
    every endpoint.

    Example: ossia serve --model gpt-oss-20b
    """
    # The server's libraries take a second to import; nothing else waits for them.
    from ossia import config
    from ossia.errors import ConfigError
    from ossia.server.limits import Keys, check_bind

    settings = config.load(
        {
            "model": model or None,
            "host": host,
            "port": port,
            "store": store,
            "key_file": key_file,
            "open_to_all": "yes" if open_to_all else None,
            "max_running": max_running,
            "max_queued": max_queued,
            "max_per_minute": max_per_minute,
            "traces": traces,
            "backend": backend,
            "threads": threads,
            "dense": dense,
            "kv": kv,
            "kv_memory": kv_memory,
            "max_context": max_context,
        }
    )
    if new_key:
        if not settings.key_file:
            raise ConfigError("--new-key needs --key-file: the file that keeps the key's hash")
        print(Keys.make(Path(settings.key_file).expanduser(), new_key))
        return
    keys = Keys.read(Path(settings.key_file).expanduser()) if settings.key_file else Keys()
    check_bind(settings.host, keys, is_open_allowed=settings.open_to_all == "yes")
    _run(_open(settings, keys, name), settings)


def _open(settings: Config, keys: object, name: str) -> Service:
    """The model, its engine in a thread, and the store."""
    import datetime
    import socket

    from ossia.config import data_folder
    from ossia.engine import AsyncEngine
    from ossia.engine.masks import GrammarCompiler
    from ossia.local import LocalModel
    from ossia.responses.constrain import Grammars
    from ossia.responses.loop import Model
    from ossia.responses.seal import Seal
    from ossia.server.limits import Admission, Keys, Rates
    from ossia.server.service import Service
    from ossia.server.store import Store
    from ossia.server.tracing import Tracing

    assert isinstance(keys, Keys)
    folder = data_folder()
    url = settings.store or f"sqlite:///{folder / 'responses.db'}"
    store = Store(
        url,
        ttl_s=settings.store_days * 86_400,
        max_bytes=settings.store_size,
        server=f"{socket.gethostname()}:{settings.port}",
    )
    local = LocalModel.open(settings)
    if local.checkpoint.has_random_weights:
        print("ossia: the weights of this checkpoint are random: answers will be noise", file=sys.stderr)
    called = name or Path(settings.model).name.removesuffix(".gguf")
    engine = AsyncEngine(local.engine)
    constrain = Grammars(GrammarCompiler(local.tokenizer))
    model = Model(called, engine, local.tokenizer, Seal.at(folder / "seal.key"), constrain=constrain)
    service = Service(
        model,
        store,
        aliases=_aliases(called),
        keys=keys,
        rates=Rates(settings.max_per_minute),
        admission=Admission(settings.max_running, settings.max_queued),
        max_request_bytes=settings.max_request,
        tracing=Tracing.to_collector(settings.traces) if settings.traces else None,
        created_at=int(datetime.datetime.now(datetime.UTC).timestamp()),
    )
    service.watch(engine.stats)
    return service


def _aliases(name: str) -> list[str]:
    """How other servers call the same model: openai/gpt-oss-20b, gpt-oss:20b."""
    family, _, size = name.rpartition("-")
    return [f"openai/{name}", f"{family}:{size}"] if name.startswith("gpt-oss") else []


def _run(service: Service, settings: Config) -> None:
    import logging

    import uvicorn

    from ossia.server.app import create_app

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    print(f"ossia: serving {service.model.name} on http://{settings.host}:{settings.port}/v1", file=sys.stderr)
    uvicorn.run(
        create_app(service),
        host=settings.host,
        port=settings.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=_GRACE_S,
    )
