"""Code that runs in a kernel of a Jupyter server or kernel gateway, which its operator has made safe.

ossia protects itself here - sizes, times, no trust in what comes back - and nothing else: what the code can reach is
what the kernel can reach. A kernel is started for each conversation and ended with it.

Sources  Jupyter Server's REST API (/api/kernels) and WebSocket (/api/kernels/ID/channels); "Messaging in Jupyter" 5.3.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import datetime
import json
import re
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit, urlunsplit

from ossia.errors import ConfigError, InputError, NotFoundError, UnavailableError
from ossia.tools.sandbox.execution import Execution, Output, SandboxFile, Status
from ossia.tools.sandbox.inside.recording import Recording
from ossia.tools.sandbox.limits import Limits
from ossia.tools.sandbox.process import split_path

_REST_S = 30.0
_GRACE_S = 3.0
_MAX_BODY_BYTES = 1 << 20
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_MARK = "ossia-answer:"
# Where there may be no /mnt/data, the nearest to it.
_PREPARE = """\
import os as _os, tempfile as _tempfile
try:
    _os.makedirs("/mnt/data", exist_ok=True)
    _os.chdir("/mnt/data")
except OSError:
    _os.chdir(_tempfile.mkdtemp())
print("ossia-answer:" + _os.getcwd())
"""
_LIST = """\
import json as _json, os as _os
_found = []
for _at, _, _names in _os.walk({root!r}):
    for _name in _names:
        _path = _os.path.join(_at, _name)
        if _os.path.isfile(_path) and not _os.path.islink(_path) and len(_found) < 10000:
            _info = _os.stat(_path)
            _found.append([_os.path.relpath(_path, {root!r}), _info.st_size, _info.st_mtime])
print("ossia-answer:" + _json.dumps(sorted(_found)))
"""
_READ = """\
import base64 as _base64, os as _os
_path = _os.path.join({root!r}, {path!r})
if not _os.path.isfile(_path):
    print("ossia-answer:missing")
elif _os.path.getsize(_path) > {most}:
    print("ossia-answer:large")
else:
    print("ossia-answer:=" + _base64.b64encode(open(_path, "rb").read()).decode())
"""
_WRITE = """\
import base64 as _base64, os as _os
_path = _os.path.join({root!r}, {path!r})
_os.makedirs(_os.path.dirname(_path), exist_ok=True)
with open(_path, "wb") as _file:
    _file.write(_base64.b64decode({data!r}))
print("ossia-answer:done")
"""


@dataclass(frozen=True)
class JupyterServer:
    """Where a server listens, and its key."""

    # Without a slash at the end.
    url: str
    token: str

    tier = "jupyter"

    @classmethod
    def parse(cls, text: str) -> JupyterServer:
        """From a URL that may carry `?token=`. Raises ConfigError."""
        parts = urlsplit(text)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(
                f"{text!r} is no address of a Jupyter server; expected one such as http://host:8888?token=..."
            )
        token = parse_qs(parts.query).get("token", [""])[0]
        return cls(urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/"), "", "")), token)

    async def probe(self) -> str:
        """Whether it answers, in words."""
        try:
            found = await self.ask("GET", "/api")
        except UnavailableError as error:
            return error.message
        return f"works: Jupyter {str(found.get('version', ''))[:40]} at {self.url}; what protects is up to its operator"

    async def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One REST call. Raises UnavailableError."""
        return await asyncio.to_thread(self._ask, method, path, body)

    def _ask(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, method=method, headers=self.headers)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            # The operator's own address: no proxy is asked, and no redirect followed with the key.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
            with opener.open(request, timeout=_REST_S) as response:
                data = response.read(_MAX_BODY_BYTES)
        except urllib.error.HTTPError as error:
            raise UnavailableError(
                f"the Jupyter server at {self.url} answered {error.code} to {method} {path}"
            ) from None
        except (OSError, ValueError) as error:
            raise UnavailableError(f"the Jupyter server at {self.url} cannot be reached: {error}") from None
        try:
            found = json.loads(data) if data else {}
        except (ValueError, RecursionError):
            raise UnavailableError(f"what answers at {self.url} is no Jupyter server") from None
        return found if isinstance(found, dict) else {}

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"token {self.token}"} if self.token else {}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


