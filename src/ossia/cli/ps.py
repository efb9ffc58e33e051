"""`ossia ps`: the servers of this machine's user, each with its model, memory and what it is doing.

A server leaves a note in the data folder while it runs. A note whose process is gone is removed by whoever sees it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer

_TIMEOUT_S = 2.0
# What the variables name as a proxy is for other machines.
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Running:
    """One server. ``num_running`` and ``num_queued`` are None where it does not answer, or asks for a key."""

    pid: int
    model: str
    url: str
    seconds: float
    memory_bytes: int
    num_running: int | None
    num_queued: int | None


def ps(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """List the servers that run here: model, address, memory, requests under way."""
    found = list(servers())
    if as_json:
        print(json.dumps([asdict(one) for one in found], indent=1))
        return
    if not found:
        print("No server of yours runs here. Start one: ossia serve --model gpt-oss-20b")
        return
    rows = [("PID", "MODEL", "ADDRESS", "SINCE", "MEMORY", "REQUESTS")]
    rows += [
        (str(one.pid), one.model, one.url, _since(one.seconds), f"{one.memory_bytes / 2**30:.1f} GiB", _busy(one))
        for one in found
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@contextlib.contextmanager
def listed(url: str, model: str) -> Iterator[None]:
    """Be in the list until the end. A folder that cannot be written leaves this server out of it, nothing more."""
    note = _folder() / f"{os.getpid()}.json"
    with contextlib.suppress(OSError):
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps({"url": url, "model": model, "began": time.time()}), encoding="utf-8")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            note.unlink()


def servers() -> Iterator[Running]:
    """Every server that has a note and still runs, by process number."""
    for note in sorted(_folder().glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            told = json.loads(note.read_text(encoding="utf-8"))
            pid = int(note.stem)
            if not _is_server(pid):
                note.unlink()
                continue
            running, queued = _requests(str(told["url"]))
            memory = _memory_bytes(pid)
            seconds = time.time() - float(told["began"])
            yield Running(pid, str(told["model"]), str(told["url"]), seconds, memory, running, queued)


def _folder() -> Path:
    from ossia.config import data_folder

    # Machines may share the folder, and their processes have numbers of their own.
    return data_folder() / "servers" / socket.gethostname()


def _is_server(pid: int) -> bool:
    """Whether the process is there, and is one of ours: numbers are given out again."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        return b"ossia" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


def _memory_bytes(pid: int) -> int:
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) * 1024
    return 0


def _requests(url: str) -> tuple[int | None, int | None]:
    try:
        with _DIRECTLY.open(f"{url}/metrics", timeout=_TIMEOUT_S) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, OSError, ValueError):
        return None, None
    found = dict(re.findall(r"^(ossia_running|ossia_queued) ([0-9.e+]+)$", text, re.MULTILINE))
    if len(found) < 2:
        return None, None
    return int(float(found["ossia_running"])), int(float(found["ossia_queued"]))


def _since(seconds: float) -> str:
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86_400)
    if days:
        return f"{days} d {hours % 24} h"
    return f"{hours} h {minutes % 60} min" if hours else f"{minutes} min {int(seconds % 60)} s"


def _busy(one: Running) -> str:
    if one.num_running is None:
        return "not told"
    return f"{one.num_running} under way" + (f", {one.num_queued} waiting" if one.num_queued else "")
