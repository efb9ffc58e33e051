"""A web site on the loopback for the browser's tests: good pages and every kind of bad one, requests counted."""

from __future__ import annotations

import asyncio
import gzip
import ipaddress
import ssl
import threading
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

from ossia.tools.web.guard import Guard, RefusedError

Answer = bytes | Callable[[asyncio.StreamWriter], Any]


def page(body: bytes | str, kind: str = "text/html; charset=utf-8", status: str = "200 OK", **headers: str) -> bytes:
    body = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"Content-Type: {kind}"] if kind else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return f"HTTP/1.1 {status}\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


class Site:
    """Serves ``pages`` by path on a port of its own; other paths are 404."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.pages: dict[str, Answer] = {"/robots.txt": page("", "text/plain", "404 Not Found")}
        # Path of each request, in order; and the whole of the last.
        self.asked: list[str] = []
        self.last = b""
        self._tls = tls
        started = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(started,), daemon=True)
        self._thread.start()
        started.wait(10)

    def _run(self, started: threading.Event) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            server = await asyncio.start_server(self._answer, "127.0.0.1", 0, ssl=self._tls)
            self.port = server.sockets[0].getsockname()[1]
            self._stop = asyncio.Event()
            started.set()
            await self._stop.wait()
            server.close()

        # Its end cancels what is still being answered.
        asyncio.run(serve())

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            for line in head.split(b"\r\n"):
                if line.lower().startswith(b"content-length:"):
                    head += await reader.readexactly(int(line.split(b":")[1]))
            self.last = head
            path = head.split(b" ")[1].decode()
            self.asked.append(path)
            answer = (
                self.pages.get(path)
                or self.pages.get(path.partition("?")[0])
                or page("nothing", status="404 Not Found")
            )
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(writer)
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.close()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self.port}"

    @property
    def address(self) -> tuple[str, int]:
        return "127.0.0.1", self.port

    def named(self, host: str) -> str:
        """The site under a name, for a guard of `Names`."""
        return f"{'https' if self._tls else 'http'}://{host}:{self.port}"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)


class Names(Guard):
    """A guard whose names are known without a resolver, and counted."""

    def __init__(self, names: dict[str, list[str]], *sites: Site, allowed: Sequence[tuple[str, int]] = ()) -> None:
        super().__init__(allowed=[*allowed, *(site.address for site in sites)])
        self.names = names
        self.looked_up: list[str] = []

    async def look_up(self, host, port):
        self.looked_up.append(host)
        if host not in self.names:
            raise RefusedError(f"the host {host!r} is not known")
        return [ipaddress.ip_address(one) for one in self.names[host]]


@contextmanager
def serving(tls: ssl.SSLContext | None = None) -> Iterator[Site]:
    site = Site(tls)
    try:
        yield site
    finally:
        site.stop()


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n<p>begin ")
    while True:
        writer.write(b"<p>more and more" * 4096)
        await writer.drain()


async def slow(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 100000\r\n\r\n")
    while True:
        writer.write(b".")
        await writer.drain()
        await asyncio.sleep(0.02)


async def silent(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


async def many_headers(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    for i in range(90):
        writer.write(b"X-%d: %b\r\n" % (i, b"a" * 8000))
        await writer.drain()
    writer.write(b"\r\nbody")


async def endless_informational(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" * 100)
        await writer.drain()


async def short_body(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 1000\r\n\r\n<p>half")


async def chunked(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nTransfer-Encoding: chunked\r\n\r\n")
    for piece in (b"<p>one ", b"two ", b"three"):
        writer.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        await writer.drain()
    writer.write(b"0\r\n\r\n")


async def crumbs(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"1\r\na\r\n" * 10_000)
        await writer.drain()


async def no_http(writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-OpenSSH_9.2\r\n")


@lru_cache
def gzip_bomb(num_bytes: int) -> bytes:
    packer = zlib.compressobj(9, wbits=31)
    block = b"\0" * (1 << 20)
    return b"".join(packer.compress(block) for _ in range(num_bytes >> 20)) + packer.flush()


def add_bad_pages(site: Site) -> None:
    html = "<title>Hello</title><p>Hello there"
    site.pages |= {
        "/": page(html),
        "/to-a": redirect("/a", "301 Moved Permanently"),
        "/a": page("<title>A</title><p>I am A"),
        "/loop": redirect("/loop"),
        "/ring1": redirect("/ring2"),
        "/ring2": redirect("/ring1", "307 Temporary Redirect"),
        "/to-metadata": redirect("http://169.254.169.254/latest/meta-data/"),
        "/to-loopback": redirect("http://127.0.0.1:22/"),
        "/to-file": redirect("file:///etc/passwd"),
        "/to-data": redirect("data:text/html,hello"),
        "/to-decimal": redirect("http://2130706433/"),
        "/to-user": redirect("http://user:pass@example.com/"),
        "/to-nowhere": b"HTTP/1.1 302 Found\r\nContent-Length: 0\r\n\r\n",
        "/to-bad": redirect("http://[::1"),
        "/to-unicode": redirect("/ü"),
        "/%C3%BC": page("<p>umlaut"),
        "/endless": endless,
        "/slow": slow,
        "/silent": silent,
        "/many-headers": many_headers,
        "/endless-1xx": endless_informational,
        "/short": short_body,
        "/chunked": chunked,
        "/crumbs": crumbs,
        "/no-http": no_http,
        "/gzip": page(gzip.compress(html.encode()), Content_Encoding="gzip"),
        "/two-gzips": page(gzip.compress(b"<p>one") + gzip.compress(b" two"), Content_Encoding="gzip"),
        "/deflate": page(zlib.compress(html.encode()), Content_Encoding="deflate"),
        "/raw-deflate": page(zlib.compress(html.encode())[2:-4], Content_Encoding="deflate"),
        "/bad-gzip": page(b"\x1f\x8b\x08nonsense here", Content_Encoding="gzip"),
        "/many-gzips": page(gzip.compress(b"") * 100_000, Content_Encoding="gzip"),
        "/brotli": page(b"\x0b\x02\x80", Content_Encoding="br"),
        "/bomb": page(gzip_bomb(256 << 20), Content_Encoding="gzip"),
        "/image": page(b"\x89PNG\r\n", "image/png"),
        "/zip": page(b"PK\x03\x04", "application/zip"),
        "/no-type": page(html, ""),
        "/no-type-binary": page(b"\0\1\2", ""),
        "/fake-pdf": page("<p>no pdf", "application/pdf"),
        "/text": page("plain <b>text</b>", "text/plain"),
        "/json": page('{"a": [1, 2]}', "application/json"),
        "/latin": page("<p>caf\u00e9".encode("latin-1"), "text/html; charset=iso-8859-1"),
        "/404": page("gone", status="404 Not Found"),
        "/500": page("broken", status="500 Internal Server Error"),
        "/401": page("<form>Log in</form>", status="401 Unauthorized", WWW_Authenticate="Basic realm=x"),
        "/login-wall": redirect("/login"),
        "/login": page(
            "<title>Sign in</title><form action=/in><label>Name <input name=u></label><button>Sign in</button></form>"
        ),
        "/cookie": page("<p>took", Set_Cookie="a=b"),
        "/empty": page(""),
    }
