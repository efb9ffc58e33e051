"""What tools were asked and what came of it: one JSON line for each call, appended and never changed.

    log = AuditLog(Path("audit.jsonl"))
    output = await log.run(tool, "search", arguments, tool_name="browser.search", response="resp_1")

    {"time": "2026-01-02T03:04:05.678Z", "response": "resp_1", "call": "", "tool": "browser.search",
     "arguments_sha256": "...", "arguments_chars": 31, "outcome": "ok", "duration_s": 0.2, "output_chars": 512}

`outcome` is ok, error (what the tool answered), cancelled, or a word of the caller's such as refused. What was asked
and answered is left out unless `with_contents` is set; then it stands shortened under `arguments` and `output`, with
what looks like a secret taken out. A line is written by one call of the system to a file opened for appending, so that
the lines of several processes do not mix; a full file is renamed to `.1`, the older ones to `.2` and on.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import os
import re
import stat
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ossia.errors import UnavailableError
from ossia.tools.base import Tool, ToolOutput
from ossia.tools.text import shortened

DEFAULT_MAX_BYTES = 64 << 20
_NUM_OLD_FILES = 5
_MAX_CONTENT_CHARS = 4_000
_MAX_LINE_BYTES = 64 << 10
_MAX_DETAIL_CHARS = 500

REDACTED = "[redacted]"
_SECRET_KEY = (
    r"[\w.-]*(?:passw(?:or)?d|passwd|secret|token|authorization|api[_-]?key|credential|cookie|private[_-]?key)[\w-]*"
)
_SECRETS = (
    # "api_key": "...", api_key=..., Authorization: ...
    re.compile(rf"""(?ix) (["']? {_SECRET_KEY} ["']? \s* [:=] \s* ["']? (?:(?:bearer|basic)\s+)?) ([^\s"',;}}&]+)"""),
    re.compile(r"(?i)(\b(?:bearer|basic)\s+)([A-Za-z0-9._~+/=-]{8,})"),
    # user:password@host
    re.compile(r"(://[^/\s:@]*:)([^/\s@]+)(?=@)"),
    # Keys that say what they are.
    re.compile(
        r"()(\b(?:sk|pk|rk|ghp|gho|ghs|github_pat|glpat|xox[abprs]|hf|AKIA|ASIA|AIza)[-_]?[A-Za-z0-9_-]{16,}"
        r"|\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*"
        r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:.|\n)*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z))"
    ),
)


def redact(text: str) -> str:
    """The text without what looks like a password, key or token."""
    for pattern in _SECRETS:
        text = pattern.sub(rf"\1{REDACTED}", text)
    return text


def arguments_hash(arguments: str) -> str:
    """SHA-256 of what the model has written, in hexadecimal."""
    return hashlib.sha256(arguments.encode("utf-8", "surrogatepass")).hexdigest()


