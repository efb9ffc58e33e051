"""Which URLs may be asked for, and which addresses may be connected to: what is not known to be public is refused.

    url = read_url("https://example.com/a")     scheme, host and port are allowed, the host has no hidden meaning
    addresses = await guard.resolve(url)        every address of the host is public
    ...                                         the connection goes to one of these, and the name is not asked for again

The only way past is `Guard(allowed=...)`, addresses with ports that an operator or a test names; nothing that a model
or a page says gets there.

Sources  IANA's special-purpose address registries; WHATWG URL on what a host may hide (numbers, other scripts).
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple
from urllib.parse import quote, urlsplit

import idna

from ossia.errors import OssiaError

PORTS = frozenset({80, 443})
_MAX_URL_CHARS = 8192
_DEFAULT_PORTS = {"http": 80, "https": 443}

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class RefusedError(OssiaError):
    """The URL, or the address that it leads to, is not one that may be reached."""

    status = 403
    code = "refused"


class Url(NamedTuple):
    """A URL that may be asked for."""

    scheme: str
    # As it is asked for, resolved and shown to the server: ASCII, small letters; IPv6 without brackets.
    host: str
    port: int
    # Path and query, escaped.
    target: str

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def origin(self) -> str:
        return f"{self.scheme}://{self.authority}"


def read_url(text: str, *, ports: Iterable[int] = PORTS) -> Url:
    """Raises RefusedError, saying why."""
    if len(text) > _MAX_URL_CHARS:
        raise RefusedError(f"the URL has {len(text)} characters; at most {_MAX_URL_CHARS} are allowed")
    if re.search(r"[\x00-\x20\x7f-\xa0\\\ud800-\udfff]", text):
        raise RefusedError("the URL has blanks, backslashes or control characters in it")
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise RefusedError(f"not a URL: {error}") from None
    scheme = parts.scheme.lower()
    if scheme not in _DEFAULT_PORTS:
        raise RefusedError(f"only http and https can be opened, not {scheme or 'a URL without a scheme'!r}")
    if "@" in parts.netloc:
        raise RefusedError("a URL with a user name or password in it is not opened")
    host = _host(parts.netloc.removesuffix(f":{parts.netloc.rpartition(':')[2]}") if port is not None else parts.netloc)
    port = _DEFAULT_PORTS[scheme] if port is None else port
    if port not in frozenset(ports):
        allowed = ", ".join(str(one) for one in sorted(ports))
        raise RefusedError(f"port {port} is not one that is opened ({allowed})")
    path = quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    query = quote(parts.query, safe="/%:@!$&'()*+,;=~-._?[]|{}^`")
    return Url(scheme, host, port, path + (f"?{query}" if query else ""))


def _host(text: str) -> str:
    """The host as it will be asked for. Raises RefusedError for numbers in disguise and names of this network."""
    text = text.removesuffix(":")
    if text.startswith("["):
        try:
            address = ipaddress.IPv6Address(text.removeprefix("[").removesuffix("]"))
        except ValueError:
            raise RefusedError(f"{text} is not an address") from None
        if address.scope_id or not text.endswith("]"):
            raise RefusedError(f"{text} is not an address that can be opened")
        return str(address)
    try:
        # What browsers do with other scripts; full-width dots and digits become plain ones here.
        host = idna.encode(text, uts46=True).decode("ascii") if not text.isascii() else text.lower()
    except (idna.IDNAError, UnicodeError):
        raise RefusedError(f"{text!r} is not the name of a host") from None
    host = host.removesuffix(".").lower()
    if not re.fullmatch(r"(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", host):
        raise RefusedError(f"{text[:100]!r} is not the name of a host")
    if len(host) > 253:
        raise RefusedError("the name of the host is too long")
    last = host.rpartition(".")[2]
    if last.isdigit() or re.fullmatch(r"0x[0-9a-f]*", last):
        # A number is four plain ones, or somebody hides an address.
        if not re.fullmatch(r"(?:(?:0|[1-9]\d{0,2})\.){3}(?:0|[1-9]\d{0,2})", host) or not text.isascii():
            raise RefusedError(f"{text!r} is an address in disguise")
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise RefusedError(f"{text!r} is not an address") from None
    if last in _LOCAL_NAMES or "." not in host:
        raise RefusedError(f"{host!r} is a name of this machine or network, not of the public one")
    return host


# Top-level names that never belong to the public network.
_LOCAL_NAMES = frozenset({
    "localhost", "local", "localdomain", "internal", "intranet", "lan", "home", "corp", "private", "arpa",
    "invalid", "test", "example", "onion", "alt",
})  # fmt: skip


class Guard:
    """Turns names into addresses that may be connected to."""

    def __init__(self, *, allowed: Iterable[tuple[str, int]] = ()) -> None:
        """``allowed`` are addresses, with their ports, that may be reached although they are not public."""
        self._allowed = frozenset((ipaddress.ip_address(host), port) for host, port in allowed)

    @property
    def ports(self) -> frozenset[int]:
        return PORTS | {port for _, port in self._allowed}

    async def resolve(self, url: Url) -> list[Address]:
        """All addresses of the host. Raises RefusedError if one of them may not be reached, or there is none."""
        try:
            found = [ipaddress.ip_address(url.host)]
        except ValueError:
            found = await self.look_up(url.host, url.port)
        for address in found:
            self.check(address, url)
        return found

    async def look_up(self, host: str, port: int) -> list[Address]:
        """The addresses that the system's resolver knows. Raises RefusedError for a name that it does not know."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
        except (OSError, UnicodeError):
            raise RefusedError(f"the host {host!r} is not known") from None
        # A scope in an address would be one of this network.
        addresses = [ipaddress.ip_address(str(entry[4][0])) for entry in found]
        if not addresses:
            raise RefusedError(f"the host {host!r} has no address")
        return list(dict.fromkeys(addresses))

    def check(self, address: Address, url: Url) -> None:
        """Raises RefusedError for an address that is not public, or is this machine's."""
        if (address, url.port) not in self._allowed and (fault := why_not(address)):
            raise RefusedError(f"{url.host!r} leads to {fault}")


