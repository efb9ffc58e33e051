"""Python sessions as the API's containers: an id, a name, and the files in /mnt/data by ids of their own.

A container lives as long as its session; one that was made and not used yet, as long as a session may be idle. One that
was made with an API key is that key's, its ``owner``, and not there for others; one that was made without is open to
whoever has its id, which cannot be guessed. The id of a file is a hash of the container's and of its path.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from ossia.errors import InputError, NotFoundError
from ossia.tools.python import PythonSessions, PythonTool

_ID = re.compile(r"cntr_[0-9a-f]{48}")
_MAX_CONTAINERS = 10_000


@dataclass
class Container:
    """One container."""

    id: str
    name: str
    created_at: float
    used_at: float
    # The name of the API key that it was made with, "" without keys.
    owner: str = ""
    # Paths that were put there by way of the API.
    uploaded: set[str] = field(default_factory=set)
    # Ids of uploaded files of which it has had a copy.
    copied: set[str] = field(default_factory=set)


class ContainerFile(NamedTuple):
    """One file of a container."""

    id: str
    # Below /mnt/data.
    path: str
    size_bytes: int
    created_at: float
    is_by_user: bool


class Containers:
    """The containers of a server, over its python sessions."""

    def __init__(self, sessions: PythonSessions, idle_s: float = 1200.0) -> None:
        """``idle_s`` is how long a session may be idle."""
        self._sessions = sessions
        self._idle_s = idle_s
        self._known: dict[str, Container] = {}

    @staticmethod
    def new_id() -> str:
        return f"cntr_{secrets.token_hex(24)}"

    @property
    def idle_s(self) -> float:
        return self._idle_s

    def tool(self, container_id: str) -> PythonTool:
        """The python tool of a container; it begins with the first call."""
        return self._sessions.tool(container_id)

    def use(self, container_id: str, name: str = "auto", owner: str = "") -> Container:
        """Note that a container is used; it is made if it is not there."""
        now = time.time()
        if container_id not in self._known:
            self._forget_ended()
            self._known[container_id] = Container(container_id, name, now, now, owner)
        container = self._known[container_id]
        container.used_at = now
        return container

    def create(self, name: str, owner: str = "") -> Container:
        return self.use(self.new_id(), name, owner)

    def has(self, container_id: object, owner: str | None = None) -> bool:
        """Whether an id is that of a container that lives, and that ``owner`` may use; None may use all."""
        if not isinstance(container_id, str) or not _ID.fullmatch(container_id):
            return False
        container = self._known.get(container_id)
        if container is None or not self._lives(container):
            return False
        return owner is None or container.owner in ("", owner)

    def get(self, container_id: str, owner: str | None = None) -> Container:
        """Raises NotFoundError."""
        if not self.has(container_id, owner):
            raise NotFoundError(
                f"container {container_id[:80]!r} is not there; it was never made, was deleted, or was not used for "
                f"{self._idle_s / 60:g} minutes"
            )
        return self._known[container_id]

    def all(self, owner: str | None = None) -> list[Container]:
        """Those of an owner that live, oldest first; None owns all."""
        owned = [one for one in self._known.values() if owner is None or one.owner == owner]
        return [container for container in owned if self._lives(container)]

    async def delete(self, container_id: str) -> None:
        """Raises NotFoundError."""
        self.get(container_id)
        await self.end(container_id)

    async def end(self, container_id: str) -> None:
        """End a container if it is there."""
        self._known.pop(container_id, None)
        await self._sessions.end_session(container_id)

    # Files -----------------------------------------------------------------------------------------------------------

    async def files(self, container_id: str) -> list[ContainerFile]:
        """Raises NotFoundError, UnavailableError."""
        container = self.get(container_id)
        if not self._sessions.has_session(container_id):
            return []
        session = await self._sessions.session(container_id)
        return [
            ContainerFile(
                _file_id(container_id, file.path),
                file.path,
                file.size_bytes,
                file.modified,
                file.path in container.uploaded,
            )
            for file in await session.list_files()
        ]

    async def file(self, container_id: str, file_id: str) -> ContainerFile:
        """Raises NotFoundError, UnavailableError."""
        for one in await self.files(container_id):
            if one.id == file_id:
                return one
        raise NotFoundError(f"file {file_id[:80]!r} is not in the container")

    async def read(self, container_id: str, file_id: str) -> tuple[ContainerFile, bytes]:
        """Raises NotFoundError, UnavailableError; InputError for what is no ordinary file any more."""
        file = await self.file(container_id, file_id)
        session = await self._sessions.session(container_id)
        return file, await session.read_file(file.path)

    async def write(self, container_id: str, name: str, data: bytes) -> ContainerFile:
        """Put a file into /mnt/data. Raises NotFoundError, UnavailableError; InputError for a name that is none."""
        container = self.get(container_id)
        path = posixpath.basename(name.replace("\\", "/"))
        if path in ("", ".", "..") or "\0" in path or len(path.encode("utf-8", "replace")) > 255:
            raise InputError(f"{name[:80]!r} is no name of a file; expected one of 1 to 255 bytes", param="file")
        session = await self._sessions.session(container_id)
        await session.write_file(path, data)
        self.use(container_id)
        container.uploaded.add(path)
        return await self.file(container_id, _file_id(container_id, path))

    def has_copy(self, container_id: str, file_id: str) -> bool:
        """Whether an uploaded file was put into the container, in the session that it has now."""
        if not self._sessions.has_session(container_id):
            return False
        container = self._known.get(container_id)
        return container is not None and file_id in container.copied

    async def copy(self, container_id: str, file_id: str, name: str, data: bytes) -> ContainerFile:
        """Put an uploaded file into /mnt/data. Raises as `write`."""
        if not self._sessions.has_session(container_id):
            self.get(container_id).copied.clear()
        made = await self.write(container_id, name, data)
        self.get(container_id).copied.add(file_id)
        return made

    async def remove(self, container_id: str, file_id: str) -> None:
        """Raises NotFoundError, UnavailableError; InputError if the file cannot be removed."""
        file = await self.file(container_id, file_id)
        session = await self._sessions.session(container_id)
        # Done by the sandbox itself: nothing of the host follows a path in there.
        await session.execute(f"__import__('os').remove({'/mnt/data/' + file.path!r})")
        if any(one.id == file_id for one in await self.files(container_id)):
            raise InputError(f"{file.path!r} cannot be removed")
        self.get(container_id).uploaded.discard(file.path)

    # Parts of these --------------------------------------------------------------------------------------------------

    def _lives(self, container: Container) -> bool:
        return self._sessions.has_session(container.id) or time.time() - container.used_at < self._idle_s

    def _forget_ended(self) -> None:
        if len(self._known) >= _MAX_CONTAINERS:
            self._known = {container.id: container for container in self.all()[-_MAX_CONTAINERS // 2 :]}


def _file_id(container_id: str, path: str) -> str:
    return f"cfile_{hashlib.sha256(f'{container_id}/{path}'.encode('utf-8', 'surrogatepass')).hexdigest()[:48]}"
