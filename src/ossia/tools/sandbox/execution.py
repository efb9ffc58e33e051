"""What came of one call, whoever ran it; and what every sandbox offers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

# How a call ended:
#   ok, error      the code ran to its end, or to an exception
#   interrupted    by the caller
#   timeout        time was up
#   died           the process went: a crash, os._exit, the machine's own memory
#   memory, processes, sockets, files, disk   a bound of the sandbox was passed
#   gone           the whole sandbox was lost, with its files
Status = Literal[
    "ok", "error", "interrupted", "timeout", "died", "memory", "processes", "sockets", "files", "disk", "gone"
]


class Output(NamedTuple):
    """One piece of what was shown, in order."""

    kind: Literal["stream", "display", "error", "gap"]
    # The text of print or of an exception.
    text: str = ""
    # A display's forms by MIME type; always with text/plain.
    forms: Mapping[str, bytes] = {}


@dataclass(frozen=True)
class Execution:
    """One call."""

    status: Status
    outputs: tuple[Output, ...] = ()
    # Variables are lost; files are kept, unless the status is "gone".
    is_restarted: bool = False
    # As of a process: negative for a signal.
    exit_status: int = 0
    # The state had been lost before this call.
    was_lost: bool = False
    num_dropped_bytes: int = 0
    num_dropped_displays: int = 0
    wall_s: float = 0.0


class SandboxFile(NamedTuple):
    """An ordinary file of /mnt/data."""

    # Relative to /mnt/data.
    path: str
    size_bytes: int
    # Seconds since 1970.
    modified: float


class Sandbox(Protocol):
    """A place where one conversation's code runs. Its methods raise UnavailableError when it is gone."""

    @property
    def tier(self) -> str:
        """What confines it."""

    @property
    def is_alive(self) -> bool: ...

    async def execute(self, code: str, timeout_s: float) -> Execution:
        """Run a cell; being cancelled interrupts it, and the state is kept if it yields. One call at a time."""

    async def list_files(self) -> list[SandboxFile]: ...

    async def read_file(self, path: str) -> bytes:
        """Raises NotFoundError, and InputError for what is no ordinary file."""

    async def write_file(self, path: str, data: bytes) -> None:
        """Put a file in place, in folders that are made as needed. Raises InputError."""

    async def close(self) -> None:
        """End every process and forget the files."""