def check_literal(url: Url) -> None:
    """Raises RefusedError if the host is written as an address, and not a public one."""
    try:
        address = ipaddress.ip_address(url.host)
    except ValueError:
        return
    Guard().check(address, url)


def _networks(text: str) -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    return [ipaddress.ip_network(one) for one in text.split()]


def why_not(address: Address) -> str:
    """Why an address may not be connected to for a stranger, as words behind "leads to"; "" if it may."""
    if not is_public(address):
        return f"the address {address}, which is not a public one"
    # Its public address is not the public network: what listens there may be meant for neighbours alone.
    return f"the address {address}, which is this machine's" if _is_own(address) else ""


def _is_own(address: Address) -> bool:
    """Whether what is sent to an address would come from it. Nothing is sent: a datagram socket only takes a route."""
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((str(address), 9))
            return ipaddress.ip_address(probe.getsockname()[0]) == address
    # Without a way there, a connection fails as well.
    except OSError:
        return False


# Not left to `is_global` alone: its ranges have changed between releases of Python.
_NOT_PUBLIC = _networks(
    # This network, private, carrier-grade, loopback, link-local with metadata services, protocol assignments,
    # documentation, 6to4 relays, benchmarks, multicast, reserved, broadcast.
    "0.0.0.0/8 10.0.0.0/8 100.64.0.0/10 127.0.0.0/8 169.254.0.0/16 172.16.0.0/12 192.0.0.0/24 192.0.2.0/24 "
    "192.88.99.0/24 192.168.0.0/16 198.18.0.0/15 198.51.100.0/24 203.0.113.0/24 224.0.0.0/4 240.0.0.0/4 "
    # The host service of a cloud, on a public-looking address.
    "168.63.129.16/32 "
    # Protocol assignments with Teredo and ORCHID, documentation, 6to4.
    "2001::/23 2001:db8::/32 2002::/16 3fff::/20"
)
# All that was ever given out for the public; mapped, compatible, NAT64, local and multicast addresses lie elsewhere.
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")


def is_public(address: Address) -> bool:
    """Whether an address is one of the public network."""
    if isinstance(address, ipaddress.IPv6Address):
        if address not in _PUBLIC_V6 or address.scope_id:
            return False
        # An IPv4 address within, by ISATAP.
        if (int(address) >> 32) & 0xFFFF_FFFF in (0x0000_5EFE, 0x0200_5EFE):
            return False
    if not address.is_global or address.is_multicast or address.is_reserved or address.is_unspecified:
        return False
    return not any(address.version == network.version and address in network for network in _NOT_PUBLIC)


# Domains -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Domains:
    """Which domains may be opened; a domain stands for those below it too."""

    # Empty for all.
    allowed: tuple[str, ...] = ()
    blocked: tuple[str, ...] = ()

    @classmethod
    def read(cls, allowed: Iterable[str] = (), blocked: Iterable[str] = ()) -> Domains:
        """From names as people write them: `Example.com`, `https://example.com/`, `*.example.com`, `.example.com`."""
        return cls(*(tuple(name for one in names if (name := _domain(one))) for names in (allowed, blocked)))

    def check(self, host: str) -> None:
        """Raises RefusedError for a host outside."""
        if any(_is_below(host, domain) for domain in self.blocked):
            raise RefusedError(f"{host!r} is blocked here")
        if self.allowed and not any(_is_below(host, domain) for domain in self.allowed):
            raise RefusedError(f"{host!r} is not among the domains allowed here: {', '.join(self.allowed[:20])}")

    def has(self, host: str) -> bool:
        try:
            self.check(host)
        except RefusedError:
            return False
        return True

    def within(self, other: Domains) -> Domains:
        """What both allow."""
        if not self.allowed or not other.allowed:
            allowed = self.allowed or other.allowed
        else:
            # Of two domains, one below the other, the lower is what both allow; if there is none, nothing is.
            both = [a for a in self.allowed if any(_is_below(a, b) for b in other.allowed)]
            both += [b for b in other.allowed if any(_is_below(b, a) for a in self.allowed)]
            allowed = tuple(dict.fromkeys(both)) or ("invalid",)
        return Domains(allowed, tuple(dict.fromkeys(self.blocked + other.blocked)))


def _domain(text: str) -> str:
    text = text.strip().lower()
    text = urlsplit(text).netloc if "://" in text else text.partition("/")[0]
    text = text.removeprefix("*").strip(".")
    try:
        return text if text.isascii() else idna.encode(text, uts46=True).decode("ascii")
    except (idna.IDNAError, UnicodeError):
        return text


def _is_below(host: str, domain: str) -> bool:
    return host == domain or host.endswith(f".{domain}")
