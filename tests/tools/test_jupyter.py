"""The remote kernel against a server of the test's own that speaks Jupyter's protocol over real HTTP and WebSockets."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect

from ossia.errors import ConfigError, UnavailableError
from ossia.tools.python import PythonSessions
from ossia.tools.sandbox.jupyter import JupyterServer
from ossia.tools.sandbox.limits import Limits


class Server:
    """A kernel that runs a few words of Python in this process, and what was asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.is_stubborn = False
        # Seconds before a kernel is started, and before its channels open.
        self.start_s = self.channels_s = 0.0
        self.app = FastAPI()
        self.names: dict[str, Any] = {}
        self.stop = asyncio.Event()

        @self.app.middleware("http")
        async def check(request: Request, go_on: Any) -> Any:
            self.asked.append(f"{request.method} {request.url.path}")
            if request.headers.get("authorization") != "token sesame":
                return Response(status_code=403)
            return await go_on(request)

        @self.app.get("/base/api")
        def version() -> dict[str, str]:
            return {"version": "2.14.0"}

        @self.app.post("/base/api/kernels")
        def start() -> dict[str, str]:
            time.sleep(self.start_s)
            self.names = {"__name__": "__main__"}
            return {"id": "abc-123", "name": "python3"}

        @self.app.delete("/base/api/kernels/abc-123")
        def end() -> Response:
            return Response(status_code=204)

        @self.app.post("/base/api/kernels/abc-123/interrupt")
        def interrupt() -> Response:
            if not self.is_stubborn:
                self.stop.set()
            return Response(status_code=204)

        @self.app.post("/base/api/kernels/abc-123/restart")
        def restart() -> dict[str, str]:
            self.names = {"__name__": "__main__"}
            self.stop.set()
            return {"id": "abc-123"}

        @self.app.websocket("/base/api/kernels/abc-123/channels")
        async def channels(ws: WebSocket) -> None:
            if ws.headers.get("authorization") != "token sesame":
                await ws.close(1008)
                return
            self.asked.append("CHANNELS")
            await asyncio.sleep(self.channels_s)
            await ws.accept()
            with contextlib.suppress(WebSocketDisconnect):
                while True:
                    await self.answer(ws, json.loads(await ws.receive_text()))

    async def answer(self, ws: WebSocket, request: dict[str, Any]) -> None:
        async def say(
            kind: str, content: dict[str, Any], parent: dict[str, Any] | None = None, channel: str = "iopub"
        ) -> None:
            header = {"msg_type": kind, "msg_id": "m"}
            message = {"header": header, "msg_type": kind, "channel": channel, "content": content}
            await ws.send_text(json.dumps(message | {"parent_header": parent or request["header"]}))

        code = request["content"]["code"]
        await say("status", {"execution_state": "busy"})
        # Of another client's call, and of nobody's.
        await say("stream", {"name": "stdout", "text": "FOREIGN"}, {"msg_id": "other"})
        await ws.send_text("no json")
        await ws.send_text("[1]")
        status = "ok"
        if "forever" in code:
            self.stop.clear()
            await self.stop.wait()
            status = "error"
            await say(
                "error",
                {"ename": "KeyboardInterrupt", "evalue": "", "traceback": ["\x1b[0;31mKeyboardInterrupt\x1b[0m"]},
            )
        elif "hangup" in code:
            await ws.close()
            return
        elif "picture" in code:
            await say(
                "display_data", {"data": {"image/png": "iVBORw0K", "text/plain": ["<pic", "ture>"], "x/y": {"a": 1}}}
            )
        else:
            printed = io.StringIO()
            try:
                with contextlib.redirect_stdout(printed):
                    exec(code, self.names)
            except Exception:
                status = "error"
                await say("error", {"traceback": traceback.format_exc().splitlines()})
            await say("stream", {"name": "stdout", "text": printed.getvalue()})
        await say("execute_reply", {"status": status}, channel="shell")
        await say("status", {"execution_state": "idle"})


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, str]]:
    # The kernel is this very process: it must make no /mnt/data here, nor move.
    data = str(tmp_path / "data")
    prepare = f"import os\nos.makedirs({data!r}, exist_ok=True)\nprint('ossia-answer:' + {data!r})"
    monkeypatch.setattr("ossia.tools.sandbox.jupyter._PREPARE", prepare)
    made = Server()
    listener = socket.create_server(("127.0.0.1", 0))
    running = uvicorn.Server(uvicorn.Config(made.app, log_level="error"))
    thread = threading.Thread(target=running.run, args=([listener],), daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield made, f"http://127.0.0.1:{listener.getsockname()[1]}/base"
    running.should_exit = True
    thread.join(10)
    listener.close()


def test_a_conversation_has_a_kernel_of_its_own_and_gives_it_back(server: tuple[Server, str]) -> None:
    made, url = server

    async def run() -> None:
        async with PythonSessions(f"jupyter:{url}?token=sesame", num_warm=0) as sessions:
            tool = sessions.tool("a")
            assert (await tool.run("", "x = 20\nprint(x + 1)")).text == "21"
            assert (await tool.run("", "print(x * 2)")).text == "40"
            assert (await tool.run("", "y = 1")).text.startswith("[WARN] No output available.")
            output = await tool.run("", "picture")
            assert output.text == "<picture>" and output.details["tier"] == "jupyter"
            assert output.details["outputs"] == [{"type": "image", "url": "data:image/png;base64,iVBORw0K"}]
            failed = await tool.run("", "1/0")
            assert "ZeroDivisionError" in failed.text and failed.is_error

    asyncio.run(run())
    assert made.asked.count("POST /base/api/kernels") == 1
    assert made.asked[-1] == "DELETE /base/api/kernels/abc-123"


def test_time_out_interrupts_and_a_kernel_that_will_not_stop_is_restarted(
    server: tuple[Server, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, url = server
    monkeypatch.setattr("ossia.tools.sandbox.jupyter._GRACE_S", 0.3)

    async def run() -> None:
        async with PythonSessions(f"jupyter:{url}?token=sesame", limits=Limits(timeout_s=0.2), num_warm=0) as sessions:
            tool = sessions.tool("a")
            output = await tool.run("", "forever")
            assert "KeyboardInterrupt" in output.text and "\x1b" not in output.text
            assert "[ERROR] Timed out waiting for Jupyter kernel output.\nThe execution was interrupted" in output.text
            made.is_stubborn = True
            output = await tool.run("", "forever")
            assert "The kernel was restarted" in output.text
            assert "POST /base/api/kernels/abc-123/restart" in made.asked

    asyncio.run(run())


def test_files_go_through_the_kernel(server: tuple[Server, str]) -> None:
    _, url = server

    async def run() -> None:
        async with PythonSessions(f"jupyter:{url}?token=sesame", num_warm=0) as sessions:
            session = await sessions.session("a")
            await session.write_file("sub/a.txt", b"hello")
            assert [(one.path, one.size_bytes) for one in await session.list_files()] == [("sub/a.txt", 5)]
            assert await session.read_file("sub/a.txt") == b"hello"

    asyncio.run(run())


def test_a_lost_connection_is_told_and_replaced(server: tuple[Server, str]) -> None:
    _, url = server

    async def run() -> None:
        async with PythonSessions(f"jupyter:{url}?token=sesame", num_warm=0) as sessions:
            output = await sessions.tool("a").run("", "hangup")
            assert output.details["status"] == "gone" and "[ERROR] The environment failed" in output.text
            assert (await sessions.tool("a").run("", "print(1)")).text == "1"

    asyncio.run(run())


@pytest.mark.parametrize("place", ["start", "channels"])
def test_a_kernel_whose_start_is_cancelled_is_given_back(server: tuple[Server, str], place: str) -> None:
    made, url = server
    setattr(made, f"{place}_s", 0.5)

    async def run() -> None:
        async with PythonSessions(f"jupyter:{url}?token=sesame", num_warm=0) as sessions:
            call = asyncio.create_task(sessions.tool("a").run("", "print(1)"))
            while (made.asked or [""])[-1] != {"start": "POST /base/api/kernels", "channels": "CHANNELS"}[place]:
                await asyncio.sleep(0.01)
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call

    asyncio.run(run())
    assert made.asked[-1] == "DELETE /base/api/kernels/abc-123"


def test_a_wrong_key_and_a_wrong_address_are_said(server: tuple[Server, str]) -> None:
    _, url = server

    async def run() -> None:
        async with PythonSessions(f"jupyter:{url}?token=wrong", num_warm=0) as sessions:
            output = await sessions.tool("a").run("", "1")
            assert output.is_error and "answered 403 to POST /api/kernels" in output.text
            assert [one.works for one in await sessions.report() if one.tier == "jupyter"] == [False]
        async with PythonSessions("jupyter:http://127.0.0.1:9", num_warm=0) as sessions:
            assert "cannot be reached" in (await sessions.tool("a").run("", "1")).text
        async with PythonSessions(f"jupyter:{url}?token=sesame", num_warm=0) as sessions:
            report = (await sessions.report())[-1]
            assert report.works and report.words.startswith("works: Jupyter 2.14.0 at http://127.0.0.1")

    asyncio.run(run())


@pytest.mark.parametrize("url", ["", "ftp://x", "host:8888", "http://", "javascript:1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        JupyterServer.parse(url)


def test_the_key_is_not_part_of_the_address() -> None:
    server = JupyterServer.parse("https://h:1/base/?token=abc")
    assert server == JupyterServer("https://h:1/base", "abc")
    with pytest.raises(UnavailableError, match="cannot be reached"):
        asyncio.run(JupyterServer("http://127.0.0.1:9", "abc").ask("GET", "/api"))
