from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import types as python_types

import httpx2
import pytest
import uvicorn
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError
from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS, LATEST_MODERN_VERSION
from tests.responses.test_toolbox import sleepers
from tests.responses.tool_scripts import write_docs

import ossia
from ossia.config import Config, McpServer
from ossia.errors import ConfigError, InputError, UnavailableError
from ossia.harmony import ToolDescription, ToolNamespace
from ossia.tools.apply_patch import ApplyPatch
from ossia.tools.audit import AuditLog
from ossia.tools.base import ToolOutput
from ossia.tools.functions import FunctionTools
from ossia.tools.mcp import Approvals, McpPool, McpTool, configured
from ossia.tools.mcp_server import ToolServer, offers
from ossia.tools.patch_files import PatchFolder
from ossia.tools.python import PythonSessions
from ossia.tools.registry import Workshop, find, merged


class Notebook:
    """A tool with a state, as python has: called by its namespace's own name."""

    def __init__(self, log):
        self.cells = []
        self.is_closed = False
        self.num_running = 0
        log.append(self)

    namespace = ToolNamespace("python", "Run it.")

    async def run(self, name, arguments):
        self.num_running += 1
        try:
            assert self.num_running == 1, "two calls at the same time"
            if arguments == "wait":
                await asyncio.sleep(30)
            await asyncio.sleep(0.001)
            self.cells.append(arguments)
            return ToolOutput(f"{len(self.cells)}: {arguments}", is_error=arguments == "bad")
        except asyncio.CancelledError:
            self.cells.append("cancelled")
            raise
        finally:
            self.num_running -= 1

    async def close(self):
        self.is_closed = True


class Browser:
    namespace = ToolNamespace(
        "browser",
        "Browse.",
        (
            ToolDescription("search", "Search.", {"type": "object", "properties": {"query": {"type": "string"}}}),
            ToolDescription("back"),
        ),
    )

    async def run(self, name, arguments):
        return ToolOutput(f"{name} {arguments}")

    async def close(self): ...


@contextlib.asynccontextmanager
async def serving(app):
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/mcp"
    finally:
        server.should_exit = True
        await task


async def call(client, name, **arguments):
    result = await client.call_tool(name, arguments)
    return result.content[0].text, result.is_error


async def until(condition):
    for _ in range(1_000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come about")


# The server ----------------------------------------------------------------------------------------------------------


def test_tools_are_offered_by_names_that_every_client_takes():
    async def main():
        server = ToolServer(lambda: [Notebook([]), Browser()], instructions="Be kind.")
        async with Client(server.lowlevel()) as client:
            listed = {tool.name: tool for tool in (await client.list_tools()).tools}
            assert list(listed) == ["python", "browser_search", "browser_back"] and client.instructions == "Be kind."
            assert listed["python"].input_schema["required"] == ["code"] and listed["python"].description == "Run it."
            assert listed["browser_search"].input_schema["properties"] == {"query": {"type": "string"}}
            assert await call(client, "browser_search", query="ü") == ('search {"query": "ü"}', False)
            assert await call(client, "browser_back") == ("back {}", False)
            assert await call(client, "python", code="1") == ("1: 1", False)
            assert await call(client, "python", code="bad") == ("2: bad", True)
            assert await call(client, "python", text="1") == ("Error: expected one argument, 'code', a text", True)
            text, is_error = await call(client, "browser")
            assert is_error and "expected one of python, browser_search" in text

    asyncio.run(main())


def test_apply_patch_works_over_the_protocol(tmp_path):
    async def main():
        server = ToolServer(lambda: [ApplyPatch(PatchFolder(tmp_path))])
        async with Client(server.lowlevel()) as client:
            patch = "*** Begin Patch\n*** Add File: a.txt\n+hello\n*** End Patch"
            assert await call(client, "apply_patch", input=patch) == (
                "Success. Updated the following files:\nA a.txt",
                False,
            )
            text, is_error = await call(client, "apply_patch", input=patch)
            assert is_error and "exists already" in text

    asyncio.run(main())
    assert (tmp_path / "a.txt").read_text() == "hello\n"


def test_each_session_of_http_has_its_own_tools_which_end_with_it():
    async def main():
        made = []
        server = ToolServer(lambda: [Notebook(made)])
        async with serving(server.http_app()) as url:
            async with Client(url) as one, Client(url) as two:
                assert await call(one, "python", code="a") == ("1: a", False)
                assert await call(two, "python", code="b") == ("1: b", False)
                assert await call(one, "python", code="c") == ("2: c", False)
                assert server.num_sessions == len(made) == 2
            await until(lambda: all(tool.is_closed for tool in made))
            assert server.num_sessions == 0

    asyncio.run(main())


def test_a_session_that_is_silent_ends():
    async def main():
        made = []
        server = ToolServer(lambda: [Notebook(made)], idle_s=0.1)
        async with serving(server.http_app()) as url, httpx2.AsyncClient(trust_env=False) as client:
            headers = {"accept": "application/json, text/event-stream"}
            info = {"protocolVersion": HANDSHAKE_PROTOCOL_VERSIONS[-1], "capabilities": {}}
            params = info | {"clientInfo": {"name": "t", "version": "0"}}
            opening = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
            opened = await client.post(url, json=opening, headers=headers)
            headers["mcp-session-id"] = opened.headers["mcp-session-id"]
            listing = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}
            assert (await client.post(url, json=listing, headers=headers)).status_code == 200
            await until(lambda: made and made[0].is_closed)
            assert (await client.post(url, json=listing, headers=headers)).status_code == 404

    asyncio.run(main())


