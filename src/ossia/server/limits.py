"""Who may ask, how much, and when: keys, rates, request size, admission.

A key is `ossia-` and 32 random bytes; the key file holds only its SHA-256, one to a line, with a name behind it:

    2bb80d537b1da3e38bd30361aa855686bde0eacd7162fef6a25fe97bf527a25b  laptop
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from ossia.errors import AuthError, ConfigError, ForbiddenError, LimitError

_log = logging.getLogger(__name__)

# Callers whose rate is remembered; the one that has not asked for the longest time is forgotten first.
_MAX_CALLERS = 10_000


class Keys:
    """The keys that are known; without any at the start, everybody may ask.

    Those of a file are read again when it has changed: a key that is deleted there is not known any more.
    """

    def __init__(
        self, digests: Sequence[tuple[str, str]] = (), path: Path | None = None, state: tuple[int, ...] = ()
    ) -> None:
        """``digests`` are (SHA-256 in hexadecimal, name), of the file ``path`` as it was in ``state``."""
        self._digests = [(bytes.fromhex(digest), name) for digest, name in digests]
        self._is_needed = bool(digests)
        self._path = path
        self._state = state

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Raises ConfigError if the file cannot be read or is no key file."""
        # Before it is read: what changes meanwhile is read again.
        state = _state(path)
        digests = _read(path)
        if not digests:
            raise ConfigError(f"{path}: the key file holds no key; make one with `ossia serve --new-key NAME`")
        return cls(digests, path, state)

    @staticmethod
    def make(path: Path, name: str) -> str:
        """Add a new key to the file and return it; nothing else ever knows it."""
        key = f"ossia-{secrets.token_urlsafe(32)}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            path.chmod(0o600)
            file.write(f"{_digest(key).hex()}  {' '.join(name.split())}\n")
        return key

    def __bool__(self) -> bool:
        return self._is_needed

    def check(self, authorization: str | None, api_key: str | None = None) -> str | None:
        """The caller's name, None where no key is asked for. Raises AuthError.

        ``authorization`` is the header of OpenAI's clients, ``api_key`` that of Anthropic's.
        """
        if not self._is_needed:
            return None
        self._refresh()
        scheme, _, given = (authorization or "").partition(" ")
        if scheme.lower() != "bearer":
            given = api_key or ""
        if not given:
            raise AuthError("no API key was given; send 'Authorization: Bearer KEY'")
        digest = _digest(given.strip())
        # Every key is compared, in constant time, so that time tells nothing.
        names = [name for known, name in self._digests if hmac.compare_digest(known, digest)]
        if not names:
            raise AuthError("the API key is not known to this server")
        return names[0]

    def _refresh(self) -> None:
        if self._path is None or (state := _state(self._path)) == self._state:
            return
        self._state = state
        try:
            digests = _read(self._path)
        # Half written, perhaps.
        except ConfigError as error:
            _log.warning("%s; the keys stay as they were", error.message)
            return
        self._digests = [(bytes.fromhex(digest), name) for digest, name in digests]
        _log.info("%s was read again: keys of %s", self._path, ", ".join(name for _, name in digests) or "nobody")


