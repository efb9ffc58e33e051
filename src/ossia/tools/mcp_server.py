"""Tools of ossia offered to others over the Model Context Protocol, by standard input and output or by HTTP.

    server = ToolServer(lambda: [workshop.make("python"), workshop.make("browser")])
    await server.run_stdio()            or
    uvicorn.run(server.http_app(), ...)

Each session of a client has tools of its own, made when it first asks and closed when it ends: pages, variables and
files of one are never another's. A session of HTTP ends when the client says so or has been silent for ``idle_s``; one
of standard input ends with it. Because tools have a state, HTTP is served in the versions of the protocol that have
sessions; newer clients fall back to these by themselves.

A picture of python's output is an image of the answer.

Names       a function of the namespace `functions` keeps its name, those of others are `browser_search`; a namespace
            that is called itself, as python is, is one tool with its text as argument
Source      https://modelcontextprotocol.io/specification
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple

from ossia.errors import InputError, OssiaError, UnavailableError
from ossia.tools.audit import AuditLog, run_logged
from ossia.tools.base import Tool, ToolOutput

if TYPE_CHECKING:
    from mcp.server import Server
    from starlette.types import ASGIApp, Receive, Scope, Send

_log = logging.getLogger(__name__)

DEFAULT_IDLE_S = 1800.0
DEFAULT_MAX_SESSIONS = 64
PATH = "/mcp"
# What a text that is no JSON is called as an argument.
_TEXT_ARGUMENTS = {"python": "code"}


class Offer(NamedTuple):
    """One tool as MCP has it."""

    tool: Tool
    # What `Tool.run` takes.
    name: str
    recipient: str
    description: str
    schema: dict[str, Any]
    # Of a tool that takes a text: the name of its one argument.
    text_argument: str | None = None


def offers(tools: Sequence[Tool]) -> dict[str, Offer]:
    """The tools by their names in MCP. Raises InputError for two of one name."""
    found: dict[str, Offer] = {}
    for tool in tools:
        space = tool.namespace
        if not space.tools:
            _add(found, space.name, _text_offer(tool, "", space.name, space.description or "", space.name))
        for one in space.tools:
            name = one.name if space.name == "functions" else f"{space.name}_{one.name}"
            recipient = f"{space.name}.{one.name}"
            parameters = dict(one.parameters or {"type": "object", "properties": {}})
            if parameters.get("type") == "string":
                _add(found, name, _text_offer(tool, one.name, recipient, one.description, one.name))
            else:
                _add(found, name, Offer(tool, one.name, recipient, one.description, parameters))
    return found


def _text_offer(tool: Tool, name: str, recipient: str, description: str, called: str) -> Offer:
    argument = _TEXT_ARGUMENTS.get(called, "input")
    schema = {
        "type": "object",
        "properties": {argument: {"type": "string"}},
        "required": [argument],
        "additionalProperties": False,
    }
    return Offer(tool, name, recipient, description, schema, argument)


def _add(found: dict[str, Offer], name: str, offer: Offer) -> None:
    if name in found:
        raise InputError(f"two tools would be named {name!r}: {found[name].recipient} and {offer.recipient}")
    found[name] = offer


class ToolServer:
    """A server of tools; ``make_tools`` makes those of one session."""

    def __init__(
        self,
        make_tools: Callable[[], Sequence[Tool]],
        *,
        audit: AuditLog | None = None,
        instructions: str = "",
        idle_s: float = DEFAULT_IDLE_S,
        max_sessions: int = DEFAULT_MAX_SESSIONS,
    ) -> None:
        """Raises UnavailableError where the protocol's package is not installed."""
        self._make_tools = make_tools
        self._audit = audit
        self._instructions = instructions
        self._idle_s = idle_s
        self._max_sessions = max_sessions
        self._sessions: set[_Session] = set()
        try:
            import mcp.server  # noqa: F401
        except ModuleNotFoundError as error:
            raise UnavailableError(
                f"the MCP server needs the package {error.name!r}; install it with: pip install 'ossia[mcp]'"
            ) from None

    @property
    def num_sessions(self) -> int:
        """Sessions that have made their tools."""
        return len(self._sessions)

    async def run_stdio(self) -> None:
        """Serve standard input and output until it ends."""
        from mcp.server.stdio import stdio_server

        server = self._server(is_http=False)
        async with stdio_server() as (reading, writing):
            await server.run(reading, writing, server.create_initialization_options())

    def lowlevel(self) -> Server[Any]:
        """The SDK's server over one session, for a client in the same process."""
        return self._server(is_http=False)

    def http_app(
        self, *, host: str = "127.0.0.1", name_of_key: Callable[[str | None], str | None] | None = None
    ) -> ASGIApp:
        """The application that speaks streamable HTTP at `/mcp`.

        ``host`` is the address that it will listen on: on this machine's own, requests that a browser sends for other
        pages are refused. ``name_of_key`` tells whose key a client has brought (None for nobody's) and keeps sessions
        to those who opened them; without it none is asked for.
        """
        app = self._server(is_http=True).streamable_http_app(
            streamable_http_path=PATH,
            host=host,
            session_idle_timeout=self._idle_s,
            max_sessions=self._max_sessions,
        )
        return app if name_of_key is None else _Keyed(app, name_of_key)

    # -- the protocol ------------------------------------------------------------------------------

    def _server(self, *, is_http: bool) -> Server[Any]:
        import mcp_types as types
        from mcp.server import Server
        from mcp.shared.exceptions import MCPError
        from mcp_types.version import HANDSHAKE_PROTOCOL_VERSIONS, MODERN_PROTOCOL_VERSIONS

        @contextlib.asynccontextmanager
        async def lifespan(_: Server[Any]) -> AsyncIterator[_Session]:
            # Of a connection that is all there is: standard input, or a client in the same process.
            session = self._session()
            try:
                yield session
            finally:
                await session.close()

        def session_of(context: Any) -> _Session:
            if not is_http:
                session: _Session = context.lifespan_context
                return session
            # The SDK tells handlers to clean up here, and gives no public way to it.
            connection = context.session._connection
            if "ossia" not in connection.state:
                connection.state["ossia"] = self._session()
                connection.exit_stack.push_async_callback(connection.state["ossia"].close)
            of_connection: _Session = connection.state["ossia"]
            return of_connection

        async def list_tools(context: Any, _params: Any) -> types.ListToolsResult:
            listed = [
                types.Tool(name=name, description=offer.description, input_schema=offer.schema)
                for name, offer in session_of(context).offers().items()
            ]
            return types.ListToolsResult(tools=listed)

        async def call_tool(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
            session = session_of(context)
            output = await session.call(params.name, params.arguments or {}, str(context.request_id))
            content: list[types.ContentBlock] = [types.TextContent(text=output.text)]
            content += [types.ImageContent(data=data, mime_type=kind) for kind, data in _images(output)]
            return types.CallToolResult(content=content, is_error=output.is_error)

        async def with_sessions_only(ctx: Any, call_next: Callable[[Any], Any]) -> Any:
            if ctx.protocol_version in MODERN_PROTOCOL_VERSIONS:
                supported = list(HANDSHAKE_PROTOCOL_VERSIONS)
                raise MCPError(
                    types.UNSUPPORTED_PROTOCOL_VERSION,
                    "These tools keep a session; open one with initialize",
                    {"supported": supported, "requested": ctx.protocol_version},
                )
            return await call_next(ctx)

        async def with_reasons(ctx: Any, call_next: Callable[[Any], Any]) -> Any:
            try:
                return await call_next(ctx)
            except OssiaError as error:
                # The SDK would hide what is wrong.
                raise MCPError(types.INTERNAL_ERROR, error.message) from None

        server: Server[Any] = Server(
            "ossia",
            version=version("ossia"),
            instructions=self._instructions or None,
            lifespan=lifespan,
            on_list_tools=list_tools,
            on_call_tool=call_tool,
        )
        server.middleware.append(with_reasons)
        if is_http:
            server.middleware.append(with_sessions_only)
        return server

    def _session(self) -> _Session:
        return _Session(self._make_tools, self._audit, self._sessions)


def _images(output: ToolOutput) -> list[tuple[str, str]]:
    """Types and base64 of the pictures of an answer."""
    urls = [str(one["url"]) for one in output.details.get("outputs") or () if one.get("type") == "image"]
    parts = [url.removeprefix("data:").partition(";base64,") for url in urls]
    return [(kind, data) for kind, _, data in parts if data]


class _Session:
    """One client's tools, made when they are first asked for."""

    def __init__(
        self, make_tools: Callable[[], Sequence[Tool]], audit: AuditLog | None, sessions: set[_Session]
    ) -> None:
        self._make_tools = make_tools
        self._audit = audit
        self._sessions = sessions
        self._tools: Sequence[Tool] | None = None
        self._offers: dict[str, Offer] = {}
        # A tool has one conversation, and runs its calls one after the other.
        self._locks: dict[int, asyncio.Lock] = {}

    def offers(self) -> dict[str, Offer]:
        if self._tools is None:
            self._tools = self._make_tools()
            self._sessions.add(self)
            self._offers = offers(self._tools)
        return self._offers

    async def call(self, name: str, arguments: dict[str, Any], call: str) -> ToolOutput:
        offer = self.offers().get(name)
        if offer is None:
            return ToolOutput(
                f"Error: there is no tool {name[:100]!r}; expected one of {', '.join(self._offers)}", True
            )
        if offer.text_argument is None:
            text = json.dumps(arguments, ensure_ascii=False)
        else:
            given = arguments.get(offer.text_argument)
            if not isinstance(given, str) or len(arguments) > 1:
                return ToolOutput(f"Error: expected one argument, {offer.text_argument!r}, a text", True)
            text = given
        async with self._locks.setdefault(id(offer.tool), asyncio.Lock()):
            try:
                return await run_logged(
                    self._audit, offer.tool, offer.name, text, tool_name=offer.recipient, response="mcp", call=call
                )
            except OssiaError as error:
                # Of the log: a call that leaves no trace is not answered.
                _log.error("tool=%s error=%r", offer.recipient, error.message)
                return ToolOutput(f"Error: {error.message}", True)

    async def close(self) -> None:
        self._sessions.discard(self)
        tools, self._tools, self._offers = self._tools or (), (), {}
        for tool in tools:
            await tool.close()


class _Keyed:
    """Lets in who brings a known key, and tells the SDK whose it is: a session is its opener's alone."""

    def __init__(self, app: ASGIApp, name_of_key: Callable[[str | None], str | None]) -> None:
        self._app = app
        self._name_of_key = name_of_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            from mcp.server.auth.middleware.bearer_auth import AuthenticatedUser
            from mcp.server.auth.provider import AccessToken
            from starlette.responses import JSONResponse

            header = next((value for key, value in scope["headers"] if key == b"authorization"), b"").decode("latin-1")
            scheme, _, key = header.partition(" ")
            name = self._name_of_key(key.strip() if scheme.lower() == "bearer" else None)
            if name is None:
                refusal = JSONResponse(
                    {"error": "expected one of the server's keys, as 'Authorization: Bearer <key>'"},
                    status_code=401,
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await refusal(scope, receive, send)
                return
            # The name stands for the key, which goes no further.
            scope["user"] = AuthenticatedUser(AccessToken(token=name, client_id=name, scopes=[]))
        await self._app(scope, receive, send)