def test_there_are_only_so_many_sessions():
    async def main():
        server = ToolServer(lambda: [Notebook([])], max_sessions=1)
        async with serving(server.http_app()) as url, Client(url):
            # The SDK wraps what the transport says.
            with pytest.raises(BaseException) as raised:
                async with Client(url):
                    pass
            assert "Too many open sessions" in repr(raised.value) or "503" in repr(raised.value)

    asyncio.run(main())


def test_versions_without_sessions_are_told_to_open_one():
    async def main():
        server = ToolServer(lambda: [Notebook([])])
        async with serving(server.http_app()) as url, Client(url, mode=LATEST_MODERN_VERSION) as client:
            with pytest.raises(MCPError, match="open one with initialize"):
                await client.list_tools()

    asyncio.run(main())


def test_calls_of_one_session_run_one_after_the_other_and_can_be_cancelled():
    async def main():
        made = []
        server = ToolServer(lambda: [Notebook(made)])
        async with serving(server.http_app()) as url, Client(url) as client:
            texts = await asyncio.gather(*(call(client, "python", code=str(i)) for i in range(5)))
            assert sorted(text.partition(":")[0] for text, _ in texts) == ["1", "2", "3", "4", "5"]
            waiting = asyncio.create_task(call(client, "python", code="wait"))
            await until(lambda: made[0].num_running)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            await until(lambda: "cancelled" in made[0].cells)
            assert await call(client, "python", code="on") == ("7: on", False)

    asyncio.run(main())


def test_a_key_is_asked_for_and_a_session_is_its_openers_alone():
    async def main():
        keys = {"key-of-a": "a", "key-of-b": "b"}
        server = ToolServer(lambda: [Notebook([])])
        app = server.http_app(name_of_key=lambda key: keys.get(key or ""))
        async with serving(app) as url, httpx2.AsyncClient(trust_env=False) as plain:
            for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "key-of-a"}):
                refused = await plain.post(url, json={}, headers=headers)
                assert refused.status_code == 401 and "one of the server's keys" in refused.text
            bearer = {"authorization": "Bearer key-of-a"}
            async with (
                httpx2.AsyncClient(headers=bearer, trust_env=False) as http,
                Client(streamable_http_client(url, http_client=http)) as client,
            ):
                assert await call(client, "python", code="a") == ("1: a", False)
            headers = {"accept": "application/json, text/event-stream", **bearer}
            info = {"protocolVersion": HANDSHAKE_PROTOCOL_VERSIONS[-1], "capabilities": {}}
            params = info | {"clientInfo": {"name": "t", "version": "0"}}
            opening = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
            opened = await plain.post(url, json=opening, headers=headers)
            headers["mcp-session-id"] = opened.headers["mcp-session-id"]
            listing = {"jsonrpc": "2.0", "id": 2, "method": "tools/list"}
            stolen = headers | {"authorization": "Bearer key-of-b"}
            assert (await plain.post(url, json=listing, headers=stolen)).status_code == 404
            assert (await plain.post(url, json=listing, headers=headers)).status_code == 200

    asyncio.run(main())


