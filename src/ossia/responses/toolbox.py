"""The tools that a server runs itself, for the responses of a chain: python, browser, and those of MCP servers.

    boxes = Toolboxes(python=sessions, browser=backend, mcp=settings.mcp, audit=log)
    on, off = await boxes.start()                           the sandbox is proven here
    toolbox = await boxes.open(request, items, state)       of one response; None if it has no tools of ours
    toolbox.state()                                         kept with the response, for the next of the chain

    declared                            to the model        shown as
    web_search, web_search_preview...   browser             web_search_call
    code_interpreter                    python              code_interpreter_call, in a container of the chain
    mcp                                 its server_label    mcp_list_tools, mcp_call, mcp_approval_request

A chain has one stack of pages and one container. What tools have said is not to be trusted: it is a text to the model
and nothing else; with ``asks_after_untrusted`` a person is asked before a call of an MCP server that comes after any of
it, and calls of the client's functions say that they need approval.

Files in /mnt/data that an answer names are cited, and those that a declaration names by `file_ids` are put there.

Beside the API's own fields, a web_search_call has `call`: the function, its arguments as they were understood, and the
cursor that it made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from ossia.config import McpServer
from ossia.errors import InputError, NotFoundError, OssiaError, UnavailableError, UnsupportedError
from ossia.harmony import Message, Tokenizer, ToolNamespace
from ossia.responses.schema import Json, PromptRequest, new_id
from ossia.responses.tools import Scanner, Toolbox, ToolResult, kind_of
from ossia.tools.audit import AuditLog, run_logged
from ossia.tools.base import Tool
from ossia.tools.browser import Browser, BrowserRules
from ossia.tools.containers import Containers
from ossia.tools.file_mentions import FileScanner
from ossia.tools.mcp import Approvals, Declaration, McpPool, McpTool, listed_hash, read_declaration
from ossia.tools.python import PythonSessions
from ossia.tools.web.backend import Backend
from ossia.tools.web.guard import Domains

_MAX_SERVERS = 16
_MAX_FILES = 20
# Declared by a client, these may bring private data into the context.
_PRIVATE = frozenset({"function", "custom", "namespace", "mcp", "shell", "local_shell", "apply_patch"})
_ACTIONS: Mapping[str, Json] = {
    "search": {"type": "search", "query": ""},
    "open": {"type": "open_page", "url": ""},
    "find": {"type": "find_in_page", "pattern": "", "url": ""},
}
_NOT_APPROVED = "Error: this call needs the approval of a person, who cannot be asked here. Go on without it."


# The name and the bytes of a file by its id and owner. Raises NotFoundError.
FileSource = Callable[[str, str], Awaitable[tuple[str, bytes]]]


class Toolboxes:
    """What a server offers, shared by all conversations; what belongs to one is a `ChainToolbox`."""

    def __init__(
        self,
        *,
        python: PythonSessions | None = None,
        browser: Backend | None = None,
        mcp: Mapping[str, McpServer] | None = None,
        mcp_pool: McpPool | None = None,
        approvals: Approvals | None = None,
        audit: AuditLog | None = None,
        rules: BrowserRules | None = None,
        links: Literal["auto", "any", "seen"] = "auto",
        asks_after_untrusted: bool = False,
        tokenizer: Tokenizer | None = None,
        off: Mapping[str, str] | None = None,
        files: FileSource | None = None,
    ) -> None:
        """``links`` says which URLs the model may open: ``any``, only those that it has ``seen`` or the user named, or
        ``auto``: the latter where the request brings tools that may know private data. Without ``mcp_pool`` there is no
        MCP. ``off`` tells why tools are not offered. ``files`` gives what was uploaded, for a container's `file_ids`.
        """
        self.python, self.browser, self.pool, self.audit = python, browser, mcp_pool, audit
        self.containers = Containers(python) if python is not None else None
        self.servers = dict(mcp or {})
        self.approvals = approvals or Approvals()
        self.rules = rules or BrowserRules()
        self.links = links
        self.asks_after_untrusted = asks_after_untrusted
        self.tokenizer = tokenizer
        self.off = dict(off or {})
        self.files = files
        self._is_started = False

    async def start(self, required: Sequence[str] = ()) -> tuple[list[str], dict[str, str]]:
        """Prove the sandbox; which tools are on, and why others are off.

        Raises UnavailableError if one of the ``required`` is off. More than once is harmless.
        """
        if self.python is not None and not self._is_started:
            try:
                await self.python.check()
            except UnavailableError as error:
                self.off["python"] = error.message
                await self.python.aclose()
                self.python = self.containers = None
        self._is_started = True
        on = []
        if self.python is not None:
            on.append(f"python ({self.python.tier})")
        if self.browser is not None:
            on.append(f"browser ({self.browser.name})")
        if self.pool is not None:
            on.append(f"mcp ({', '.join(sorted(self.servers)) or 'servers that a request names'})")
        for name in required:
            if name in self.off:
                raise UnavailableError(f"the tool {name} was asked for and is off: {self.off[name]}")
        return on, self.off

    async def open(
        self,
        request: PromptRequest,
        items: Sequence[Json],
        state: Json | None = None,
        *,
        owner: str = "",
        can_ask: bool = True,
    ) -> ChainToolbox | None:
        """The tools that a request declares. ``items`` are those of its history and input, ``state`` is what the
        response before has left, ``owner`` whose containers and files it may use; without ``can_ask`` nobody can be
        asked for an approval, and nobody comes back.

        Raises InputError naming a declaration that cannot be used, NotFoundError for a container that is not there.
        """
        box = ChainToolbox(self, request, items, state or {}, owner, can_ask=can_ask)
        await box.open(request.tools or (), items)
        return box if box.is_needed else None

    async def close(self) -> None:
        """End all sessions and connections. More than once is harmless."""
        if self.pool is not None:
            await self.pool.close()
        if self.python is not None:
            await self.python.aclose()
        if self.browser is not None:
            await asyncio.to_thread(self.browser.close)
        if self.audit is not None:
            self.audit.close()


class ChainToolbox(Toolbox):
    """The tools of one response, with what the chain has left them."""

    def __init__(
        self, boxes: Toolboxes, request: PromptRequest, items: Sequence[Json], state: Json, owner: str, *, can_ask: bool
    ) -> None:
        self._boxes = boxes
        self._state = state
        self._owner = owner
        self._can_ask = can_ask
        self._response_id = ""
        self._call_id = ""
        self._tools: dict[str, Tool] = {}
        self._browser: Browser | None = None
        self._container_id = ""
        self._is_container_used = False
        # Ids of the uploaded files that the container gets before its first call.
        self._file_ids: list[str] = []
        # Ids of the container's own files, by path.
        self._files: dict[str, str] = {}
        self._servers: dict[str, McpTool] = {}
        self._opening: list[Json] = []
        # Types of the declarations that are served, by their place in the request.
        self._served: set[int] = set()
        self._declared = list(request.tools or ())
        said = any(str(item.get("type")).endswith("_output") for item in items)
        self._is_untrusted = bool(state.get("untrusted")) or said

    async def open(self, declared: Sequence[Json], items: Sequence[Json]) -> None:
        """Read the declarations. Raises what is wrong with one."""
        servers: list[tuple[int, Declaration]] = []
        for i, tool in enumerate(declared):
            kind, where = kind_of(tool), f"tools[{i}]"
            # Of several, the first counts.
            if kind == "web_search" and self._boxes.browser is not None:
                if self._browser is None:
                    self._browser = self._open_browser(tool, declared, items, where)
                    self._tools["browser"] = self._browser
                self._served.add(i)
            elif kind == "code_interpreter" and self._boxes.containers is not None:
                if "python" not in self._tools:
                    self._container_id = self._read_container(self._boxes.containers, tool, items, where)
                    self._tools["python"] = self._boxes.containers.tool(self._container_id)
                    self._file_ids = await self._read_file_ids(tool, where)
                    await self._list_files()
                self._served.add(i)
            elif kind == "mcp" and self._boxes.pool is not None:
                servers.append((i, read_declaration(tool, self._boxes.servers, where)))
                self._served.add(i)
        if self._browser is None and self._boxes.browser is not None and "browser" in self._state:
            # Not offered any more, and earlier pages can still be cited.
            self._browser = self._open_browser({}, declared, items, "tools")
        await self._open_servers(servers, items)

    @property
    def is_needed(self) -> bool:
        return bool(self._tools or self._servers or self._opening or self._state)

    # What the model is told ------------------------------------------------------------------------------------------

    def namespaces(self, tools: Sequence[Json]) -> tuple[list[ToolNamespace], list[Json]]:
        spaces = [self._tools[name].namespace for name in sorted(self._tools)]
        spaces += [tool.namespace for tool in self._servers.values() if tool.namespace.tools]
        served = [self._declared[i] for i in self._served]
        return spaces, [tool for tool in tools if not any(tool is one or tool == one for one in served)]

    def name(self, recipient: str) -> str:
        """Without the `functions.` that the model puts before names that are none of a function's."""
        plain = recipient.removeprefix("functions.")
        return plain if plain.partition(".")[0] in (*self._tools, *self._servers) else recipient

    def item(self, recipient: str) -> Json | None:
        space, _, name = self.name(recipient).partition(".")
        if space in self._servers:
            return self._mcp_item(self._servers[space], space, name)
        if space == "python" and space in self._tools:
            return {"type": "code_interpreter_call", "container_id": self._container_id, "outputs": None}
        if space == "browser" and space in self._tools and name:
            return {"type": "web_search_call", "action": dict(_ACTIONS.get(name, _ACTIONS["search"]))}
        return None

    def begin(self, response_id: str) -> None:
        self._response_id = response_id

    def opening(self) -> list[Json]:
        return self._opening

    def scanner(self) -> Scanner | None:
        cited = self._browser.scanner() if self._browser is not None else None
        return FileScanner(self._container_id, self._files, cited) if self._files else cited

    # Calls -----------------------------------------------------------------------------------------------------------

    async def run(self, call: Message) -> ToolResult:
        recipient = self.name(call.recipient or "")
        space, _, name = recipient.partition(".")
        arguments = call.text
        if space in self._servers:
            return await self._run_mcp(self._servers[space], name, arguments, recipient)
        tool = self._tools[space]
        if space == "python" and self._boxes.containers is not None:
            left = {"id": self._container_id, "used": True}
            if self._state.get("container") == left and not self._is_container_used:
                assert self._boxes.python is not None
                self._boxes.python.expect(self._container_id)
            try:
                await self._put_files(self._boxes.containers)
            except OssiaError as error:
                return ToolResult(f"[ERROR] The user's files cannot be put into /mnt/data: {error.message}", {}, True)
            self._boxes.containers.use(self._container_id, owner=self._owner)
            self._is_container_used = True
        output = await run_logged(
            self._boxes.audit, tool, name, arguments, tool_name=recipient, response=self._response_id
        )
        self._is_untrusted = True
        details = output.details
        if space == "python":
            await self._list_files()
            # Out of a container that was full, say, no outputs have come.
            outputs = list(details.get("outputs", ()))
            return ToolResult(output.text, {"container_id": self._container_id, "outputs": outputs}, output.is_error)
        raw = {"name": name, "arguments": details.get("arguments") or {}, "cursor": details.get("cursor")}
        fields = {"action": dict(details["action"]), "call": raw, "results": list(details.get("results") or ())}
        return ToolResult(output.text, fields, output.is_error)

    async def _run_mcp(self, tool: McpTool, name: str, arguments: str, recipient: str) -> ToolResult:
        if not self._can_ask and self._is_approval_needed(tool, name):
            self._record(recipient, arguments, "refused")
            return ToolResult(_NOT_APPROVED, {"error": _mcp_error(_NOT_APPROVED)}, True)
        try:
            output = await run_logged(
                self._boxes.audit, tool, name, arguments, tool_name=recipient, response=self._response_id
            )
        finally:
            # The pool keeps the connection for the next call.
            await tool.close()
        self._is_untrusted = True
        return _mcp_result(output.text, output.is_error, output.details)

    def ask(self, call: Message) -> Json:
        recipient = self.name(call.recipient or "")
        space, _, name = recipient.partition(".")
        self._record(recipient, call.text, "approval_requested")
        return self._servers[space].approval_request(name, call.text)

    async def run_approved(self, request: Json) -> ToolResult:
        label, arguments = str(request.get("server_label")), str(request.get("arguments"))
        recipient = f"{label}.{request.get('name')}"
        tool = self._servers.get(label)
        if tool is None:
            text = f"Error: the server {label!r} is not offered any more."
            return ToolResult(text, {"error": _mcp_error(text)}, True)
        try:
            output = await run_logged(
                self._boxes.audit,
                _Approved(tool, request),
                "",
                arguments,
                tool_name=recipient,
                response=self._response_id,
            )
        finally:
            await tool.close()
        self._is_untrusted = True
        return _mcp_result(output.text, output.is_error, output.details)

    @property
    def wants_approval(self) -> bool:
        return self._boxes.asks_after_untrusted and self._is_untrusted

    def state(self) -> Json | None:
        state = dict(self._state)
        if self._browser is not None:
            state["browser"] = self._browser.state()
        if self._container_id and (self._is_container_used or "container" not in state):
            state["container"] = {"id": self._container_id, "used": self._is_container_used}
        if self._is_untrusted:
            state["untrusted"] = True
        return state or None

    async def close(self) -> None:
        if not self._can_ask and self._is_container_used and self._boxes.containers is not None:
            await self._boxes.containers.end(self._container_id)

    # Browser ---------------------------------------------------------------------------------------------------------

    def _open_browser(self, tool: Json, declared: Sequence[Json], items: Sequence[Json], where: str) -> Browser:
        backend = self._boxes.browser
        assert backend is not None
        if tool.get("external_web_access") is False and not backend.name.startswith("local:"):
            raise UnsupportedError(
                f"{where}.external_web_access is false, and this server has no other pages", param=where
            )
        domains = _read_domains(tool.get("filters"), f"{where}.filters").within(self._boxes.rules.domains)
        is_private = any(one.get("type") in _PRIVATE for one in declared)
        only_seen = self._boxes.links == "seen" or (self._boxes.links == "auto" and is_private)
        rules = replace(self._boxes.rules, domains=domains, seen_links_only=only_seen)
        state = self._state.get("browser")
        try:
            browser = Browser(backend, rules, state=state, tokenizer=self._boxes.tokenizer)
        except InputError:
            # Of another version of ossia: the pages are lost, the conversation is not.
            browser = Browser(backend, rules, tokenizer=self._boxes.tokenizer)
        for item in items:
            if item.get("role") in ("user", "developer", "system"):
                browser.note_text(_text_of(item))
        return browser

    # Containers ------------------------------------------------------------------------------------------------------

    def _read_container(self, containers: Containers, tool: Json, items: Sequence[Json], where: str) -> str:
        given = tool.get("container") or {"type": "auto"}
        param = f"{where}.container"
        if isinstance(given, str):
            if not containers.has(given, self._owner):
                raise NotFoundError(
                    f"{param} {given[:80]!r} is not there; it was never made, was deleted, or was not used for "
                    f"{containers.idle_s / 60:g} minutes",
                    param=param,
                )
            return given
        if not isinstance(given, dict) or given.get("type") != "auto":
            raise InputError(f"{param} is {str(given)[:80]!r}; expected an id or {{'type': 'auto'}}", param=param)
        policy = given.get("network_policy")
        if isinstance(policy, dict) and policy.get("type") != "disabled":
            raise UnsupportedError(f"{param}.network_policy: code has no network here", param=param)
        known = self._state.get("container", {}).get("id")
        if known:
            return str(known)
        # A client that keeps the history itself.
        for item in reversed(items):
            if item.get("type") == "code_interpreter_call" and containers.has(item.get("container_id"), self._owner):
                return str(item["container_id"])
        return containers.new_id()

    async def _read_file_ids(self, tool: Json, where: str) -> list[str]:
        """The uploaded files that the container is to have. Raises InputError, NotFoundError for one that is none."""
        given = tool.get("container")
        ids = given.get("file_ids") or [] if isinstance(given, dict) else []
        param = f"{where}.container.file_ids"
        if not isinstance(ids, list) or not all(isinstance(one, str) for one in ids) or len(ids) > _MAX_FILES:
            raise InputError(f"{param}: expected a list of at most {_MAX_FILES} ids of files", param=param)
        files, containers = self._boxes.files, self._boxes.containers
        if ids and files is None:
            raise UnsupportedError(f"{param}: no files are kept here", param=param)
        for one in ids:
            if files is not None and containers is not None and not containers.has_copy(self._container_id, one):
                await files(one, self._owner)
        return list(dict.fromkeys(ids))

    async def _put_files(self, containers: Containers) -> None:
        """Copy what was uploaded into the container, once for as long as it lives."""
        files = self._boxes.files
        for one in self._file_ids:
            if files is not None and not containers.has_copy(self._container_id, one):
                name, data = await files(one, self._owner)
                containers.use(self._container_id, owner=self._owner)
                await containers.copy(self._container_id, one, name, data)

    async def _list_files(self) -> None:
        """What the answer may cite. Where nobody can come back for a file, that is nothing."""
        containers = self._boxes.containers
        if not self._can_ask or containers is None or not containers.has(self._container_id):
            return
        try:
            self._files = {file.path: file.id for file in await containers.files(self._container_id)}
        except OssiaError:
            self._files = {}

    # MCP -------------------------------------------------------------------------------------------------------------

    async def _open_servers(self, servers: Sequence[tuple[int, Declaration]], items: Sequence[Json]) -> None:
        if len(servers) > _MAX_SERVERS:
            raise InputError(f"tools has {len(servers)} MCP servers; expected {_MAX_SERVERS} at most", param="tools")
        labels = [declared.label for _, declared in servers]
        if len(set(labels)) < len(labels):
            raise InputError("two MCP servers have one server_label; expected different ones", param="tools")
        for tool, item in await asyncio.gather(*(self._open_server(declared, items) for _, declared in servers)):
            if tool is not None:
                self._servers[tool.declaration.label] = tool
            if item is not None:
                self._opening.append(item)

    async def _open_server(self, declared: Declaration, items: Sequence[Json]) -> tuple[McpTool | None, Json | None]:
        """The server's tools, and the item that shows them, unless the conversation has seen these already."""
        lists = [i for i in items if i.get("type") == "mcp_list_tools" and i.get("server_label") == declared.label]
        pinned = next((found for item in reversed(lists) if (found := listed_hash(item)) is not None), None)
        assert self._boxes.pool is not None
        owner = str(self._state.setdefault("mcp_owner", new_id("chain")))
        try:
            tool = await McpTool.open(
                declared, self._boxes.pool, owner=owner, approvals=self._boxes.approvals, pinned=pinned
            )
            await tool.close()
        except OssiaError as error:
            return None, {
                "id": new_id("mcpl"),
                "type": "mcp_list_tools",
                "server_label": declared.label,
                "tools": [],
                "error": error.message,
            }
        return tool, tool.list_item() if pinned != tool.list_hash else None

    def _mcp_item(self, tool: McpTool, label: str, name: str) -> Json:
        called: Json = {"server_label": label, "name": tool.real_name(name)}
        if self._can_ask and self._is_approval_needed(tool, name):
            return {"type": "mcp_approval_request", "arguments": "", **called}
        return {"type": "mcp_call", **called, "output": None, "error": None, "approval_request_id": None}

    def _is_approval_needed(self, tool: McpTool, name: str) -> bool:
        return tool.is_approval_needed(name) or (self.wants_approval and tool.has(name))

    def _record(self, tool: str, arguments: str, outcome: str) -> None:
        if self._boxes.audit is not None:
            self._boxes.audit.record(tool, arguments, outcome, response=self._response_id)


