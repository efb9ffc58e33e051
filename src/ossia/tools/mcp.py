"""Tools of servers that speak the Model Context Protocol, as the model's own.

    pool = McpPool(guard=public_address)
    declared = read_declaration({"type": "mcp", "server_label": "docs", "server_url": "https://..."}, settings.mcp)
    tool = await McpTool.open(declared, pool, owner="conv_1", approvals=Approvals(key))
    tool.namespace                      `docs`, with the server's tools
    tool.list_item()                    the `mcp_list_tools` item that shows them
    await tool.run("search", '{"q": "x"}')

A server that runs here is named in the settings, [mcp.NAME], and reached by that label; a request brings at most an
address, which the pool's guard has to allow. Each server has a namespace of its own, so that no name of one can stand
for a tool of another.

A person is asked before each call unless the request says otherwise. `approval_request` makes the item that asks; its
id is signed over the server, the tool as it was listed, and the arguments, so that an approval fits that call alone,
once, whoever keeps the item in between. A tool list that has changed since the conversation last saw it (`pinned`) is
asked for again, whatever was said before.

`ToolOutput.details`  {"server_label", "name", "error": as in an `mcp_call` item or null}; `approval_required` is true
                      where a call was refused for that.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
import secrets
import socket
import time
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from ossia.config import McpServer, filled_in
from ossia.errors import InputError, NotFoundError, UnavailableError, UnsupportedError
from ossia.harmony import ToolDescription, ToolNamespace
from ossia.tools.base import RESERVED_NAMESPACES, ToolOutput
from ossia.tools.text import shortened
from ossia.tools.web.guard import why_not

if TYPE_CHECKING:
    from ossia.tools.mcp_transport import Connection

Json = dict[str, Any]

_LABEL = re.compile(r"[A-Za-z0-9_-]{1,64}")
_MAX_RESULT_CHARS = 100_000
_MAX_ARGUMENTS_CHARS = 1_000_000
_MAX_HEADERS = 32
# A tool list that is older is fetched again before a call.
_RELIST_S = 60.0
_REQUEST_TIMEOUT_S = 60
_MAX_USED_APPROVALS = 10_000


class Guard(Protocol):
    """Decides where a connection may lead."""

    async def __call__(self, host: str, port: int) -> str:
        """The address to connect to, in digits. Raises InputError for a place that is not allowed."""


async def public_address(host: str, port: int) -> str:
    """A `Guard` that allows what everybody on the internet can reach: each address that a name stands for must be.

    The verdict is the browser's, `why_not`: private networks, this machine, links, clouds' metadata and whatever a
    later standard reserves are not.
    """
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host.rstrip("."), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise InputError(f"the host {host!r} has no address; expected one that can be looked up") from None
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
    for address in addresses:
        if fault := why_not(ipaddress.ip_address(address)):
            raise InputError(f"the host {host!r} leads to {fault}")
    if not addresses:
        raise InputError(f"the host {host!r} has no address; expected one that can be looked up")
    return addresses[0]


# What a request declares -----------------------------------------------------------------------------------------


class ListedTool(NamedTuple):
    """A tool as its server describes it: text of a stranger, shortened."""

    name: str
    description: str
    schema: Mapping[str, Any]
    # What the server says, which nobody has checked.
    is_read_only: bool = False
    annotations: Mapping[str, Any] | None = None

    @property
    def hash(self) -> str:
        """SHA-256 over all that decides what a call of it means."""
        return _hash([self.name, self.description, self.schema, self.annotations])


@dataclass(frozen=True)
class ToolFilter:
    """Which tools are meant: by name, by what they say of themselves, or both. None asks for nothing."""

    names: frozenset[str] | None = None
    is_read_only: bool | None = None

    def fits(self, tool: ListedTool) -> bool:
        return (self.names is None or tool.name in self.names) and (
            self.is_read_only is None or tool.is_read_only == self.is_read_only
        )


@dataclass(frozen=True)
class ApprovalPolicy:
    """Who is asked about: all tools but those of ``never``, and those of ``always`` in any case."""

    always: ToolFilter | None = None
    never: ToolFilter | None = None

    def is_needed(self, tool: ListedTool) -> bool:
        if self.always is not None and self.always.fits(tool):
            return True
        return self.never is None or not self.never.fits(tool)


ALWAYS = ApprovalPolicy()
NEVER = ApprovalPolicy(never=ToolFilter())


@dataclass(frozen=True)
class Declaration:
    """One server of a request, read and checked."""

    label: str
    server: McpServer = field(repr=False)
    # From the settings: may run here and be anywhere.
    is_configured: bool
    description: str = ""
    allowed: ToolFilter = field(default_factory=ToolFilter)
    policies: tuple[ApprovalPolicy, ...] = (ALWAYS,)

    @property
    def identity(self) -> str:
        """A hash of where calls go and with which credentials."""
        server = self.server
        return _hash([self.label, server.command, server.args, server.url, sorted(server.headers.items())])

    def is_approval_needed(self, tool: ListedTool) -> bool:
        return any(policy.is_needed(tool) for policy in self.policies)


def read_declaration(tool: Mapping[str, Any], servers: Mapping[str, McpServer], param: str = "tools") -> Declaration:
    """Read a tool of the type `mcp`. ``servers`` are those of the settings.

    Raises InputError with ``param`` for what cannot be, NotFoundError for a label that the settings do not have.
    """
    label = tool.get("server_label")
    if not isinstance(label, str) or not _LABEL.fullmatch(label):
        raise _bad(param, "server_label", label, "1 to 64 letters, digits, '_' or '-'", show=True)
    if label in RESERVED_NAMESPACES:
        raise InputError(
            f"{param}.server_label {label!r} is a name of the format; choose another", param=f"{param}.server_label"
        )
    for key in ("connector_id", "tunnel_id"):
        if tool.get(key) is not None:
            raise UnsupportedError(f"{param}.{key} is a service of OpenAI's; give a server_url", param=f"{param}.{key}")
    policy = _read_policy(tool.get("require_approval"), f"{param}.require_approval")
    allowed = _read_filter(tool.get("allowed_tools"), f"{param}.allowed_tools", is_list=True) or ToolFilter()
    description = tool.get("server_description")
    if description is not None and not isinstance(description, str):
        raise _bad(param, "server_description", description, "a text")
    url = tool.get("server_url")
    if url is None:
        if label not in servers:
            known = f"; the settings name {', '.join(sorted(servers))}" if servers else ""
            raise NotFoundError(f"{param} has no server_url, and no server is named {label!r} here{known}", param=param)
        if tool.get("headers") or tool.get("authorization"):
            raise InputError(f"{param}: the server {label!r} has its own credentials; leave them out", param=param)
        server = servers[label]
        names = frozenset(server.tools) if server.tools else None
        own = NEVER if server.approval == "never" else ALWAYS
        # A request may ask for more approval than the settings do, and not for less.
        policies = (own,) if tool.get("require_approval") is None else (own, policy)
        if names is not None:
            allowed = replace(allowed, names=names if allowed.names is None else allowed.names & names)
        return Declaration(label, server, True, description or "", allowed, policies)
    server = McpServer(url=_read_url(url, param), headers=_read_headers(tool, param), timeout_s=_REQUEST_TIMEOUT_S)
    return Declaration(label, server, False, description or "", allowed, (policy,))


def configured(label: str, server: McpServer) -> Declaration:
    """The declaration of a server of the settings, as a request would name it."""
    return read_declaration({"type": "mcp", "server_label": label}, {label: server})


def _read_url(url: object, param: str) -> str:
    where = f"{param}.server_url"
    # The address may hold a secret, and is not repeated.
    if not isinstance(url, str) or len(url) > 2_048 or not re.match(r"https?://[^/?#\s]+", url, re.IGNORECASE):
        raise InputError(f"{where}: expected an address with https://", param=where)
    if "@" in re.split(r"[/?#]", url.split("://", 1)[1], maxsplit=1)[0]:
        raise InputError(f"{where} has a user or password in it; give authorization or headers", param=where)
    return url


def _read_headers(tool: Mapping[str, Any], param: str) -> dict[str, str]:
    raw = tool.get("headers") or {}
    if not isinstance(raw, dict) or len(raw) > _MAX_HEADERS:
        raise InputError(
            f"{param}.headers: expected an object of at most {_MAX_HEADERS} texts", param=f"{param}.headers"
        )
    for key, value in raw.items():
        if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}", key) or not isinstance(value, str):
            raise InputError(f"{param}.headers: expected names of headers with texts", param=f"{param}.headers")
        if not re.fullmatch(r"[\x20-\x7e]{0,8192}", value):
            raise InputError(f"{param}.headers.{key}: expected printable ASCII", param=f"{param}.headers")
    headers = dict(raw)
    token = tool.get("authorization")
    if token is not None:
        if not isinstance(token, str) or not re.fullmatch(r"[\x21-\x7e]{1,8192}", token):
            raise InputError(f"{param}.authorization: expected an access token", param=f"{param}.authorization")
        if any(key.lower() == "authorization" for key in headers):
            raise InputError(f"{param} has authorization twice; leave it out of headers", param=f"{param}.headers")
        headers["Authorization"] = f"Bearer {token}"
    return headers


def _read_policy(raw: object, param: str) -> ApprovalPolicy:
    if raw is None or raw == "always":
        return ALWAYS
    if raw == "never":
        return NEVER
    if isinstance(raw, dict) and raw.keys() <= {"always", "never"}:
        return ApprovalPolicy(*(_read_filter(raw.get(key), f"{param}.{key}") for key in ("always", "never")))
    raise InputError(f"{param} is {str(raw)[:100]}; expected 'always', 'never' or filters for these", param=param)


def _read_filter(raw: object, param: str, *, is_list: bool = False) -> ToolFilter | None:
    if raw is None:
        return None
    if isinstance(raw, list) and is_list:
        raw = {"tool_names": raw}
    if not isinstance(raw, dict) or not raw.keys() <= {"tool_names", "read_only"}:
        raise InputError(f"{param}: expected an object with tool_names or read_only", param=param)
    names, is_read_only = raw.get("tool_names"), raw.get("read_only")
    if names is not None and (not isinstance(names, list) or not all(isinstance(name, str) for name in names)):
        raise InputError(f"{param}.tool_names: expected a list of names", param=param)
    if is_read_only is not None and not isinstance(is_read_only, bool):
        raise InputError(f"{param}.read_only: expected true or false", param=param)
    return ToolFilter(None if names is None else frozenset(names), is_read_only)


def _bad(param: str, key: str, value: object, expected: str, *, show: bool = False) -> InputError:
    shown = f" is {str(value)[:100]!r}" if show else ""
    return InputError(f"{param}.{key}{shown}; expected {expected}", param=f"{param}.{key}")


# Approvals -------------------------------------------------------------------------------------------------------


class Approvals:
    """Signs requests for approval, and knows one of its own again - once."""

    def __init__(self, key: bytes | None = None) -> None:
        """``key`` is at least 16 secret bytes, kept where answers may come after a restart; None makes one up."""
        assert key is None or len(key) >= 16
        self._key = key or secrets.token_bytes(32)
        self._used: OrderedDict[str, None] = OrderedDict()

    def request(self, label: str, identity: str, tool: ListedTool, arguments: str) -> Json:
        """The `mcp_approval_request` item for one call."""
        call = secrets.token_hex(12)
        return {
            "id": f"mcpr_{call}{self._sign(call, label, identity, tool, arguments)}",
            "type": "mcp_approval_request",
            "server_label": label,
            "name": tool.name,
            "arguments": arguments,
        }

    def take(self, item: Mapping[str, Any], identity: str, tool: ListedTool) -> str | None:
        """Why the item is no approval of this very call, None if it is. What was taken cannot be taken again."""
        identifier, arguments = item.get("id"), item.get("arguments")
        if not isinstance(identifier, str) or not isinstance(arguments, str):
            return "the request for approval has no id or arguments"
        match = re.fullmatch(r"mcpr_([0-9a-f]{24})([0-9a-f]{64})", identifier)
        label = str(item.get("server_label"))
        if match is None or not hmac.compare_digest(match[2], self._sign(match[1], label, identity, tool, arguments)):
            return "the approval is of another call, of other arguments, or of a tool that has changed since"
        if identifier in self._used:
            return "the approval was used already"
        self._used[identifier] = None
        while len(self._used) > _MAX_USED_APPROVALS:
            self._used.popitem(last=False)
        return None

    def _sign(self, call: str, label: str, identity: str, tool: ListedTool, arguments: str) -> str:
        signed = json.dumps([call, label, identity, tool.name, tool.hash, arguments]).encode()
        return hmac.new(self._key, signed, hashlib.sha256).hexdigest()


# Connections -----------------------------------------------------------------------------------------------------


class CallResult(NamedTuple):
    """What a server answered."""

    text: str
    is_error: bool
    # As in an `mcp_call` item.
    error: Json | None


class McpPool:
    """Connections that are kept open from one response to the next, for the same owner alone.

    A server may keep a state in a connection, so that what one owner (a conversation, a key) has put there is not for
    another. Connections that nobody uses are closed after ``idle_s``.
    """

    def __init__(self, *, guard: Guard = public_address, idle_s: float = 300.0, max_connections: int = 64) -> None:
        """``guard`` decides on the addresses that requests bring; servers of the settings may be anywhere."""
        self._guard = guard
        self._idle_s = idle_s
        self._max_connections = max_connections
        self._open: dict[tuple[str, str], Connection] = {}
        self._num_opening = 0
        self._users: dict[Connection, int] = {}
        self._idle_since: dict[Connection, float] = {}
        self._locks: dict[tuple[str, str], asyncio.Lock] = {}
        self._sweeper: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def num_connections(self) -> int:
        return len(self._open)

    async def take(self, declaration: Declaration, owner: str) -> Connection:
        """An open connection, to be given back. Raises UnavailableError, InputError, ConfigError."""
        key = (declaration.identity, owner)
        lock = self._locks.setdefault(key, asyncio.Lock())
        try:
            async with lock:
                connection = self._open.get(key)
                if connection is None or not connection.is_open:
                    connection = await self._connect(key, declaration)
                self._users[connection] = self._users.get(connection, 0) + 1
                self._idle_since.pop(connection, None)
                return connection
        finally:
            if not lock.locked() and key not in self._open:
                self._locks.pop(key, None)

    def give_back(self, connection: Connection) -> None:
        """Say that a taken connection is not used any more."""
        left = self._users.get(connection, 0) - 1
        if left > 0:
            self._users[connection] = left
            return
        self._users.pop(connection, None)
        self._idle_since[connection] = time.monotonic()
        if self._sweeper is None and not self._is_closed:
            self._sweeper = asyncio.create_task(self._sweep(), name="mcp-sweep")

    async def close(self) -> None:
        """Close all connections, and end the programs behind them. More than once is harmless."""
        self._is_closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            await asyncio.wait([self._sweeper])
            self._sweeper = None
        connections = list(self._open.values())
        self._open.clear()
        await asyncio.gather(*(connection.close() for connection in connections))

    async def _connect(self, key: tuple[str, str], declaration: Declaration) -> Connection:
        if self._is_closed:
            raise UnavailableError("connections to MCP servers are being closed")
        if (old := self._open.pop(key, None)) is not None:
            await self._drop(old)
        self._num_opening += 1
        try:
            if len(self._open) + self._num_opening > self._max_connections:
                idle = min(self._idle_since, key=self._idle_since.__getitem__, default=None)
                if idle is None:
                    raise UnavailableError(f"all {self._max_connections} connections to MCP servers are in use")
                await self._remove(idle)
            server = declaration.server
            if declaration.is_configured:
                server = filled_in(server, declaration.label)
            connection = _connection(declaration.label, server, None if declaration.is_configured else self._guard)
            await connection.open()
        finally:
            self._num_opening -= 1
        if self._is_closed:
            await connection.close()
            raise UnavailableError("connections to MCP servers are being closed")
        self._open[key] = connection
        return connection

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(min(self._idle_s, 10.0))
            longest = time.monotonic() - self._idle_s
            for connection in list(self._idle_since):
                # While another was closed, this one may have been taken.
                since = self._idle_since.get(connection)
                if since is not None and (since <= longest or not connection.is_open):
                    await self._remove(connection)

    async def _remove(self, connection: Connection) -> None:
        for key, one in list(self._open.items()):
            if one is connection:
                del self._open[key]
                self._locks.pop(key, None)
        await self._drop(connection)

    async def _drop(self, connection: Connection) -> None:
        self._idle_since.pop(connection, None)
        await connection.close()


def _connection(label: str, server: McpServer, guard: Guard | None) -> Connection:
    try:
        from ossia.tools.mcp_transport import Connection
    except ModuleNotFoundError as error:
        raise UnavailableError(
            f"MCP servers need the package {error.name!r}; install it with: pip install 'ossia[mcp]'"
        ) from None
    return Connection(label, server, guard)


# The tool --------------------------------------------------------------------------------------------------------


class McpTool:
    """The tools of one server, for one conversation."""

    def __init__(
        self,
        declaration: Declaration,
        pool: McpPool,
        owner: str,
        approvals: Approvals,
        *,
        pinned: str | None = None,
    ) -> None:
        self.declaration = declaration
        self.instructions = ""
        self._pool = pool
        self._owner = owner
        self._approvals = approvals
        self._pinned = pinned
        self._connection: Connection | None = None
        self._listed_at = 0.0
        self._num_changes = 0
        # The name that the model is told -> the tool as it was listed when the model was told.
        self._tools: dict[str, ListedTool] = {}

    @classmethod
    async def open(
        cls,
        declaration: Declaration,
        pool: McpPool,
        *,
        owner: str,
        approvals: Approvals,
        pinned: str | None = None,
    ) -> McpTool:
        """Connect and list the tools.

        ``pinned`` is the `list_hash` that the conversation saw before. Raises UnavailableError, InputError,
        ConfigError for a server that cannot be used.
        """
        tool = cls(declaration, pool, owner, approvals, pinned=pinned)
        try:
            tool._tools = tool._named(await tool._list())
        except BaseException:
            await tool.close()
            raise
        return tool

    @property
    def namespace(self) -> ToolNamespace:
        described = self.declaration.description
        if not described and self.declaration.is_configured:
            described = self.instructions
        tools = [
            ToolDescription(name, tool.description, tool.schema if tool.schema.get("properties") else None)
            for name, tool in self._tools.items()
        ]
        return ToolNamespace(self.declaration.label, described or None, tuple(tools))

    @property
    def list_hash(self) -> str:
        """SHA-256 over the tools that are offered: what a conversation pins."""
        return _hash(sorted(tool.hash for tool in self._tools.values()))

    @property
    def has_changed(self) -> bool:
        """Whether the tools are others than those that the conversation saw before."""
        return self._pinned is not None and self._pinned != self.list_hash

    def list_item(self) -> Json:
        """The `mcp_list_tools` item."""
        return {
            "id": f"mcpl_{secrets.token_hex(24)}",
            "type": "mcp_list_tools",
            "server_label": self.declaration.label,
            "tools": [
                {
                    "name": tool.name,
                    "description": tool.description,
                    "input_schema": tool.schema,
                    "annotations": tool.annotations,
                }
                for tool in self._tools.values()
            ],
            "error": None,
        }

    def has(self, name: str) -> bool:
        return name in self._tools

    def real_name(self, name: str) -> str:
        """The server's own name for a tool by the name that the model is told."""
        return self._tools[name].name if name in self._tools else name[:100]

    def is_approval_needed(self, name: str) -> bool:
        """Whether a person is to be asked before a call of the tool; no tool of that name needs none."""
        tool = self._tools.get(name)
        return tool is not None and (self.has_changed or self.declaration.is_approval_needed(tool))

    def approval_request(self, name: str, arguments: str) -> Json:
        """The `mcp_approval_request` item that asks for one call of a tool that is there."""
        return self._approvals.request(self.declaration.label, self.declaration.identity, self._tools[name], arguments)

    async def run(self, name: str, arguments: str) -> ToolOutput:
        """Run a call that needs no approval."""
        if self.is_approval_needed(name):
            return self._failed(name, "the call needs the approval of the user", approval_required=True)
        return await self._run(name, arguments)

    async def run_approved(self, request: Mapping[str, Any]) -> ToolOutput:
        """Run the call that an `mcp_approval_request` of ours asks for, whose approval has come."""
        shown = next((shown for shown, tool in self._tools.items() if tool.name == request.get("name")), None)
        if shown is None:
            return self._failed(str(request.get("name"))[:100], "the approved tool is not offered any more")
        fault = self._approvals.take(request, self.declaration.identity, self._tools[shown])
        if fault is not None:
            return self._failed(shown, fault, approval_required=True)
        return await self._run(shown, request["arguments"])

    async def close(self) -> None:
        """Give the connection back to the pool. More than once is harmless."""
        if self._connection is not None:
            self._pool.give_back(self._connection)
            self._connection = None

    # -- calls -------------------------------------------------------------------------------------

    async def _run(self, name: str, arguments: str) -> ToolOutput:
        tool = self._tools.get(name)
        if tool is None:
            return self._failed(
                name, f"there is no tool {name[:100]!r}; expected one of {', '.join(self._tools) or 'none'}"
            )
        try:
            read = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return self._failed(name, "the arguments are not JSON; expected an object")
        if not isinstance(read, dict) or len(arguments) > _MAX_ARGUMENTS_CHARS:
            return self._failed(name, f"expected an object of at most {_MAX_ARGUMENTS_CHARS:,} characters")
        try:
            fault = await self._refresh(tool)
            connection = await self._connected()
        except (UnavailableError, InputError) as error:
            return self._failed(name, error.message)
        if fault is not None:
            return self._failed(name, fault, approval_required=True)
        result = await connection.call(tool.name, read)
        text = shortened(result.text, _MAX_RESULT_CHARS)
        details = {"server_label": self.declaration.label, "name": tool.name, "error": result.error}
        return ToolOutput(f"Error: {text}" if result.is_error else text, result.is_error, details)

    async def _refresh(self, tool: ListedTool) -> str | None:
        """Why the tool is not the one any more that the model was told of; None if it is."""
        connection = await self._connected()
        if connection.num_changes == self._num_changes and time.monotonic() - self._listed_at < _RELIST_S:
            return None
        now = {one.name: one for one in await self._list()}
        if tool.name not in now:
            return f"the server does not offer {tool.name!r} any more"
        if now[tool.name].hash != tool.hash:
            return f"the server has changed {tool.name!r} since it was listed; it has to be listed and approved anew"
        return None

    async def _list(self) -> list[ListedTool]:
        connection = await self._connected()
        # Read first: a change that comes while the list is fetched counts as one after it.
        self._num_changes = connection.num_changes
        tools, self.instructions = await connection.list_tools()
        self._listed_at = time.monotonic()
        return [tool for tool in tools if self.declaration.allowed.fits(tool)]

    async def _connected(self) -> Connection:
        if self._connection is not None and not self._connection.is_open:
            await self.close()
        if self._connection is None:
            self._connection = await self._pool.take(self.declaration, self._owner)
        return self._connection

    def _named(self, tools: Sequence[ListedTool]) -> dict[str, ListedTool]:
        """The tools by names that the format can say, each by one of its own."""
        named: dict[str, ListedTool] = {}
        for tool in tools:
            named[_free_name(tool.name, named)] = tool
        return named

    def _failed(self, name: str, message: str, *, approval_required: bool = False) -> ToolOutput:
        details: Json = {
            "server_label": self.declaration.label,
            "name": name,
            "error": {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": message}]},
        }
        if approval_required:
            details["approval_required"] = True
        return ToolOutput(f"Error: {message}", True, details)


def listed_hash(item: Mapping[str, Any]) -> str | None:
    """The `list_hash` of the tools that an `mcp_list_tools` item shows; None if it shows a failure, or is none."""
    tools = item.get("tools")
    if item.get("error") or not isinstance(tools, list):
        return None
    listed = [
        ListedTool(
            str(tool.get("name")),
            str(tool.get("description") or ""),
            tool.get("input_schema") or {},
            annotations=tool.get("annotations"),
        )
        for tool in tools
        if isinstance(tool, dict)
    ]
    return _hash(sorted(tool.hash for tool in listed))


def _free_name(name: str, taken: Collection[str]) -> str:
    plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:64]
    free, n = plain, 1
    while free in taken:
        n += 1
        free = f"{plain[:60]}_{n}"
    return free


def _hash(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=list)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
