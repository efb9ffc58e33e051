"""One connection to a server of the Model Context Protocol, over the protocol's own SDK.

Imported when the first connection is made: the SDK takes a second to import. Nothing of a server is trusted: what it
says is capped in size, where it may be reached is decided by a guard, and what it was sent as secret is taken out of
everything that it says back.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import logging
import os
import re
import ssl
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any, TextIO

import httpx2
import mcp_types as types
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.client.streamable_http import streamable_http_client
from mcp.shared.exceptions import MCPError

from ossia.config import McpServer
from ossia.errors import InputError, OssiaError, UnavailableError
from ossia.tools.mcp import CallResult, Guard, ListedTool

_log = logging.getLogger(__name__)
# At INFO it logs whole addresses, which may hold a key.
logging.getLogger("httpx2").setLevel(logging.WARNING)

CONNECT_TIMEOUT_S = 20.0
_CLOSE_TIMEOUT_S = 6.0
_MAX_RESPONSE_BYTES = 32 << 20
_MAX_TOOLS = 256
_MAX_PAGES = 50
_MAX_NAME_CHARS = 128
_MAX_DESCRIPTION_CHARS = 4_000
_MAX_INSTRUCTIONS_CHARS = 2_000
_MAX_SCHEMA_CHARS = 32_000
_MAX_ERROR_CHARS = 1_000
_MAX_LOG_CHARS = 2_000
# A secret shorter than this would be found everywhere.
_MIN_SECRET_CHARS = 6
_SECRET_NAME = re.compile(r"(?i)key|token|secret|passw|auth|cred|cookie|session")
# What the transport sets itself.
_RESERVED_HEADERS = frozenset(
    {
        "host",
        "content-length",
        "transfer-encoding",
        "connection",
        "upgrade",
        "accept",
        "content-type",
        "accept-encoding",
    }
)
_INFO = types.Implementation(name="ossia", version="0")


class Connection:
    """A connection that lives in a task of its own, so that any task may call, and be cancelled, without harm to it."""

    def __init__(self, name: str, server: McpServer, guard: Guard | None) -> None:
        """``guard`` decides where a url may lead; None trusts it."""
        self._name = name
        self._server = server
        self._guard = guard
        self._client: Client | None = None
        self._task: asyncio.Task[None] | None = None
        self._closing = asyncio.Event()
        self._secrets = _secrets(server)
        # Grows when the server says that its tools have changed.
        self.num_changes = 0

    @property
    def is_open(self) -> bool:
        return self._client is not None and not self._closing.is_set()

    async def open(self) -> None:
        """Raises UnavailableError, or InputError for an address that is not allowed."""
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._live(opened), name=f"mcp-{self._name}")
        try:
            await asyncio.shield(opened)
        except asyncio.CancelledError:
            await self.close()
            if opened.done() and not opened.cancelled():
                # Nobody is there any more to hear why.
                opened.exception()
            raise

    async def close(self) -> None:
        """End the connection, and the program that was started for it. More than once is harmless."""
        self._closing.set()
        if self._task is None:
            return
        done, _ = await asyncio.wait([self._task], timeout=_CLOSE_TIMEOUT_S)
        if not done:
            self._task.cancel()
            await asyncio.wait([self._task], timeout=_CLOSE_TIMEOUT_S)

    async def list_tools(self) -> tuple[list[ListedTool], str]:
        """The tools, and what the server says of itself. Raises UnavailableError."""
        client = self._connected()
        found: dict[str, ListedTool] = {}
        cursor: str | None = None
        try:
            async with asyncio.timeout(self._server.timeout_s):
                for _ in range(_MAX_PAGES):
                    page = await client.list_tools(cursor=cursor, cache_mode="refresh")
                    for tool in page.tools:
                        listed = self._listed(tool)
                        # The first of a name counts.
                        if listed is not None and len(found) < _MAX_TOOLS:
                            found.setdefault(listed.name, listed)
                    cursor = page.next_cursor
                    if cursor is None or len(found) >= _MAX_TOOLS:
                        break
        except TimeoutError:
            raise UnavailableError(
                f"the MCP server {self._name!r} did not list its tools within {self._server.timeout_s} s"
            ) from None
        # The SDK lets through whatever the transport, JSON or pydantic raise.
        except Exception as error:
            self._end_if_lost(error)
            raise UnavailableError(
                f"the MCP server {self._name!r} cannot list its tools: {self._reason(error)}"
            ) from None
        return list(found.values()), self._clean(client.instructions or "")[:_MAX_INSTRUCTIONS_CHARS]

    async def call(self, name: str, arguments: dict[str, Any]) -> CallResult:
        """Run a tool. What goes wrong is a result; cancelling tells the server."""
        try:
            client = self._connected()
            async with asyncio.timeout(self._server.timeout_s) as limit:
                result = await client.call_tool(name, arguments)
        except MCPError as error:
            self._end_if_lost(error)
            said = self._clean(error.message)[:_MAX_ERROR_CHARS]
            return CallResult(said, True, {"type": "mcp_protocol_error", "code": error.code, "message": said})
        except OssiaError as error:
            return CallResult(error.message, True, {"type": "http_error", "code": 503, "message": error.message})
        # The SDK lets through whatever the transport, JSON or pydantic raise.
        except Exception as error:
            if isinstance(error, TimeoutError) and limit.expired():
                said = f"the MCP server {self._name!r} gave no answer within {self._server.timeout_s} s"
            else:
                self._end_if_lost(error)
                said = f"the call of the MCP server {self._name!r} failed: {self._reason(error)}"
            return CallResult(said, True, {"type": "http_error", "code": _status(error), "message": said})
        text = self._clean(_as_text(result))
        if result.is_error:
            return CallResult(
                text, True, {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": text}]}
            )
        return CallResult(text, False, None)

    # -- the connection's task ---------------------------------------------------------------------

    async def _live(self, opened: asyncio.Future[None]) -> None:
        """Open, wait until it is to be closed, close: all in one task, as the SDK's task groups demand."""
        said = _Said()
        try:
            async with contextlib.AsyncExitStack() as stack:
                async with asyncio.timeout(CONNECT_TIMEOUT_S):
                    transport = await stack.enter_async_context(self._transport(said))
                    client = Client(_Opened(transport), client_info=_INFO, message_handler=self._on_message, cache=None)
                    self._client = await stack.enter_async_context(client)
                opened.set_result(None)
                await self._closing.wait()
        except BaseException as error:
            if not opened.done():
                opened.set_exception(self._refusal(error))
                if words := said.text():
                    _log.warning("mcp=%s stderr=%r", self._name, self._clean(words)[-_MAX_LOG_CHARS:])
            elif isinstance(error, asyncio.CancelledError):
                raise
            else:
                _log.info("mcp=%s closed=%r", self._name, type(error).__name__)
        finally:
            self._client = None
            said.close()
            if not opened.done():
                opened.cancel()

    @contextlib.asynccontextmanager
    async def _transport(self, said: _Said) -> AsyncIterator[Any]:
        server = self._server
        if server.command:
            parameters = StdioServerParameters(
                command=server.command,
                args=list(server.args),
                env=dict(server.env),
                cwd=server.folder or None,
                encoding_error_handler="replace",
            )
            async with stdio_client(parameters, errlog=said.file) as streams:
                yield streams
            return
        headers = {key: value for key, value in server.headers.items() if key.lower() not in _RESERVED_HEADERS}
        # Compressed answers could be a thousand times as long as what arrives.
        headers["Accept-Encoding"] = "identity"
        timeout = httpx2.Timeout(CONNECT_TIMEOUT_S, read=server.timeout_s + 5.0)
        async with (
            httpx2.AsyncClient(
                transport=_Transport(self._guard), headers=headers, timeout=timeout, trust_env=False
            ) as http,
            streamable_http_client(server.url, http_client=http) as streams,
        ):
            yield streams

    async def _on_message(self, message: Any) -> None:
        if isinstance(message, types.ToolListChangedNotification):
            self.num_changes += 1

    def _connected(self) -> Client:
        if self._client is None or not self.is_open:
            raise UnavailableError(f"the connection to the MCP server {self._name!r} has ended; try again")
        return self._client

    def _end_if_lost(self, error: BaseException) -> None:
        """Close, so that the next call connects anew, unless the error is an answer of a server that is there."""
        if not isinstance(error, MCPError) or error.code == types.CONNECTION_CLOSED or "Session" in error.message:
            self._closing.set()

    def _refusal(self, error: BaseException) -> OssiaError:
        for one in _leaves(error):
            if isinstance(one, OssiaError):
                return one
        if isinstance(error, TimeoutError):
            return UnavailableError(f"the MCP server {self._name!r} did not answer within {CONNECT_TIMEOUT_S:.0f} s")
        return UnavailableError(f"the MCP server {self._name!r} cannot be reached: {self._reason(error)}")

    # -- what a server says ------------------------------------------------------------------------

    def _listed(self, tool: types.Tool) -> ListedTool | None:
        schema = tool.input_schema if isinstance(tool.input_schema, dict) else {}
        try:
            size = len(json.dumps(schema))
        except (ValueError, RecursionError):
            return None
        if not tool.name or len(tool.name) > _MAX_NAME_CHARS or size > _MAX_SCHEMA_CHARS:
            return None
        hints = tool.annotations.model_dump(by_alias=True, exclude_none=True) if tool.annotations else None
        return ListedTool(
            tool.name,
            self._clean(tool.description or "")[:_MAX_DESCRIPTION_CHARS],
            schema,
            bool(tool.annotations and tool.annotations.read_only_hint),
            hints,
        )

    def _clean(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "[redacted]")
        return text

    def _reason(self, error: BaseException) -> str:
        """What may be said of an error: no address with a query, no header."""
        leaves = list(_leaves(error))
        first = leaves[0] if leaves else error
        if isinstance(first, MCPError):
            return self._clean(first.message)[:_MAX_ERROR_CHARS]
        if isinstance(first, httpx2.HTTPStatusError):
            return f"HTTP status {first.response.status_code}"
        if isinstance(first, OSError) and first.strerror:
            return first.strerror
        return type(first).__name__