class _Approved:
    """A call that was approved, as the tool that the log runs."""

    def __init__(self, tool: McpTool, request: Json) -> None:
        self._tool = tool
        self._request = request

    @property
    def namespace(self) -> ToolNamespace:
        return self._tool.namespace

    async def run(self, name: str, arguments: str) -> Any:
        return await self._tool.run_approved(self._request)

    async def close(self) -> None:
        """The connection belongs to the tool."""


def _mcp_result(text: str, is_error: bool, details: Mapping[str, Any]) -> ToolResult:
    return ToolResult(text, {"output": None if is_error else text, "error": details.get("error")}, is_error)


def _mcp_error(text: str) -> Json:
    return {"type": "mcp_tool_execution_error", "content": [{"type": "text", "text": text}]}


def _read_domains(filters: object, param: str) -> Domains:
    if filters is None:
        return Domains()
    if not isinstance(filters, dict):
        raise InputError(f"{param} is {str(filters)[:80]!r}; expected an object", param=param)
    lists = [filters.get(key) or [] for key in ("allowed_domains", "blocked_domains")]
    if not all(isinstance(one, list) and all(isinstance(name, str) for name in one) for one in lists):
        raise InputError(f"{param}: expected lists of names of domains", param=param)
    return Domains.read(*lists)


def _text_of(item: Json) -> str:
    content = item.get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part.get("text") or "") for part in parts if isinstance(part, dict))