class JupyterSandbox:
    """One kernel of a server."""

    tier = "jupyter"

    def __init__(self, server: JupyterServer, limits: Limits, kernel: str, socket: Any) -> None:
        self._server = server
        self._limits = limits
        self._kernel = kernel
        self._socket = socket
        self._session = uuid.uuid4().hex
        self._root = "/mnt/data"
        self._is_alive = True
        self._lock = asyncio.Lock()

    @classmethod
    async def start(cls, server: JupyterServer, limits: Limits) -> JupyterSandbox:
        """Start a kernel. Raises UnavailableError; being cancelled, it ends what the server has started."""
        # Part of the web server's own stack, and slow to import.
        from websockets.asyncio.client import connect
        from websockets.exceptions import WebSocketException

        asking = asyncio.create_task(server.ask("POST", "/api/kernels", {}))
        try:
            kernel = _kernel(server, await asyncio.shield(asking))
            address = f"ws{server.url.removeprefix('http')}/api/kernels/{kernel}/channels"
            socket = await connect(
                address, additional_headers=server.headers, max_size=64 << 20, open_timeout=_REST_S, proxy=None
            )
        except BaseException as error:
            await asyncio.shield(_discard(server, asking))
            if isinstance(error, OSError | WebSocketException | TimeoutError):
                raise UnavailableError(f"the kernel at {server.url} cannot be talked to: {error}") from None
            raise
        sandbox = cls(server, limits, kernel, socket)
        try:
            sandbox._root = await sandbox._helper(_PREPARE)
        except BaseException:
            await sandbox.close()
            raise
        return sandbox

    @property
    def is_alive(self) -> bool:
        return self._is_alive

    async def execute(self, code: str, timeout_s: float) -> Execution:
        async with self._lock:
            return await self._execute(code, timeout_s, is_silent=False)

    async def list_files(self) -> list[SandboxFile]:
        try:
            found = json.loads(await self._helper(_LIST.format(root=self._root)))
            return [SandboxFile(str(path), int(size), float(modified)) for path, size, modified in found]
        except (ValueError, TypeError, RecursionError):
            raise UnavailableError("the kernel did not list its files") from None

    async def read_file(self, path: str) -> bytes:
        name = "/".join(split_path(path))
        most = min(self._limits.data_bytes, self._limits.output_bytes * 3 // 8)
        answer = await self._helper(_READ.format(root=self._root, path=name, most=most))
        if answer == "missing":
            raise NotFoundError(f"/mnt/data/{name} does not exist")
        if answer == "large":
            raise InputError(f"/mnt/data/{name} is larger than the {most} bytes that can be fetched from a kernel")
        try:
            return base64.b64decode(answer.removeprefix("="), validate=True)
        except (ValueError, binascii.Error):
            raise UnavailableError("the kernel did not hand out the file") from None

    async def write_file(self, path: str, data: bytes) -> None:
        name = "/".join(split_path(path))
        encoded = base64.b64encode(data).decode()
        if await self._helper(_WRITE.format(root=self._root, path=name, data=encoded)) != "done":
            raise UnavailableError(f"the kernel did not take /mnt/data/{name}")

    async def close(self) -> None:
        if self._is_alive:
            self._is_alive = False
            await asyncio.shield(self._end())

    async def _end(self) -> None:
        with contextlib.suppress(Exception):
            await self._socket.close()
        with contextlib.suppress(UnavailableError):
            await self._server.ask("DELETE", f"/api/kernels/{self._kernel}")

    # Messages --------------------------------------------------------------------------------------------------------

    async def _helper(self, code: str) -> str:
        """What a piece of our own code answers."""
        async with self._lock:
            execution = await self._execute(code, _REST_S, is_silent=True)
        printed = "".join(one.text for one in execution.outputs if one.kind == "stream")
        _, mark, answer = printed.rpartition(_MARK)
        if not mark:
            raise UnavailableError(f"the kernel did not answer: {execution.status}")
        return answer.strip()

    async def _execute(self, code: str, timeout_s: float, is_silent: bool) -> Execution:
        if not self._is_alive:
            raise UnavailableError("the kernel has ended")
        loop = asyncio.get_running_loop()
        started = loop.time()
        number = uuid.uuid4().hex
        recording = Recording(self._limits.output_bytes, self._limits.display_bytes)
        bundles: list[dict[str, bytes]] = []
        collect = loop.create_task(self._collect(number, recording, bundles))
        status: Status = "ok"
        is_restarted = False
        try:
            await self._socket.send(json.dumps(self._request(number, code, is_silent)))
            done, _ = await asyncio.wait([collect], timeout=timeout_s)
            if not done:
                status = "timeout"
                is_restarted = not await self._interrupt(collect)
            elif (ended := await collect) != "ok":
                status = ended
                is_restarted = ended in ("died", "gone")
        except asyncio.CancelledError:
            await asyncio.shield(self._interrupt(collect))
            raise
        # Whatever the socket raises: the connection is gone, and the kernel with it.
        except Exception:
            await self.close()
            status, is_restarted = "gone", True
        finally:
            collect.cancel()
        if status == "gone":
            await self.close()
        parts, num_dropped = recording.parts()
        outputs = tuple(
            Output("display", forms=bundles[int(data)])
            if kind == "display"
            else Output(kind, data.decode("utf-8", "replace"))  # type: ignore[arg-type]
            for kind, data in parts
        )
        return Execution(status, outputs, is_restarted, num_dropped_bytes=num_dropped, wall_s=loop.time() - started,
                         num_dropped_displays=recording.num_displays_dropped)  # fmt: skip

    def _request(self, number: str, code: str, is_silent: bool) -> dict[str, Any]:
        now = datetime.datetime.now(datetime.UTC).isoformat()
        header = {"msg_id": number, "username": "ossia", "session": self._session, "date": now,
                  "msg_type": "execute_request", "version": "5.3"}  # fmt: skip
        content = {"code": code, "silent": False, "store_history": not is_silent, "user_expressions": {},
                   "allow_stdin": False, "stop_on_error": True}  # fmt: skip
        return {"header": header, "parent_header": {}, "metadata": {}, "content": content, "channel": "shell",
                "buffers": []}  # fmt: skip

    async def _collect(self, number: str, recording: Recording, bundles: list[dict[str, bytes]]) -> Status:
        """Read until the call is over. The answer on the shell channel and "idle" come in either order."""
        ended: Status | None = None
        is_idle = False
        left = self._limits.display_bytes
        while ended is None or not is_idle:
            message = _message(await self._socket.recv())
            content = message.get("content")
            if not isinstance(content, dict):
                continue
            kind = message.get("msg_type") or _inner(message, "header", "msg_type")
            if kind == "status" and content.get("execution_state") in ("restarting", "dead"):
                return "died"
            if _inner(message, "parent_header", "msg_id") != number:
                continue
            if kind == "stream":
                recording.print(str(content.get("text", "")).encode("utf-8", "replace"))
            elif kind in ("execute_result", "display_data"):
                forms = _forms(content.get("data"))
                left -= sum(map(len, forms.values()))
                if left >= 0:
                    bundles.append(forms)
                    recording.show("display", str(len(bundles) - 1).encode())
                else:
                    recording.num_displays_dropped += 1
            elif kind == "error":
                lines = content.get("traceback")
                text = "\n".join(map(str, lines)) if isinstance(lines, list) else str(content.get("evalue", ""))
                recording.show("error", _ANSI.sub("", text).encode("utf-8", "replace"))
            elif kind == "execute_reply":
                ended = "ok" if content.get("status") == "ok" else "error"
            elif kind == "status" and content.get("execution_state") == "idle":
                is_idle = True
        return ended

    async def _interrupt(self, collect: asyncio.Task[Status]) -> bool:
        """Stop what runs; whether the state was kept. A kernel that does not yield is restarted."""
        kernel = f"/api/kernels/{quote(self._kernel)}"
        try:
            await self._server.ask("POST", f"{kernel}/interrupt")
            done, _ = await asyncio.wait([collect], timeout=_GRACE_S)
            if done:
                return True
            await self._server.ask("POST", f"{kernel}/restart")
        except UnavailableError:
            await self.close()
        return False


def _kernel(server: JupyterServer, answer: dict[str, Any]) -> str:
    """The id of the kernel that was started. Raises UnavailableError."""
    kernel = answer.get("id")
    if not isinstance(kernel, str) or not re.fullmatch(r"[A-Za-z0-9-]{1,64}", kernel):
        raise UnavailableError(f"the Jupyter server at {server.url} started no kernel")
    return kernel


async def _discard(server: JupyterServer, asking: asyncio.Task[dict[str, Any]]) -> None:
    """End the kernel that a server was asked for, if it started one."""
    with contextlib.suppress(UnavailableError):
        await server.ask("DELETE", f"/api/kernels/{_kernel(server, await asking)}")


def _message(data: str | bytes) -> dict[str, Any]:
    try:
        message = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}


def _inner(message: dict[str, Any], part: str, name: str) -> Any:
    inner = message.get(part)
    return inner.get(name) if isinstance(inner, dict) else None


def _forms(data: Any) -> dict[str, bytes]:
    forms: dict[str, bytes] = {}
    for mime, form in data.items() if isinstance(data, dict) else ():
        if isinstance(form, list):
            form = "".join(map(str, form))
        text = form if isinstance(form, str) else json.dumps(form)
        if mime.startswith("image/") and mime != "image/svg+xml":
            with contextlib.suppress(ValueError, binascii.Error):
                forms[mime] = base64.b64decode(text)
        else:
            forms[str(mime)] = text.encode("utf-8", "replace")
    forms.setdefault("text/plain", b"")
    return forms