def test_a_page_of_another_site_cannot_ask_a_local_server():
    async def main():
        server = ToolServer(lambda: [Notebook([])])
        async with serving(server.http_app()) as url, httpx2.AsyncClient(trust_env=False) as client:
            for headers in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
                answer = await client.post(url, json={}, headers=headers)
                assert answer.status_code in (403, 421)

    asyncio.run(main())


def test_what_is_wrong_with_a_tool_is_said():
    def broken():
        raise ConfigError("the tool is not set up")

    async def main():
        async with Client(ToolServer(broken).lowlevel()) as client:
            with pytest.raises(MCPError, match="the tool is not set up"):
                await client.list_tools()

    asyncio.run(main())


def test_two_tools_of_one_name_are_refused():
    def browser_search(query: str): ...

    with pytest.raises(InputError, match=r"named 'browser_search': browser\.search and functions\.browser_search"):
        offers([Browser(), FunctionTools([browser_search])])


def test_every_call_is_logged(tmp_path):
    async def main():
        log = AuditLog(tmp_path / "audit.jsonl")
        server = ToolServer(lambda: [Notebook([]), Browser()], audit=log)
        async with Client(server.lowlevel()) as client:
            await call(client, "python", code="secret code")
            await call(client, "browser_search", query="x")
        lines = [json.loads(line) for line in log.path.read_text().splitlines()]
        assert [(line["tool"], line["response"], line["outcome"]) for line in lines] == [
            ("python", "mcp", "ok"),
            ("browser.search", "mcp", "ok"),
        ]
        assert "secret code" not in log.path.read_text()

    asyncio.run(main())


def test_a_call_that_cannot_be_logged_is_not_answered(tmp_path, monkeypatch):
    async def main():
        log = AuditLog(tmp_path / "audit.jsonl")

        def full(*_arguments, **_options):
            raise UnavailableError("audit.jsonl: the audit log cannot be written: No space left on device")

        monkeypatch.setattr(log, "record", full)
        async with Client(ToolServer(lambda: [Notebook([])], audit=log).lowlevel()) as client:
            text, is_error = await call(client, "python", code="1")
            assert is_error and "the audit log cannot be written" in text and "1: 1" not in text

    asyncio.run(main())


def test_ossias_client_uses_ossias_server():
    async def main():
        made = []
        async with serving(ToolServer(lambda: [Notebook(made)]).http_app()) as url:
            pool = McpPool()
            declared = configured("notes", McpServer(url=url, approval="never"))
            tool = await McpTool.open(declared, pool, owner="me", approvals=Approvals())
            assert (await tool.run("python", '{"code": "a"}')).text == "1: a"
            assert (await tool.run("python", '{"code": "b"}')).text == "2: b"
            await tool.close()
            assert not made[0].is_closed
            await pool.close()
            await until(lambda: made[0].is_closed)

    asyncio.run(main())


# The registry --------------------------------------------------------------------------------------------------------


@ossia.tool
def double(n: int) -> int:
    """Twice as much."""
    return 2 * n


def plain(text: str) -> str:
    return text[::-1]


@pytest.fixture
def module(monkeypatch):
    made = python_types.ModuleType("my_tools")
    made.double, made.plain, made.number = double, plain, 3
    monkeypatch.setitem(sys.modules, "my_tools", made)
    monkeypatch.setitem(sys.modules, "no_tools", python_types.ModuleType("no_tools"))


