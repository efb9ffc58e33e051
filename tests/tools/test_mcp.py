from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import os
import socket
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from openai.types.responses import ResponseOutputItem
from openai.types.responses.response_output_item import McpApprovalRequest, McpCall, McpListTools
from pydantic import TypeAdapter
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse, RedirectResponse, StreamingResponse
from starlette.routing import Route
from tests.tools.mcp_servers import Scripted, tool
from tests.tools.web.addresses import NOT_PUBLIC, PUBLIC

from ossia.config import McpServer
from ossia.errors import InputError, NotFoundError, OssiaError, UnavailableError, UnsupportedError
from ossia.tools.mcp import Approvals, ListedTool, McpPool, McpTool, configured, public_address, read_declaration

SERVER = Path(__file__).with_name("mcp_servers.py")


def stdio(*arguments, **options):
    return McpServer(
        command=sys.executable, args=(str(SERVER), *map(str, arguments)), **{"approval": "never", **options}
    )


async def loopback(host, port):
    """A guard for tests: the name `there.test` is this machine."""
    if host not in ("there.test", "127.0.0.1"):
        raise InputError(f"the host {host!r} is not allowed")
    return "127.0.0.1"


@contextlib.asynccontextmanager
async def serving(app):
    """An ASGI application on a free port of this machine."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
    task = asyncio.create_task(server.serve(sockets=[listening]))
    while not server.started:
        await asyncio.sleep(0.005)
    try:
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await task


@contextlib.asynccontextmanager
async def http_tool(scripted, *, owner="me", pool=None, approvals=None, pinned=None, **fields):
    """A server over HTTP that a request has named, and its tools."""
    app = scripted.server().streamable_http_app(host="there.test")
    own_pool = pool or McpPool(guard=loopback)
    async with serving(app) as port:
        declared = read_declaration(
            {
                "type": "mcp",
                "server_label": "docs",
                "server_url": f"http://there.test:{port}/mcp",
                "require_approval": "never",
                **fields,
            },
            {},
        )
        opened = await McpTool.open(declared, own_pool, owner=owner, approvals=approvals or Approvals(), pinned=pinned)
        try:
            yield opened
        finally:
            await opened.close()
            await own_pool.close()


@contextlib.asynccontextmanager
async def stdio_tool(*arguments, owner="me", pool=None, **options):
    own_pool = pool or McpPool()
    opened = await McpTool.open(
        configured("files", stdio(*arguments, **options)), own_pool, owner=owner, approvals=Approvals()
    )
    try:
        yield opened
    finally:
        await opened.close()
        if pool is None:
            await own_pool.close()


# Calls ---------------------------------------------------------------------------------------------------------------


def test_a_local_server_of_the_settings_answers_and_ends_with_its_pool(tmp_path):
    async def main():
        async with stdio_tool(tmp_path / "note") as files:
            assert files.namespace.name == "files" and files.namespace.description == "Use it well."
            assert "echo" in [one.name for one in files.namespace.tools]
            assert (await files.run("echo", '{"text": "hi"}')).text == "echo: hi"
            return int((tmp_path / "note.pid").read_text())

    pid = asyncio.run(main())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_server_that_a_request_names_answers_over_http():
    async def main():
        scripted = Scripted()
        async with http_tool(scripted, server_description="Our documents.") as docs:
            assert docs.namespace.name == "docs" and docs.namespace.description == "Our documents."
            output = await docs.run("echo", '{"text": "hi"}')
            assert output == ("echo: hi", False, {"server_label": "docs", "name": "echo", "error": None})
            assert (await docs.run("echo", "")).text == "echo: "

    asyncio.run(main())


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("nothing", "{}", "(the tool returned nothing)"),
        ("structured", "{}", '{"a": [1]}'),
        (
            "kinds",
            "{}",
            "words\n[image of type image/png, 3 bytes, not shown]\n[resource 'doc' at file:///doc]\ninner\n"
            "[resource a:c of type application/x, 3 bytes, not shown]",
        ),
        ("fail", "{}", "Error: it went wrong"),
        ("echo", "[]", "Error: expected an object of at most 1,000,000 characters"),
        ("echo", "{", "Error: the arguments are not JSON; expected an object"),
        ("absent", "{}", "Error: there is no tool 'absent'; expected one of "),
    ],
)
def test_every_result_becomes_text(name, arguments, text):
    async def main():
        scripted = Scripted()
        scripted.tools += [tool("nothing"), tool("structured")]
        async with http_tool(scripted) as docs:
            output = await docs.run(name, arguments)
            assert output.text.startswith(text)
            assert output.is_error == text.startswith("Error")
            call = {"id": "1", "type": "mcp_call", "arguments": arguments, "output": output.text, "status": "completed"}
            details = {key: output.details[key] for key in ("server_label", "name", "error")}
            assert McpCall.model_validate(call | details).error is not None or not output.is_error

    asyncio.run(main())


def test_the_words_of_a_crash_stay_with_the_server():
    async def main():
        scripted = Scripted()
        scripted.tools.append(tool("crash"))
        async with http_tool(scripted) as docs:
            output = await docs.run("crash", "{}")
            assert output.is_error and output.details["error"]["type"] == "mcp_protocol_error"
            assert "inner words" not in output.text
            assert not (await docs.run("echo", "{}")).is_error

    asyncio.run(main())


def test_a_long_result_is_shortened():
    async def main():
        scripted = Scripted()
        scripted.tools.append(tool("large"))
        async with http_tool(scripted) as docs:
            output = await docs.run("large", '{"n": 500000}')
            assert len(output.text) < 101_000 and "400,000 characters left out" in output.text

    asyncio.run(main())


def test_a_call_that_takes_too_long_is_given_up_and_the_server_told(tmp_path):
    async def main():
        note = tmp_path / "note"
        async with stdio_tool(note, timeout_s=1) as files:
            output = await files.run("wait", "{}")
            assert output.is_error and "gave no answer within 1 s" in output.text
            await _until(note.exists)
            assert (await files.run("echo", "{}")).text == "echo: "

    asyncio.run(main())


@pytest.mark.parametrize("how", ["stdio", "http"])
def test_cancelling_a_call_reaches_the_server(tmp_path, how):
    async def main():
        note, scripted = tmp_path / "note", Scripted(tmp_path / "note")
        opening = stdio_tool(note) if how == "stdio" else http_tool(scripted)
        async with opening as opened:
            task = asyncio.create_task(opened.run("wait", "{}"))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await _until(note.exists)
            assert (await opened.run("echo", '{"text": "on"}')).text == "echo: on"

    asyncio.run(main())


def test_a_server_that_dies_is_started_anew_for_the_next_call(tmp_path):
    async def main():
        async with stdio_tool(tmp_path / "note") as files:
            first = (tmp_path / "note.pid").read_text()
            assert (await files.run("exit", "{}")).is_error
            assert (await files.run("echo", '{"text": "again"}')).text == "echo: again"
            assert (tmp_path / "note.pid").read_text() != first

    asyncio.run(main())


def test_a_server_that_forgets_its_session_is_asked_for_another():
    async def main():
        scripted = Scripted()
        apps = [scripted.server().streamable_http_app(host="there.test") for _ in range(2)]

        async def switching(scope, receive, send):
            await apps[0](scope, receive, send)

        async with contextlib.AsyncExitStack() as stack:
            for one in apps:
                await stack.enter_async_context(one.router.lifespan_context(one))
            port = await stack.enter_async_context(serving(_without_lifespan(switching)))
            pool = McpPool(guard=loopback)
            declared = read_declaration(
                {
                    "type": "mcp",
                    "server_label": "docs",
                    "server_url": f"http://127.0.0.1:{port}/mcp",
                    "require_approval": "never",
                },
                {},
            )
            docs = await McpTool.open(declared, pool, owner="me", approvals=Approvals())
            assert (await docs.run("echo", '{"text": "1"}')).text == "echo: 1"
            apps.reverse()
            await docs.run("echo", '{"text": "2"}')
            assert (await docs.run("echo", '{"text": "3"}')).text == "echo: 3"
            await docs.close()
            await pool.close()

    asyncio.run(main())


def test_a_server_that_cannot_be_started_or_reached_is_named(caplog):
    async def main():
        pool = McpPool(guard=loopback)
        closed = socket.create_server(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        closed.close()
        cases = {
            "No such file": configured("files", McpServer(command="/no/such/program")),
            "cannot be reached": configured("files", McpServer(url=f"http://127.0.0.1:{port}/mcp")),
            "the MCP server 'files'": configured("files", stdio("--crash", env={"API_KEY": "hunter22"})),
        }
        for said, declared in cases.items():
            with pytest.raises(UnavailableError, match=said):
                await McpTool.open(declared, pool, owner="me", approvals=Approvals())
        assert pool.num_connections == 0
        await pool.close()

    with caplog.at_level(logging.INFO):
        asyncio.run(main())
    # The last words of a program that does not start are for whoever runs ossia, without its secrets.
    assert "it is broken" in caplog.text and "hunter22" not in caplog.text


# The list of tools ---------------------------------------------------------------------------------------------------


def test_all_pages_are_listed_and_the_item_is_the_apis():
    async def main():
        scripted = Scripted()
        scripted.page_size = 2
        async with http_tool(scripted) as docs:
            assert [one.name for one in docs.namespace.tools] == [one.name for one in scripted.tools]
            item = docs.list_item()
            assert isinstance(TypeAdapter(ResponseOutputItem).validate_python(item), McpListTools)
            assert item["tools"][0]["annotations"] == {"readOnlyHint": True}

    asyncio.run(main())


@pytest.mark.parametrize(
    ("allowed", "names"),
    [
        (None, ["echo", "write", "count", "wait", "fail", "kinds", "environment"]),
        (["write", "echo", "absent"], ["echo", "write"]),
        ({"tool_names": ["write"]}, ["write"]),
        ({"read_only": True}, ["echo"]),
        ({"read_only": False, "tool_names": ["echo", "write"]}, ["write"]),
        ([], []),
    ],
)
def test_only_allowed_tools_are_there(allowed, names):
    async def main():
        scripted = Scripted()
        async with http_tool(scripted, allowed_tools=allowed) as docs:
            assert [one.name for one in docs.namespace.tools] == names
            if "count" not in names:
                assert (await docs.run("count", "{}")).is_error and not scripted.calls

    asyncio.run(main())


def test_the_settings_and_the_request_both_have_to_allow_a_tool():
    server = stdio(tools=("echo", "write"))
    declared = read_declaration({"server_label": "files", "allowed_tools": ["write", "count"]}, {"files": server})
    assert declared.allowed.names == {"write"}


def test_what_a_server_says_of_its_tools_is_capped():
    async def main():
        scripted = Scripted()
        scripted.tools = [
            tool("long", "d" * 100_000),
            tool("wide", properties={f"p{i}": {"type": "string", "description": "x" * 100} for i in range(1_000)}),
            tool("n" * 300),
            *(tool(f"t{i}") for i in range(400)),
        ]
        async with http_tool(scripted) as docs:
            tools = docs.namespace.tools
            assert len(tools) == 256 and len(tools[0].description) == 4_000
            assert "wide" not in [one.name for one in tools] and max(len(one.name) for one in tools) < 100

    asyncio.run(main())


def test_names_never_collide():
    async def main():
        scripted = Scripted()
        scripted.tools = [tool("a.b"), tool("a_b"), tool("a b"), tool("<|end|>"), tool("a.b", "Another of that name.")]
        async with http_tool(scripted) as docs:
            names = [one.name for one in docs.namespace.tools]
            assert names == ["a_b", "a_b_2", "a_b_3", "__end__"]
            for name, real in zip(names, ["a.b", "a_b", "a b", "<|end|>"], strict=True):
                assert (await docs.run(name, "{}")).text == f"{real}: "

    asyncio.run(main())


@pytest.mark.parametrize("label", ["functions", "browser", "python", "assistant", "a.b", "", "x" * 65, None, "<|end|>"])
def test_a_label_that_is_no_namespace_of_its_own_is_refused(label):
    with pytest.raises(InputError, match="server_label"):
        read_declaration({"server_label": label, "server_url": "https://example.com/mcp"}, {})


# Approvals -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("required", "asked"),
    [
        (None, ["echo", "write"]),
        ("always", ["echo", "write"]),
        ("never", []),
        ({"never": {"tool_names": ["echo"]}}, ["write"]),
        ({"never": {"read_only": True}}, ["write"]),
        ({"always": {"tool_names": ["write"]}}, ["echo", "write"]),
        ({"always": {"tool_names": ["write"]}, "never": {}}, ["write"]),
        ({"always": {"read_only": True}, "never": {"tool_names": ["echo", "write"]}}, ["echo"]),
    ],
    ids=str,
)
def test_a_person_is_asked_unless_the_request_says_otherwise(required, asked):
    async def main():
        scripted = Scripted()
        async with http_tool(scripted, require_approval=required) as docs:
            assert [name for name in ("echo", "write") if docs.is_approval_needed(name)] == asked
            for name in asked:
                output = await docs.run(name, "{}")
                assert output.is_error and output.details["approval_required"]
            assert not scripted.calls

    asyncio.run(main())


def test_a_request_may_ask_for_more_approval_than_the_settings_and_not_for_less():
    server = {"files": stdio(approval="always"), "free": stdio(approval="never")}
    listed = ListedTool("echo", "", {})

    def needed(label, **fields):
        return read_declaration({"server_label": label, **fields}, server).is_approval_needed(listed)

    assert needed("files") and needed("files", require_approval="never")
    assert not needed("free") and needed("free", require_approval="always")


def test_an_approved_call_runs_once_and_only_as_it_was_shown():
    async def main():
        scripted = Scripted()
        approvals = Approvals(b"k" * 32)
        async with http_tool(scripted, require_approval="always", approvals=approvals) as docs:
            item = docs.approval_request("write", '{"text": "all"}')
            assert isinstance(TypeAdapter(ResponseOutputItem).validate_python(item), McpApprovalRequest)
            forged = [
                {**item, "arguments": '{"text": "more"}'},
                {**item, "arguments": '{"text":"all"}'},
                {**item, "name": "echo"},
                {**item, "server_label": "other"},
                {**item, "id": item["id"][:-1] + ("0" if item["id"][-1] != "0" else "1")},
                {**item, "id": "mcpr_" + "0" * 88},
                {**item, "id": None},
                {**item, "name": "absent"},
                Approvals(b"x" * 32).request("docs", docs.declaration.identity, docs._tools["write"], "{}"),
            ]
            for one in forged:
                assert (await docs.run_approved(one)).is_error
            assert not scripted.calls
            assert (await docs.run_approved(item)).text == "write: all"
            again = await docs.run_approved(item)
            assert again.is_error and "used already" in again.text
            assert scripted.calls == [("write", {"text": "all"})]

    asyncio.run(main())


def test_an_approval_outlives_a_restart_and_not_another_server():
    async def main():
        item = {}
        async with http_tool(Scripted(), require_approval="always", approvals=Approvals(b"k" * 32)) as docs:
            item = docs.approval_request("write", "{}")
            # The same server asked by a process that has started since.
            docs._approvals = Approvals(b"k" * 32)
            assert not (await docs.run_approved(item)).is_error
        scripted = Scripted()
        async with http_tool(scripted, require_approval="always", approvals=Approvals(b"k" * 32)) as other:
            # Another address under the same label.
            assert (await other.run_approved(item)).is_error and not scripted.calls

    asyncio.run(main())


def test_a_tool_that_changes_under_way_is_not_called(monkeypatch):
    monkeypatch.setattr("ossia.tools.mcp._RELIST_S", 0.0)

    async def main():
        scripted = Scripted()
        async with http_tool(scripted) as docs:
            assert not (await docs.run("write", "{}")).is_error
            item = docs.approval_request("write", "{}")
            scripted.tools[1] = tool("write", "Send it to everybody.")
            for output in (await docs.run("write", "{}"), await docs.run_approved(item)):
                assert output.is_error and output.details["approval_required"]
                assert "has changed 'write' since it was listed" in output.text
            del scripted.tools[1]
            assert "does not offer 'write' any more" in (await docs.run("write", "{}")).text
            assert (await docs.run("echo", "{}")).text == "echo: "
            assert len(scripted.calls) == 2

    asyncio.run(main())


def test_a_list_that_has_changed_since_the_conversation_saw_it_is_asked_for_again():
    async def main():
        scripted = Scripted()
        async with http_tool(scripted) as docs:
            pinned = docs.list_hash
            assert not docs.has_changed
        async with http_tool(scripted, pinned=pinned) as docs:
            assert not docs.has_changed and not (await docs.run("echo", "{}")).is_error
        scripted.tools.append(tool("new"))
        async with http_tool(scripted, pinned=pinned) as docs:
            assert docs.has_changed and docs.is_approval_needed("echo")
            assert (await docs.run("echo", "{}")).details["approval_required"]
            assert (await docs.run_approved(docs.approval_request("echo", "{}"))).text == "echo: "

    asyncio.run(main())


# Secrets and addresses -----------------------------------------------------------------------------------------------


def test_a_local_server_gets_no_environment_but_its_own(monkeypatch):
    monkeypatch.setenv("OSSIA_SECRET", "hunter22")
    monkeypatch.setenv("TOKEN_OF_MINE", "t0ken-of-mine")

    async def main():
        async with stdio_tool(env={"KEY": "${TOKEN_OF_MINE}", "PLAIN": "value"}) as files:
            output = await files.run("environment", "{}")
            seen = json.loads(output.text)
            assert seen["PLAIN"] == "value" and "OSSIA_SECRET" not in seen and "TOKEN_OF_MINE" not in seen
            # It has its key, and cannot tell the model.
            assert seen["KEY"] == "[redacted]" and "t0ken-of-mine" not in output.text

    asyncio.run(main())


def test_credentials_reach_the_server_and_come_back_nowhere(caplog):
    secret = "s3cr3t-t0ken"

    async def main():
        scripted = Scripted()
        scripted.tools.append(tool("headers", f"Knows {secret}."))
        app = scripted.server().streamable_http_app(host="there.test")
        async with serving(app) as port:
            pool = McpPool()
            server = McpServer(
                url=f"http://127.0.0.1:{port}/mcp?key=qu3ry-secret",
                headers={"Authorization": f"Bearer {secret}"},
                approval="never",
            )
            declared = configured("docs", server)
            docs = await McpTool.open(declared, pool, owner="me", approvals=Approvals())
            output = await docs.run("headers", "{}")
            seen = json.loads(output.text)
            assert seen["authorization"] == "[redacted]" or seen["authorization"] == "Bearer [redacted]"
            shown = [output.text, repr(declared), repr(docs.list_item()), repr(docs.namespace), repr(output.details)]
            assert not any(secret in text or "qu3ry-secret" in text for text in shown)
            await docs.close()
            await pool.close()
        with pytest.raises(UnavailableError) as raised:
            await McpTool.open(declared, McpPool(), owner="me", approvals=Approvals())
        assert "qu3ry-secret" not in raised.value.message and secret not in raised.value.message

    with caplog.at_level(logging.DEBUG, logger="ossia"), caplog.at_level(logging.INFO):
        asyncio.run(main())
    assert secret not in caplog.text and "qu3ry-secret" not in caplog.text


@pytest.mark.parametrize(
    "host",
    [
        *NOT_PUBLIC, "localhost", "localhost.", "127.1", "0x7f000001", "2130706433", "0177.0.0.1", "127。0。0。1",
        "１２７.0.0.1", "no-such-host.invalid", "", "a" * 300, "\x00", "[::1]",
    ],
)  # fmt: skip
def test_an_address_that_is_not_public_is_refused(host):
    with pytest.raises(InputError):
        asyncio.run(public_address(host, 443))


@pytest.mark.parametrize("address", PUBLIC)
def test_a_public_address_is_allowed(address):
    assert asyncio.run(public_address(address, 443)) == address


def test_this_machine_under_its_public_address_is_refused(monkeypatch):
    monkeypatch.setattr("ossia.tools.web.guard.is_public", lambda address: True)
    with pytest.raises(InputError, match=r"leads to the address 127\.0\.0\.1, which is this machine's"):
        asyncio.run(public_address("127.0.0.1", 443))


def test_one_private_address_of_several_is_enough_to_refuse(monkeypatch):
    async def main():
        loop = asyncio.get_running_loop()

        async def both(host, port, **_options):
            return [(2, 1, 6, "", ("1.1.1.1", port)), (2, 1, 6, "", ("10.0.0.1", port))]

        monkeypatch.setattr(loop, "getaddrinfo", both)
        with pytest.raises(InputError, match=r"leads to the address 10\.0\.0\.1, which is not a public one"):
            await public_address("two.example", 443)

    asyncio.run(main())


def test_an_address_of_a_request_is_checked_before_anything_is_sent():
    async def main():
        scripted = Scripted()
        async with serving(scripted.server().streamable_http_app(host="there.test")) as port:
            pool = McpPool()
            for url in (f"http://127.0.0.1:{port}/mcp", f"http://localhost:{port}/mcp", f"http://[::1]:{port}/mcp"):
                declared = read_declaration({"server_label": "docs", "server_url": url}, {})
                with pytest.raises(InputError, match="not a public one"):
                    await McpTool.open(declared, pool, owner="me", approvals=Approvals())
            await pool.close()
        assert scripted.num_lists == 0

    asyncio.run(main())


def test_the_address_that_was_checked_is_the_one_connected_to():
    """A name that means another place at the second look-up is looked up once for each connection, by the guard."""
    asked = []

    async def guard(host, port):
        asked.append((host, port))
        return "127.0.0.1"

    async def main():
        scripted = Scripted()
        scripted.tools.append(tool("headers"))
        async with http_tool(scripted, pool=McpPool(guard=guard)) as docs:
            seen = json.loads((await docs.run("headers", "{}")).text)
            port = docs.declaration.server.url.split(":")[2].split("/")[0]
            assert seen["host"] == f"there.test:{port}"
            assert seen["accept-encoding"] == "identity"
            assert set(asked) == {("there.test", int(port))}

    asyncio.run(main())


def test_a_certificate_is_that_of_the_name_and_not_of_the_address(tmp_path):
    from ossia.tools.mcp_transport import _Transport

    certificate, key = _self_signed("there.test", tmp_path)
    trusting = ssl.create_default_context(cafile=certificate)

    async def main():
        listening = socket.create_server(("127.0.0.1", 0))
        app = Starlette(routes=[Route("/", lambda request: PlainTextResponse(request.headers["host"]))])
        config = uvicorn.Config(app, log_level="critical", ssl_certfile=str(certificate), ssl_keyfile=str(key))
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve(sockets=[listening]))
        port = listening.getsockname()[1]
        async with httpx2.AsyncClient(transport=_Transport(_anywhere, verify=trusting), trust_env=False) as client:
            assert (await client.get(f"https://there.test:{port}/")).text == f"there.test:{port}"
            with pytest.raises(InputError, match="leads to another host"):
                await client.get(f"https://other.test:{port}/")
        async with httpx2.AsyncClient(transport=_Transport(_anywhere, verify=trusting), trust_env=False) as client:
            with pytest.raises(httpx2.ConnectError, match=r"[Hh]ostname mismatch"):
                await client.get(f"https://other.test:{port}/")
        server.should_exit = True
        await task

    asyncio.run(main())


async def _anywhere(_host, _port):
    return "127.0.0.1"


def _self_signed(name, folder):
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now, day = datetime.datetime.now(datetime.UTC), datetime.timedelta(days=1)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), 1, now - day, now + day)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    encoding, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    (folder / "cert").write_bytes(certificate.public_bytes(encoding))
    (folder / "key").write_bytes(key.private_bytes(encoding, private, serialization.NoEncryption()))
    return folder / "cert", folder / "key"


def test_a_redirect_to_another_place_is_not_followed():
    reached = []

    async def main():
        async def elsewhere(request):
            reached.append(request.url)
            return PlainTextResponse("no")

        async with serving(Starlette(routes=[Route("/mcp", elsewhere, methods=["GET", "POST"])])) as private:
            to = f"http://127.0.0.1:{private}/mcp"
            moved = Route("/mcp", lambda request: RedirectResponse(to, 307), methods=["GET", "POST"])
            async with serving(Starlette(routes=[moved])) as port:
                declared = read_declaration({"server_label": "d", "server_url": f"http://there.test:{port}/mcp"}, {})
                with pytest.raises(UnavailableError):
                    await McpTool.open(declared, McpPool(guard=loopback), owner="me", approvals=Approvals())
        assert not reached

    asyncio.run(main())


def test_credentials_are_not_sent_without_https():
    declared = read_declaration(
        {"server_label": "d", "server_url": "http://there.test:1/mcp", "authorization": "abcdefgh"}, {}
    )
    with pytest.raises(InputError, match="has no https"):
        asyncio.run(McpTool.open(declared, McpPool(guard=loopback), owner="me", approvals=Approvals()))


@pytest.mark.parametrize("kind", ["endless", "compressed", "html", "error", "hangs"])
def test_a_hostile_server_is_an_error_in_time(kind, monkeypatch):
    monkeypatch.setattr("ossia.tools.mcp_transport.CONNECT_TIMEOUT_S", 1.0)
    monkeypatch.setattr("ossia.tools.mcp_transport._MAX_RESPONSE_BYTES", 1 << 20)

    async def answer(request):
        async def endless():
            while not await request.is_disconnected():
                yield b" " * 65536
                await asyncio.sleep(0)

        if kind == "endless":
            return StreamingResponse(endless(), media_type="application/json")
        if kind == "compressed":
            return PlainTextResponse(b"\x1f\x8b", headers={"content-encoding": "gzip"}, media_type="application/json")
        if kind == "hangs":
            while not await request.is_disconnected():
                await asyncio.sleep(0.01)
        return PlainTextResponse("<html>", status_code=500 if kind == "error" else 200, media_type="text/html")

    async def main():
        async with serving(Starlette(routes=[Route("/mcp", answer, methods=["GET", "POST", "DELETE"])])) as port:
            declared = read_declaration({"server_label": "d", "server_url": f"http://there.test:{port}/mcp"}, {})
            with pytest.raises(OssiaError, match="MCP server"):
                await asyncio.wait_for(
                    McpTool.open(declared, McpPool(guard=loopback), owner="me", approvals=Approvals()), 20
                )

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({}, NotFoundError, "no server is named 'docs' here; the settings name files"),
        ({"server_url": "ftp://x"}, InputError, "expected an address with https"),
        ({"server_url": "file:///etc/passwd"}, InputError, "expected an address with https"),
        ({"server_url": 3}, InputError, "expected an address with https"),
        ({"server_url": "https://user:pw@example.com/"}, InputError, "user or password"),
        ({"connector_id": "connector_gmail"}, UnsupportedError, "connector_id"),
        ({"tunnel_id": "t"}, UnsupportedError, "tunnel_id"),
        ({"server_label": "files", "authorization": "x"}, InputError, "has its own credentials"),
        ({"server_url": "https://x", "headers": {"a b": "x"}}, InputError, "expected names of headers"),
        ({"server_url": "https://x", "headers": {"a": "x\r\ny"}}, InputError, "expected printable ASCII"),
        ({"server_url": "https://x", "headers": {"a": 1}}, InputError, "expected names of headers with texts"),
        ({"server_url": "https://x", "headers": ["a"]}, InputError, "an object of at most 32"),
        ({"server_url": "https://x", "authorization": "a b"}, InputError, "expected an access token"),
        ({"server_url": "https://x", "authorization": "a", "headers": {"authorization": "b"}}, InputError, "twice"),
        ({"server_url": "https://x", "require_approval": "maybe"}, InputError, "expected 'always', 'never'"),
        ({"server_url": "https://x", "require_approval": {"sometimes": {}}}, InputError, "expected 'always'"),
        ({"server_url": "https://x", "require_approval": {"never": ["a"]}}, InputError, "tool_names or read_only"),
        ({"server_url": "https://x", "allowed_tools": "all"}, InputError, "tool_names or read_only"),
        ({"server_url": "https://x", "allowed_tools": [1]}, InputError, "a list of names"),
        ({"server_url": "https://x", "allowed_tools": {"read_only": "yes"}}, InputError, "true or false"),
        ({"server_url": "https://x", "server_description": 3}, InputError, "server_description; expected a text"),
    ],
    ids=str,
)
def test_a_declaration_that_cannot_be_is_refused(fields, error, said):
    with pytest.raises(error, match=said):
        read_declaration({"type": "mcp", "server_label": "docs", **fields}, {"files": stdio()})


def test_a_request_cannot_start_a_program():
    declared = read_declaration(
        {"server_label": "docs", "server_url": "https://example.com", "command": "/bin/sh", "args": ["-c", "x"]}, {}
    )
    assert declared.server == McpServer(url="https://example.com") and not declared.is_configured


# The pool ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_connection_is_kept_for_its_owner_alone():
    async def main():
        pool = McpPool()
        counts = []
        for owner in ("a", "a", "b", "a"):
            async with stdio_tool(owner=owner, pool=pool) as files:
                counts.append((await files.run("count", "{}")).text)
        assert counts == ["1", "2", "1", "3"] and pool.num_connections == 2
        await pool.close()
        assert pool.num_connections == 0
        with pytest.raises(UnavailableError, match="are being closed"):
            async with stdio_tool(pool=pool):
                pass

    asyncio.run(main())


def test_idle_connections_are_closed(tmp_path):
    async def main():
        pool = McpPool(idle_s=0.05)
        async with stdio_tool(tmp_path / "note", pool=pool) as files:
            await asyncio.sleep(0.3)
            assert (await files.run("echo", "{}")).text == "echo: " and pool.num_connections == 1
            pid = int((tmp_path / "note.pid").read_text())
        await _until(lambda: pool.num_connections == 0 and not Path(f"/proc/{pid}").exists())
        await pool.close()

    asyncio.run(main())


def test_a_connection_that_is_taken_while_another_idle_one_is_closed_stays_open(monkeypatch):
    class Slow:
        is_open, num_closing = True, 0

        async def open(self):
            """At once."""

        async def close(self):
            Slow.num_closing += 1
            await asyncio.sleep(0.3)
            self.is_open = False

    async def main():
        monkeypatch.setattr("ossia.tools.mcp._connection", lambda *_arguments: Slow())
        pool = McpPool(idle_s=0.2)
        first, second = (configured(name, McpServer(command=name)) for name in ("first", "second"))
        taken = [await pool.take(one, "me") for one in (first, second)]
        for one in taken:
            pool.give_back(one)
        await _until(lambda: Slow.num_closing == 1)
        assert await pool.take(second, "me") is taken[1]
        await _until(lambda: not taken[0].is_open)
        await asyncio.sleep(0.1)
        assert taken[1].is_open and Slow.num_closing == 1
        await pool.close()

    asyncio.run(main())


def test_a_full_pool_gives_up_the_longest_idle_connection_or_refuses():
    async def main():
        pool = McpPool(max_connections=2, guard=loopback)
        async with serving(Scripted().server().streamable_http_app(host="there.test")) as port:
            declared = configured("docs", McpServer(url=f"http://127.0.0.1:{port}/mcp", approval="never"))

            async def opened(owner):
                return await McpTool.open(declared, pool, owner=owner, approvals=Approvals())

            a, b, again = await opened("a"), await opened("b"), await opened("a")
            assert pool.num_connections == 2
            with pytest.raises(UnavailableError, match="all 2 connections to MCP servers are in use"):
                await opened("c")
            await a.close()
            with pytest.raises(UnavailableError, match="in use"):
                await opened("c")
            await again.close()
            c = await opened("c")
            assert pool.num_connections == 2
            assert (await b.run("echo", "{}")).text == (await c.run("echo", "{}")).text == "echo: "
            for tool_ in (a, b, c):
                await tool_.close()
            await pool.close()

    asyncio.run(main())


def test_connections_that_are_still_opening_count_in_a_pool():
    async def main():
        pool = McpPool(max_connections=2, guard=loopback)
        async with serving(Scripted().server().streamable_http_app(host="there.test")) as port:
            declared = configured("docs", McpServer(url=f"http://127.0.0.1:{port}/mcp", approval="never"))
            taken = [pool.take(declared, owner) for owner in "abcde"]
            found = await asyncio.gather(*taken, return_exceptions=True)
            assert sum(isinstance(one, UnavailableError) for one in found) == 3
            assert pool.num_connections == 2
            await pool.close()

    asyncio.run(main())


def test_calls_at_the_same_time_share_a_connection():
    async def main():
        scripted = Scripted()
        async with http_tool(scripted) as docs:
            began = time.monotonic()
            texts = [f'{{"text": "{i}"}}' for i in range(20)]
            outputs = await asyncio.gather(*(docs.run("echo", text) for text in texts))
            assert [output.text for output in outputs] == [f"echo: {i}" for i in range(20)]
            assert time.monotonic() > began and docs._pool.num_connections == 1

    asyncio.run(main())


def test_the_sdk_is_imported_only_when_a_server_is_reached():
    program = (
        "import sys, ossia.tools.mcp, ossia.tools.mcp_server, ossia.tools.registry\nassert 'mcp' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_without_the_sdk_it_is_said_what_to_install():
    program = """
import asyncio, sys
sys.modules["mcp_types"] = None
from ossia.config import McpServer
from ossia.errors import UnavailableError
from ossia.tools.mcp import *
try:
    asyncio.run(McpTool.open(configured("a", McpServer(command="x")), McpPool(), owner="", approvals=Approvals()))
except UnavailableError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "pip install 'ossia[mcp]'" in done.stdout, done.stderr


def _without_lifespan(app):
    async def only_http(scope, receive, send):
        if scope["type"] == "http":
            await app(scope, receive, send)

    return only_http


async def _until(condition, within_s=15.0):
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        await asyncio.sleep(0.02)