class _Transport(httpx2.AsyncHTTPTransport):
    """HTTP to one host at an address that the guard allows: the address that it checked is the one connected to."""

    def __init__(self, guard: Guard | None, *, verify: ssl.SSLContext | bool = True) -> None:
        super().__init__(verify=verify, trust_env=False)
        self._guard = guard
        self._host: str | None = None

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        if self._guard is not None:
            port = url.port or (443 if url.scheme == "https" else 80)
            if url.scheme != "https" and "authorization" in request.headers:
                raise InputError("the MCP server's address has no https; credentials are sent only with it")
            # Open connections are known by their address: one to another host of that address must not be taken.
            self._host = self._host or url.host
            if url.host != self._host:
                raise InputError(f"the MCP server leads to another host, {url.host!r}, than it was asked at")
            address = await self._guard(url.host, port)
            # The host is still the one asked for, in its header and in the certificate; no name is looked up again.
            request.headers.setdefault("Host", url.netloc.decode("ascii"))
            request.extensions = {**request.extensions, "sni_hostname": url.host}
            request.url = url.copy_with(host=address)
        response = await super().handle_async_request(request)
        request.url = url
        if response.headers.get("content-encoding", "identity") != "identity":
            await response.aclose()
            raise UnavailableError("the MCP server sent a compressed answer, which was not asked for")
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Capped(response.stream)
        return response