def test_tools_are_made_by_name(tmp_path, module):
    workshop = Workshop(Config(patch_folder=str(tmp_path)))
    tools = [workshop.make("apply_patch"), workshop.make("my_tools:plain"), workshop.make("my_tools:")]
    [space] = merged(tools)
    assert [one.name for one in space.tools] == ["apply_patch", "plain", "double"] and space.name == "functions"
    assert merged([Browser(), *tools])[0].name == "browser"
    assert find(tools, "functions.double") == (tools[2], "double")
    assert find([Notebook([]), *tools], "python")[1] == ""
    assert find(tools, "functions.nope") is None and find(tools, "double") is None
    asyncio.run(tools[0].close())
    with pytest.raises(InputError, match=r"two tools are named functions\.double"):
        merged([tools[2], workshop.make("my_tools:double")])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nope", "there is no tool 'nope'; expected one of: apply_patch"),
        ("apply_patch", "needs patch_folder"),
        ("browser", "needs browser: where it searches"),
        ("no_such_module:x", "cannot be imported"),
        (":x", "cannot be imported"),
        ("my_tools:nope", "has no function 'nope'"),
        ("my_tools:number", "has no function 'number'"),
        ("no_tools:", r"no function with @ossia\.tool"),
    ],
)
def test_a_tool_that_cannot_be_made_is_named(module, name, said):
    with pytest.raises(ConfigError, match=said):
        Workshop(Config()).make(name)


# The command ---------------------------------------------------------------------------------------------------------