def _read(path: Path) -> list[tuple[str, str]]:
    try:
        lines = [line.split(maxsplit=1) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: the key file cannot be read: {error}") from None
    digests = []
    for number, words in enumerate(lines, start=1):
        if not words or words[0].startswith("#"):
            continue
        if len(words[0]) != 64 or not all(letter in "0123456789abcdef" for letter in words[0]):
            raise ConfigError(f"{path}: line {number} is no SHA-256; make a key with `ossia serve --new-key NAME`")
        digests.append((words[0], words[1] if len(words) > 1 else "unnamed"))
    return digests


def _state(path: Path) -> tuple[int, ...]:
    """What changes when a file is written, replaced or removed."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "replace")).digest()


def check_bind(host: str, keys: Keys, *, is_open_allowed: bool) -> None:
    """Raise ConfigError for an address that others reach, without a key, unless it was asked for in so many words."""
    if keys or is_open_allowed or _is_loopback(host):
        return
    raise ConfigError(
        f"host {host!r} lets others reach this server and no key protects it; give --key-file (make a key with "
        "--new-key NAME), bind 127.0.0.1, or say --open-to-all"
    )


def check_page(host: str | None, origin: str | None) -> None:
    """Raise ForbiddenError for what a browser sends on behalf of a page from elsewhere; for servers without keys.

    Such a page may send requests to this machine's own addresses, and even read the answers where its name has been
    made to mean this machine; ``host`` and ``origin`` are the headers that then tell its name.
    """
    if host and not _is_private(f"//{host}"):
        raise ForbiddenError(
            f"this server asks for no key and so answers to names of this machine alone, not to {host[:80]!r}; start "
            "it with --key-file, or ask it by its address"
        )
    if origin and (origin == "null" or (origin.startswith(("http:", "https:")) and not _is_private(origin))):
        raise ForbiddenError(
            f"this server asks for no key and so takes nothing from pages of {origin[:80]!r}; start it with --key-file"
        )


def _is_private(url: str) -> bool:
    """Whether no one else can make a URL's name mean this machine: an address, or a name that nobody can register."""
    try:
        name = urlsplit(url).hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
        return True
    except ValueError:
        return "." not in name or name.endswith((".localhost", ".local", ".internal"))


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class Rates:
    """At most ``per_minute`` requests of one caller within a minute; 0 for no limit."""

    def __init__(self, per_minute: int) -> None:
        self._per_minute = per_minute
        self._recent: OrderedDict[str, deque[float]] = OrderedDict()

    def take(self, caller: str) -> None:
        """Count a request. Raises LimitError."""
        if not self._per_minute:
            return
        now = time.monotonic()
        recent = self._recent.setdefault(caller, deque())
        self._recent.move_to_end(caller)
        if len(self._recent) > _MAX_CALLERS:
            self._recent.popitem(last=False)
        while recent and recent[0] <= now - 60:
            recent.popleft()
        if len(recent) >= self._per_minute:
            raise LimitError(
                f"more than {self._per_minute} requests in a minute; wait and ask again",
                retry_after_s=recent[0] + 60 - now,
            )
        recent.append(now)


class Admission:
    """At most ``max_running`` requests at once and ``max_queued`` that wait, in order; the rest is refused."""

    def __init__(self, max_running: int, max_queued: int) -> None:
        self._max_running, self._max_queued = max_running, max_queued
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.num_running = 0
        # Of recent requests, smoothed: what a caller is told to wait.
        self._mean_s = 1.0

    @property
    def num_queued(self) -> int:
        return sum(not waiting.done() for waiting in self._waiting)

    def check(self) -> None:
        """Raise LimitError if a request could not even wait."""
        if self.num_running >= self._max_running and self.num_queued >= self._max_queued:
            wait_s = self._mean_s * (self.num_queued + 1) / self._max_running
            raise LimitError(
                f"{self.num_running} requests are running and {self.num_queued} are waiting; ask again later",
                retry_after_s=min(max(wait_s, 1.0), 120.0),
            )

    def reserve(self) -> asyncio.Future[None]:
        """A turn, which is done once it is given: for `slot`, or to `give_back`. Raises LimitError."""
        self.check()
        turn = asyncio.get_running_loop().create_future()
        if self.num_running >= self._max_running or self._waiting:
            self._waiting.append(turn)
        else:
            self.num_running += 1
            turn.set_result(None)
        return turn

    def give_back(self, turn: asyncio.Future[None]) -> None:
        """For a turn that nobody takes, given already or not."""
        if turn.done() and not turn.cancelled():
            self._leave()
        elif turn in self._waiting:
            self._waiting.remove(turn)

    @asynccontextmanager
    async def slot(self, turn: asyncio.Future[None] | None = None) -> AsyncIterator[None]:
        """Wait for a turn, one that was reserved or a new one, and have it for the length of the block.

        Raises LimitError.
        """
        turn = turn if turn is not None else self.reserve()
        try:
            await turn
        except BaseException:
            # It may have been given to a caller who leaves at the same moment.
            self.give_back(turn)
            raise
        began_s = time.monotonic()
        try:
            yield
        finally:
            self._mean_s += 0.1 * (time.monotonic() - began_s - self._mean_s)
            self._leave()

    def _leave(self) -> None:
        """Give the turn to who has waited longest, or take it back."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.num_running -= 1
