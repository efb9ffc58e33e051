"""HTTP for the browser tool: a GET of what a model asked for, over connections to checked addresses alone.

    fetched = await Fetcher(guard).get("https://example.com/a", domains)

Each hop of a redirect is read, matched with the allowed domains, resolved and checked anew; the connection then goes to
one of the checked addresses, so no second look-up of the name can lead elsewhere, while Host and SNI keep the name.
There is one deadline for all of it, a bound on what is read and on what it unpacks to, no proxy, no cookie, no cache.

`JsonClient` is the other half: calls of a search service whose address the operator has set, which may lie anywhere.
It follows no redirect.
"""

from __future__ import annotations

import asyncio
import json
import re
import ssl
import zlib
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode, urljoin

import h11

from ossia.errors import UnavailableError
from ossia.tools.web.guard import Domains, Guard, RefusedError, Url, read_url
from ossia.tools.web.page import clean, merge_space, shorten

# By this name robots.txt knows us.
AGENT = "ossia"
_USER_AGENT = "Mozilla/5.0 (compatible; ossia/0.1)"
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_HEADER_BYTES = 64 << 10
_READ_BYTES = 64 << 10
# Each piece of an answer takes the processor's time, however small it is: so many are read of one, the event loop has
# its turn after so many, and so many members may stand in a gzip file.
_MAX_PIECES = 20_000
_PIECES_AT_ONCE = 256
_MAX_MEMBERS = 1_000
_CONNECT_S = 5.0


class FetchError(UnavailableError):
    """The server did not give what was asked for."""


@dataclass(frozen=True)
class FetchLimits:
    """What one page may take."""

    # Seconds for all of it: names, redirects, the body.
    total_s: float = 20.0
    # Bytes of the body, unpacked; more is cut off.
    max_bytes: int = 8 << 20
    # Times that a server may lead on.
    max_redirects: int = 5


class Fetched(NamedTuple):
    """What came of a GET."""

    # Where the redirects led.
    url: str
    status: int
    # Small letters, without parameters; "" if the server named none.
    content_type: str
    charset: str
    body: bytes
    is_cut: bool
    # Each hop, and the address that was connected to.
    hops: tuple[tuple[str, str], ...]