ENVIRON = {"XDG_CONFIG_HOME": "/nonexistent", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def command(*arguments, **environ):
    return StdioServerParameters(
        command=sys.executable, args=["-m", "ossia", "mcp", *map(str, arguments)], env=ENVIRON | environ
    )


def test_the_command_serves_standard_input(tmp_path):
    (tmp_path / "work").mkdir()
    (tmp_path / "my_tools.py").write_text(
        'import ossia, sys\n\n@ossia.tool\ndef shout(text: str) -> str:\n    """Louder."""\n    return text.upper()\n\n'
        "@ossia.tool\nasync def leave() -> str:\n    sys.exit(3)\n"
    )
    path = os.pathsep.join([str(tmp_path), ENVIRON["PYTHONPATH"]])

    async def main():
        options = ["--patch-folder", tmp_path / "work", "--audit-log", tmp_path / "audit.jsonl"]
        server = command("--tools", "apply_patch,my_tools:shout,my_tools:leave", *options, PYTHONPATH=path)
        # A client waits for ever for a server that has ended.
        async with asyncio.timeout(60), Client(server) as client:
            assert [tool.name for tool in (await client.list_tools()).tools] == ["apply_patch", "shout", "leave"]
            assert await call(client, "leave") == ("Error: SystemExit: 3", True)
            assert await call(client, "shout", text="hey") == ("HEY", False)
            patch = "*** Begin Patch\n*** Add File: a.txt\n+hello\n*** End Patch"
            assert not (await call(client, "apply_patch", input=patch))[1]

    asyncio.run(main())
    assert (tmp_path / "work" / "a.txt").read_text() == "hello\n"
    assert len((tmp_path / "audit.jsonl").read_text().splitlines()) == 3


def test_the_command_serves_http_and_ends_when_it_is_told(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-m", "ossia", "mcp", "--http", "--port", "0", "--patch-folder", str(tmp_path)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRON,
    )
    try:
        line = process.stderr.readline()
        assert line.startswith("ossia: serving tools on http://127.0.0.1:"), line + process.stderr.read()
        url = line.split()[-1]

        async def main():
            async with Client(url) as client:
                assert [tool.name for tool in (await client.list_tools()).tools] == ["apply_patch"]

        asyncio.run(main())
        process.send_signal(signal.SIGINT)
        process.wait(30)
    finally:
        process.kill()
        process.wait()


PLOT = "import matplotlib.pyplot as plt; plt.plot([1, 2]); plt.show()"


def skip_without_sandbox():
    async def main():
        async with PythonSessions() as sessions:
            await sessions.check()

    try:
        asyncio.run(main())
    except UnavailableError as error:
        pytest.skip(f"no sandbox works on this machine: {error.message[:300]}")


@pytest.fixture
def docs(tmp_path):
    folder = write_docs(tmp_path / "docs")
    return ["--tools", "python,browser", "--browser-root", folder], {"XDG_DATA_HOME": str(tmp_path / "data")}


async def work_with_python_and_browser(client):
    """What a client does; the words that only this session may know."""
    tools = {tool.name: tool for tool in (await client.list_tools()).tools}
    assert list(tools) == ["python", "browser_search", "browser_open", "browser_find"]
    assert "stateful Jupyter notebook" in tools["python"].description
    assert "【{cursor}†L{line_start}" in client.instructions
    assert await call(client, "python", code="x = 6 * 7\nx") == ("42", False)
    assert (await call(client, "python", code="x + 1"))[0] == "43"
    text, is_error = await call(client, "python", code="open('/etc/shadow').read()")
    assert is_error and "Error" in text and "root:" not in text
    text, is_error = await call(client, "python", code="import socket; socket.socket()")
    assert is_error and "Error" in text
    shown = await client.call_tool("python", {"code": PLOT})
    assert [one.type for one in shown.content] == ["text", "image"] and shown.content[1].mime_type == "image/png"
    assert base64.b64decode(shown.content[1].data).startswith(b"\x89PNG")
    text, _ = await call(client, "browser_search", query="rivers")
    assert text.startswith("[0] rivers\n") and "Rivers†docs" in text
    assert "viewing lines" in (await call(client, "browser_open", id=0))[0]
    assert "L" in (await call(client, "browser_find", pattern="river number 7 "))[0]
    # What a page could have talked the client into.
    text, is_error = await call(client, "browser_open", id="https://example.com/?q=secret")
    assert is_error and "only links of search results" in text
    assert await call(client, "browser_open", cursor=9) == (
        "Cursor `9` is out of range. Available cursor indices: [0 - 2].",
        True,
    )


def test_python_and_browser_are_offered_over_standard_input(docs):
    skip_without_sandbox()
    options, environ = docs

    async def main():
        async with Client(command(*options, **environ)) as client:
            await work_with_python_and_browser(client)

    asyncio.run(main())


def test_python_and_browser_are_offered_over_http_and_each_session_has_its_own(docs):
    skip_without_sandbox()
    options, environ = docs
    process = subprocess.Popen(
        [sys.executable, "-m", "ossia", "mcp", "--http", "--port", "0", *map(str, options)],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | ENVIRON | environ,
    )
    try:
        lines = [process.stderr.readline() for _ in range(3)]
        assert lines[0].startswith("ossia: python (") and lines[1].startswith("ossia: browser (local:"), lines
        url = lines[2].split()[-1]

        async def main():
            async with Client(url) as first, Client(url) as second:
                await work_with_python_and_browser(first)
                text, is_error = await call(second, "python", code="x")
                assert is_error and "NameError" in text
                assert (await call(second, "browser_open"))[0] == "No pages to access!"
                await call(first, "python", code="import subprocess; p = subprocess.Popen(['sleep', '774.5'])")
                assert sleepers("774.5")
            # The session is over, and what ran for it.
            await until(lambda: not sleepers("774.5"))

        asyncio.run(main())
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tools", "browser"], "the tool browser needs browser: where it searches"),
        (["--tools", "python", "--python-sandbox", "off"], "the python tool is switched off"),
        (["--tools", "python", "--python-sandbox", "none"], "python_sandbox is 'none'; expected auto"),
        (["--tools", "python,my:python"], "the module 'my' cannot be imported"),
        (["--tools", "nope"], "there is no tool 'nope'"),
        (["--tools", " , "], "--tools names no tool"),
        ([], "needs patch_folder"),
        (["--patch-folder", "/no/such/folder"], "expected a folder"),
        (["--patch-folder", "/tmp", "--http", "--host", "0.0.0.0"], "lets others reach this server"),
        (["--patch-folder", "/tmp", "--audit-log", "/proc/audit"], "the audit log cannot be written"),
    ],
)
def test_the_command_says_at_once_what_is_wrong(arguments, said):
    done = subprocess.run(
        [sys.executable, "-m", "ossia", "mcp", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        stdin=subprocess.DEVNULL,
        env=os.environ | ENVIRON,
    )
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("ossia: ") and said in done.stderr and "Traceback" not in done.stderr