class _Capped(httpx2.AsyncByteStream):
    """A body that ends in an error when it is too long."""

    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        num_bytes = 0
        async for chunk in self._stream:
            num_bytes += len(chunk)
            if num_bytes > _MAX_RESPONSE_BYTES:
                raise UnavailableError(f"the MCP server sent more than {_MAX_RESPONSE_BYTES:,} bytes in one answer")
            yield chunk

    async def aclose(self) -> None:
        await self._stream.aclose()


class _Opened:
    """Streams that are open already, as the context manager that the SDK's client enters."""

    def __init__(self, streams: Any) -> None:
        self._streams = streams

    async def __aenter__(self) -> Any:
        return self._streams

    async def __aexit__(self, *_: object) -> None:
        """Whoever opened them closes them."""


class _Said:
    """The last words that a started program wrote to its standard error."""

    def __init__(self) -> None:
        reading, writing = os.pipe()
        self.file: TextIO = os.fdopen(writing, "w")
        self._tail = b""
        threading.Thread(target=self._read, args=(reading,), daemon=True, name="mcp-stderr").start()

    def text(self) -> str:
        return self._tail.decode("utf-8", "replace").strip()

    def close(self) -> None:
        self.file.close()

    def _read(self, fd: int) -> None:
        with os.fdopen(fd, "rb", buffering=0) as file:
            while chunk := file.read(4096):
                self._tail = (self._tail + chunk)[-_MAX_LOG_CHARS:]


def _as_text(result: types.CallToolResult) -> str:
    """Everything of a result that can be read; of the rest, what it is."""
    parts = [_block_text(block) for block in result.content]
    if not parts and result.structured_content is not None:
        parts = [json.dumps(result.structured_content, ensure_ascii=False)]
    return "\n".join(part for part in parts if part) or "(the tool returned nothing)"


def _block_text(block: types.ContentBlock) -> str:
    if isinstance(block, types.TextContent):
        return block.text
    if isinstance(block, types.ImageContent | types.AudioContent):
        return f"[{block.type} of type {block.mime_type}, {_num_bytes(block.data):,} bytes, not shown]"
    if isinstance(block, types.ResourceLink):
        return f"[resource {block.name!r} at {block.uri}]"
    resource = block.resource
    if isinstance(resource, types.TextResourceContents):
        return resource.text
    return f"[resource {resource.uri} of type {resource.mime_type}, {_num_bytes(resource.blob):,} bytes, not shown]"


def _num_bytes(data: str) -> int:
    try:
        return len(base64.b64decode(data))
    except (binascii.Error, ValueError):
        return len(data)


def _secrets(server: McpServer) -> Sequence[str]:
    """Texts that nothing said about the server may hold."""
    values = [*server.headers.values(), *(value for key, value in server.env.items() if _SECRET_NAME.search(key))]
    # Of "Bearer abc" the second word is the secret.
    values += [word for value in server.headers.values() for word in value.split()]
    url = httpx2.URL(server.url) if server.url else None
    if url is not None:
        values += [url.password, *url.params.values()]
    return sorted({value for value in values if len(value) >= _MIN_SECRET_CHARS}, key=len, reverse=True)


def _status(error: BaseException) -> int:
    for one in _leaves(error):
        if isinstance(one, httpx2.HTTPStatusError):
            return one.response.status_code
    return 504 if isinstance(error, TimeoutError) else 502


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for one in error.exceptions for leaf in _leaves(one)]
    return [error]
