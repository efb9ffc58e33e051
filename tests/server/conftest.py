"""A server on a real port, with scripted tokens behind it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from tests.responses.scripts import FINAL, REASONED, Scripted, model

from ossia.responses.loop import Model
from ossia.server.app import create_app
from ossia.server.protocol import Protocol
from ossia.server.service import Service
from ossia.server.store import Store


class Served:
    """A started server, and its clients."""

    def __init__(self, made: Model, store: Store, **limits: Any) -> None:
        self.engine: Scripted = made.engine
        self.service = Service(made, store, aliases=("openai/gpt-oss-20b", "gpt-oss:20b"), **limits)
        listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            create_app(self.service), http=Protocol, ws="none", log_level="warning", timeout_graceful_shutdown=5
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.005)
        self.http = httpx.Client(base_url=self.url, timeout=60)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)

    def play(self, *scripts: str, delay_s: float = 0) -> Scripted:
        """What the model says from now on, answer by answer."""
        self.engine.__init__(*scripts, delay_s=delay_s)
        return self.engine

    def until_idle(self) -> None:
        for _ in range(200):
            if not self.engine.num_open and not self.service.admission.num_running:
                return
            time.sleep(0.01)
        raise AssertionError("a sequence was not freed")

    def stop(self) -> None:
        self.http.close()
        self.openai.close()
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Iterator[Served]:
    path = tmp_path_factory.mktemp("server") / "ossia.db"
    served = Served(model(engine=Scripted(FINAL)), Store(f"sqlite:///{path}"))
    yield served
    served.stop()


@pytest.fixture
def served(shared: Served) -> Iterator[Served]:
    """The server, which says a thought and an answer unless told otherwise."""
    shared.play(REASONED + FINAL)
    yield shared
    shared.until_idle()


@pytest.fixture
def serve(tmp_path) -> Iterator[Any]:
    """Starts servers with limits of their own."""
    started: list[Served] = []

    def start(*scripts: str, engine: Scripted | None = None, **limits: Any) -> Served:
        store = limits.pop("store", None) or Store(f"sqlite:///{tmp_path / f'{len(started)}.db'}")
        started.append(Served(model(engine=engine or Scripted(*scripts or (REASONED + FINAL,))), store, **limits))
        return started[-1]

    yield start
    for one in started:
        one.stop()