class AuditLog:
    """A log of calls. Every thread and process may write to it."""

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        num_old_files: int = _NUM_OLD_FILES,
        with_contents: bool = False,
    ) -> None:
        """Raises UnavailableError if the file cannot be written: better no start than calls that leave no trace."""
        self.path = path
        self.with_contents = with_contents
        self._max_bytes = max_bytes
        self._num_old_files = num_old_files
        self._lock = threading.Lock()
        self._fd = -1
        with self._lock:
            self._open()

    async def run(
        self, tool: Tool, name: str, arguments: str, *, tool_name: str, response: str = "", call: str = ""
    ) -> ToolOutput:
        """Run a call of ``tool`` and log it, also when it is cancelled. The log's own failure is raised."""
        started = time.monotonic()
        outcome, output = "cancelled", None
        try:
            output = await tool.run(name, arguments)
            outcome = "error" if output.is_error else "ok"
            return output
        finally:
            duration_s = time.monotonic() - started
            self.record(
                tool_name, arguments, outcome, duration_s=duration_s, output=output, response=response, call=call
            )

    def record(
        self,
        tool: str,
        arguments: str,
        outcome: str,
        *,
        duration_s: float = 0.0,
        output: ToolOutput | None = None,
        response: str = "",
        call: str = "",
        details: Mapping[str, str | int | float | bool | None] | None = None,
    ) -> None:
        """Append one line. ``details`` are further fields that are no contents: a sandbox's tier, an approval.

        Raises UnavailableError if it cannot be written.
        """
        now = datetime.datetime.now(datetime.UTC)
        entry: dict[str, Any] = {
            "time": now.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "response": response,
            "call": call,
            "tool": tool[:200],
            "arguments_sha256": arguments_hash(arguments),
            "arguments_chars": len(arguments),
            "outcome": outcome,
            "duration_s": round(duration_s, 4),
        }
        if output is not None:
            entry["output_chars"] = len(output.text)
        for key, value in (details or {}).items():
            entry.setdefault(key, redact(value)[:_MAX_DETAIL_CHARS] if isinstance(value, str) else value)
        if self.with_contents:
            # Taken out before it is cut: half a secret would not look like one.
            entry["arguments"] = shortened(redact(arguments), _MAX_CONTENT_CHARS)
            if output is not None:
                entry["output"] = shortened(redact(output.text), _MAX_CONTENT_CHARS)
        self._append(_line(entry))

    def close(self) -> None:
        """Free the file. More than once is harmless."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1

    def _append(self, line: bytes) -> None:
        with self._lock:
            try:
                if self._fd < 0 or self._was_renamed():
                    self._open()
                if os.fstat(self._fd).st_size + len(line) > self._max_bytes:
                    self._rotate()
                written = os.write(self._fd, line)
                if written < len(line):
                    # The disk is full: end the half line, so that the next one is whole.
                    with contextlib.suppress(OSError):
                        os.write(self._fd, b"\n")
                    raise OSError(28, "No space left on device")
            except OSError as error:
                raise self._unavailable(error) from None

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(
                self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600
            )
        except OSError as error:
            raise self._unavailable(error) from None
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise UnavailableError(f"{self.path}: is no ordinary file; expected one for the audit log")
        if stat.S_IMODE(status.st_mode) & 0o077 and status.st_uid == os.geteuid():
            os.fchmod(fd, 0o600)
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = fd

    def _was_renamed(self) -> bool:
        """Whether another process has rotated the file, or somebody has moved it away."""
        try:
            status = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return True
        ours = os.fstat(self._fd)
        return (status.st_dev, status.st_ino) != (ours.st_dev, ours.st_ino)

    def _rotate(self) -> None:
        # One process renames; those that waited find it done.
        lock = os.open(f"{self.path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._was_renamed() and os.fstat(self._fd).st_size:
                for i in range(self._num_old_files - 1, 0, -1):
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(f"{self.path}.{i}", f"{self.path}.{i + 1}")
                os.rename(self.path, f"{self.path}.1")
            self._open()
        finally:
            os.close(lock)

    def _unavailable(self, error: OSError) -> UnavailableError:
        return UnavailableError(f"{self.path}: the audit log cannot be written: {error.strerror or error}")


def _line(entry: dict[str, Any]) -> bytes:
    encode = json.JSONEncoder(ensure_ascii=True, separators=(",", ":"), default=str).encode
    line = encode(entry)
    if len(line) > _MAX_LINE_BYTES:
        line = encode({k: v for k, v in entry.items() if k not in ("arguments", "output")})[:_MAX_LINE_BYTES]
    return line.encode() + b"\n"


async def run_logged(
    log: AuditLog | None, tool: Tool, name: str, arguments: str, *, tool_name: str, response: str = "", call: str = ""
) -> ToolOutput:
    """Run a call, logged if there is a log."""
    if log is None:
        return await tool.run(name, arguments)
    return await log.run(tool, name, arguments, tool_name=tool_name, response=response, call=call)