class _Answer(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes
    is_cut: bool


class Fetcher:
    """Fetches pages. Holds nothing but settings; may be shared."""

    def __init__(
        self, guard: Guard | None = None, limits: FetchLimits | None = None, *, tls: ssl.SSLContext | None = None
    ) -> None:
        self._guard = guard or Guard()
        self._limits = limits or FetchLimits()
        self._tls = tls

    async def get(
        self,
        url: str,
        domains: Domains,
        limits: FetchLimits | None = None,
        *,
        before: Callable[[Url], Awaitable[None]] | None = None,
    ) -> Fetched:
        """``before`` is asked before each hop, and may raise.

        Raises RefusedError for what may not be reached, FetchError for what does not answer as it should.
        """
        limits = limits or self._limits
        try:
            async with asyncio.timeout(limits.total_s):
                return await self._follow(url, domains, limits, before)
        except TimeoutError:
            raise FetchError(f"no complete answer within {limits.total_s:g} s") from None

    def read(self, url: str, domains: Domains) -> Url:
        """A URL that may be asked for, before its name is looked up. Raises RefusedError."""
        read = read_url(url, ports=self._guard.ports)
        domains.check(read.host)
        return read

    async def _follow(
        self, url: str, domains: Domains, limits: FetchLimits, before: Callable[[Url], Awaitable[None]] | None
    ) -> Fetched:
        hops: list[tuple[str, str]] = []
        for _ in range(limits.max_redirects + 1):
            read = self.read(url, domains)
            if before is not None:
                await before(read)
            answer, address = await self._ask(read, limits)
            hops.append((str(read), address))
            location = answer.headers.get("location")
            if answer.status not in _REDIRECTS or not location:
                kind, charset = _content_type(answer.headers.get("content-type", ""))
                return Fetched(str(read), answer.status, kind, charset, answer.body, answer.is_cut, tuple(hops))
            try:
                url = urljoin(str(read), quote(location, safe="/%:@!$&'()*+,;=~-._?#[]"))
            except ValueError:
                raise FetchError("the server leads on to what is not a URL") from None
        raise FetchError(f"the server led on more than {limits.max_redirects} times")

    async def _ask(self, url: Url, limits: FetchLimits) -> tuple[_Answer, str]:
        addresses = await self._guard.resolve(url)
        tls = self._tls or _default_tls() if url.scheme == "https" else None
        reader = writer = None
        for i, address in enumerate(addresses):
            try:
                reader, writer = await _connect(str(address), url.port, tls, url.host)
                break
            except FetchError:
                if i == len(addresses) - 1:
                    raise
        assert reader is not None and writer is not None
        try:
            headers = {
                "Host": url.authority,
                "User-Agent": _USER_AGENT,
                "Accept": "text/html,application/xhtml+xml,text/plain,application/pdf;q=0.9,*/*;q=0.5",
                "Accept-Language": "en,*;q=0.5",
                "Accept-Encoding": "gzip, deflate",
                "Connection": "close",
            }
            return await _exchange(reader, writer, "GET", url.target, headers, b"", limits.max_bytes), str(address)
        finally:
            # Not closed politely: a peer that does not answer could hold this up.
            writer.transport.abort()


# A search service ----------------------------------------------------------------------------------------------------


class JsonClient:
    """Calls one service that the operator has named, with JSON or a query, and reads JSON."""

    def __init__(
        self, base_url: str, headers: Mapping[str, str], *, name: str, total_s: float = 20.0, max_bytes: int = 16 << 20
    ) -> None:
        """Raises RefusedError for a base that is no http(s) URL. ``headers`` may hold a key; errors never do."""
        match = re.fullmatch(r"(https?)://(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?(/[!-~]*)?", base_url)
        if not match:
            raise RefusedError(f"{base_url!r} is not the address of a service; expected one such as https://host/path")
        self._scheme, host, port, path = match.groups()
        self._host, self._port = host.strip("[]"), int(port or (443 if self._scheme == "https" else 80))
        self._authority = f"{host}:{port}" if port else host
        self._path = (path or "").rstrip("/")
        self._headers = dict(headers)
        self._name = name
        self._total_s, self._max_bytes = total_s, max_bytes

    async def get(self, path: str, query: Mapping[str, str]) -> Any:
        return await self._call("GET", f"{path}?{urlencode(query)}", b"")

    async def post(self, path: str, body: Mapping[str, Any]) -> Any:
        return await self._call("POST", path, json.dumps(body).encode())

    async def _call(self, method: str, target: str, body: bytes) -> Any:
        """Raises FetchError, with what the service said and never with what it was told."""
        try:
            async with asyncio.timeout(self._total_s):
                answer = await self._ask(method, self._path + target, body)
                # Once more where the service was busy with something else.
                if answer.status in (502, 503, 504):
                    await asyncio.sleep(0.5)
                    answer = await self._ask(method, self._path + target, body)
        except TimeoutError:
            raise FetchError(f"{self._name} gave no answer within {self._total_s:g} s") from None
        text = answer.body.decode("utf-8", "replace")
        if answer.status != 200:
            raise FetchError(f"{self._name} answered with status {answer.status}: {self._said(text)}")
        if answer.is_cut:
            raise FetchError(
                f"{self._name} answered with more than {self._max_bytes} bytes, or in more than {_MAX_PIECES} pieces"
            )
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise FetchError(f"{self._name} did not answer in JSON: {self._said(text)}") from None

    async def _ask(self, method: str, target: str, body: bytes) -> _Answer:
        tls = _default_tls() if self._scheme == "https" else None
        try:
            reader, writer = await _connect(self._host, self._port, tls, self._host)
        except FetchError as error:
            raise FetchError(f"{self._name}: {error.message}") from None
        try:
            headers = {
                "Host": self._authority,
                "User-Agent": _USER_AGENT,
                "Accept": "application/json",
                "Accept-Encoding": "gzip",
                "Connection": "close",
                **({"Content-Type": "application/json", "Content-Length": str(len(body))} if body else {}),
                **self._headers,
            }
            return await _exchange(reader, writer, method, target, headers, body, self._max_bytes)
        finally:
            writer.transport.abort()

    def _said(self, text: str) -> str:
        for value in self._headers.values():
            for secret in (value, value.removeprefix("Bearer ")):
                text = text.replace(secret, "***") if secret else text
        return shorten(merge_space(clean(text)), 300)


# Connections ---------------------------------------------------------------------------------------------------------


def _default_tls() -> ssl.SSLContext:
    tls = ssl.create_default_context()
    tls.set_alpn_protocols(["http/1.1"])
    return tls


async def _connect(
    address: str, port: int, tls: ssl.SSLContext | None, name: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """To an address; a name is looked up only where the operator gave one."""
    try:
        async with asyncio.timeout(_CONNECT_S):
            return await asyncio.open_connection(
                address, port, ssl=tls, server_hostname=name if tls else None, limit=_READ_BYTES
            )
    except TimeoutError:
        raise FetchError(f"no connection within {_CONNECT_S:g} s") from None
    except ssl.SSLCertVerificationError as error:
        raise FetchError(f"the certificate is not valid: {error.verify_message}") from None
    except ssl.SSLError as error:
        raise FetchError(f"no secure connection: {error.reason or 'the handshake failed'}") from None
    except OSError as error:
        raise FetchError(f"no connection: {error.strerror or type(error).__name__}") from None


async def _exchange(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    method: str,
    target: str,
    headers: Mapping[str, str],
    body: bytes,
    max_bytes: int,
) -> _Answer:
    """One request and its answer. Raises FetchError."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEADER_BYTES)
    try:
        request = h11.Request(method=method, target=target, headers=list(headers.items()))
        sent = connection.send(request) or b""
        if body:
            sent += connection.send(h11.Data(data=body)) or b""
        sent += connection.send(h11.EndOfMessage()) or b""
        writer.write(sent)
        await writer.drain()
        return await _receive(connection, reader, max_bytes)
    except h11.LocalProtocolError:
        raise FetchError("the URL cannot be asked for") from None
    except h11.RemoteProtocolError as error:
        raise FetchError(f"the answer is not proper HTTP: {shorten(clean(str(error)), 100)}") from None
    except ssl.SSLError as error:
        raise FetchError(f"the secure connection broke: {error.reason or 'an error'}") from None
    except OSError as error:
        raise FetchError(f"the connection broke: {error.strerror or type(error).__name__}") from None


async def _receive(connection: h11.Connection, reader: asyncio.StreamReader, max_bytes: int) -> _Answer:
    status = 0
    headers: dict[str, str] = {}
    unpacker = None
    body = bytearray()
    num_read = num_pieces = 0
    while True:
        event = connection.next_event()
        num_pieces += 1
        if num_pieces % _PIECES_AT_ONCE == 0:
            await asyncio.sleep(0)
        if num_pieces > _MAX_PIECES or num_read > max_bytes + (1 << 20):
            return _Answer(status, headers, bytes(body), True)
        if event is h11.NEED_DATA:
            data = await reader.read(_READ_BYTES)
            num_read += len(data)
            connection.receive_data(data)
        elif isinstance(event, h11.Response):
            status = event.status_code
            headers = _headers(event.headers)
            # What leads elsewhere needs no body.
            if status in _REDIRECTS and headers.get("location"):
                return _Answer(status, headers, b"", False)
            unpacker = _Unpacker(headers.get("content-encoding", ""))
        elif isinstance(event, h11.Data) and unpacker is not None:
            body += unpacker.feed(bytes(event.data), max_bytes - len(body) + 1)
            if len(body) > max_bytes:
                return _Answer(status, headers, bytes(body[:max_bytes]), True)
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            return _Answer(status, headers, bytes(body), False)


def _headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in raw:
        try:
            text = value.decode("utf-8")
        except UnicodeDecodeError:
            text = value.decode("latin-1")
        headers.setdefault(name.decode("ascii").lower(), text.strip())
    return headers


class _Unpacker:
    """Undoes a content encoding, never making more than there is room for."""

    def __init__(self, encoding: str) -> None:
        encoding = encoding.strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise FetchError(f"the answer is packed as {encoding[:40]!r}, which was not asked for")
        self._kind = "" if encoding == "identity" else encoding.removeprefix("x-")
        self._inflater: Any = None
        self._num_members = 0

    def feed(self, data: bytes, room: int) -> bytes:
        if not self._kind:
            return data[:room]
        out = bytearray()
        try:
            while data and len(out) < room:
                if self._inflater is None or self._inflater.eof:
                    self._num_members += 1
                    if self._num_members > _MAX_MEMBERS:
                        raise FetchError(f"the answer is packed in more than {_MAX_MEMBERS} pieces")
                    # A gzip file may have several members; deflate comes with and without zlib's header.
                    has_header = self._kind == "gzip" or data[0] & 0x0F == 8
                    self._inflater = zlib.decompressobj(31 if self._kind == "gzip" else 15 if has_header else -15)
                out += self._inflater.decompress(data, room - len(out))
                data = self._inflater.unused_data if self._inflater.eof else self._inflater.unconsumed_tail
                if self._inflater.eof and self._kind == "deflate":
                    break
                if self._inflater.eof and not data.startswith(b"\x1f\x8b"):
                    break
        except zlib.error:
            raise FetchError("the answer is packed in a way that cannot be undone") from None
        return bytes(out)


def _content_type(header: str) -> tuple[str, str]:
    kind, _, parameters = header.partition(";")
    match = re.search(r"charset\s*=\s*[\"']?([A-Za-z0-9_:.-]{1,40})", parameters, re.IGNORECASE)
    return kind.strip().lower(), match[1] if match else ""
