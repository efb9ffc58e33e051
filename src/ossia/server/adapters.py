"""Adapters that a server offers beside its model: chosen by name as models are, loaded and unloaded while it runs.

The two endpoints have vLLM's names and fields. They read folders of this machine, so they are there only for a server
that was started with a folder for it, and reach nothing outside.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from pathlib import Path

from fastapi import APIRouter
from openai.types import Model as ModelCard
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import Response as HttpResponse

from ossia.engine import AsyncEngine
from ossia.errors import CheckpointError, InputError, NotFoundError
from ossia.model.adapter import Adapter
from ossia.responses.loop import Model
from ossia.responses.schema import Json
from ossia.server.stream import JSONResponse

_log = logging.getLogger(__name__)

ReadAdapter = Callable[[Path, str], Adapter]
"""From a folder and a name to an adapter of the model that is served."""


@dataclass(frozen=True)
class Offered:
    """An adapter that clients may choose."""

    model: Model
    path: Path
    created_at: int


class Adapters:
    """The adapters of one served model.

    ``folder`` is the one that clients may load adapters from; None allows them none. Those that are there from the
    start are given by ``load``, which knows no folder.
    """

    def __init__(
        self, engine: AsyncEngine, read: ReadAdapter, *, taken: Collection[str] = (), folder: Path | None = None
    ) -> None:
        self._engine, self._read = engine, read
        self._taken = frozenset(taken)
        self.folder = folder
        self.offered: dict[str, Offered] = {}
        # One change at a time: reading takes a while, and two of one name must not pass each other.
        self._lock = asyncio.Lock()

    def load(self, name: str, path: Path, model: Model) -> Offered:
        """Read an adapter and offer it in place of another of its name; takes a moment.

        Raises InputError for a name that a model has, NotFoundError and CheckpointError for what is at ``path``,
        ConfigError where it does not fit the memory for adapters.
        """
        if name in self._taken:
            raise InputError(f"{name!r} is a name of the model itself; give the adapter another", param="lora_name")
        adapter = self._read(path, name)
        self._engine.load_adapter(adapter)
        own = replace(model, name=name, engine=self._engine.through(name))
        self.offered[name] = offered = Offered(own, path, int(time.time()))
        _log.info("adapter=%s path=%s parameters=%d loaded", name, path, adapter.num_parameters)
        return offered

    async def load_for_client(self, name: str, path: str, model: Model, *, in_place: bool) -> Offered:
        """Load an adapter from beneath the folder. Raises what is wrong with the request."""
        folder = await asyncio.to_thread(self._allowed, path)
        async with self._lock:
            if name in self.offered and not in_place:
                raise InputError(
                    f"adapter {name!r} is loaded already; unload it first, or set load_inplace", param="lora_name"
                )
            try:
                return await asyncio.to_thread(self.load, name, folder, model)
            except CheckpointError as error:
                # The files are the client's choice, not a fault of the server's.
                raise InputError(error.message, param="lora_path") from error

    async def unload_for_client(self, name: str) -> None:
        """Take an adapter away: requests under way finish with it. Raises NotFoundError if there is none."""
        self._require_folder()
        async with self._lock:
            if name not in self.offered:
                known = ", ".join(sorted(self.offered)) or "none"
                raise NotFoundError(f"there is no adapter {name!r}; loaded are: {known}", param="lora_name")
            del self.offered[name]
            self._engine.unload_adapter(name)
        _log.info("adapter=%s unloaded", name)

    def _require_folder(self) -> Path:
        if self.folder is None:
            raise NotFoundError(
                "adapters are not loaded or unloaded while this server runs; start it with --adapter-dir FOLDER"
            )
        return self.folder

    def _allowed(self, path: str) -> Path:
        """The folder that a client means, with every link followed."""
        root = self._require_folder().resolve()
        try:
            found = (root / path).resolve()
            is_inside = found.is_relative_to(root) and found != root
            is_folder = is_inside and found.is_dir()
        # A text that can be no path.
        except (OSError, ValueError, RuntimeError):
            is_inside = False
        if not is_inside:
            raise InputError(
                f"lora_path is {path[:200]!r}; expected the path of an adapter within the server's adapter folder",
                param="lora_path",
            )
        if not is_folder:
            raise NotFoundError(f"there is no folder {path[:200]!r} in the server's adapter folder", param="lora_path")
        return found


class LoadRequest(BaseModel):
    """The body of POST /v1/load_lora_adapter."""

    model_config = ConfigDict(extra="allow")
    lora_name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$")
    lora_path: str = Field(min_length=1, max_length=4096, description="Within the folder given by --adapter-dir.")
    load_inplace: bool = Field(default=False, description="Take the place of an adapter of this name.")


class UnloadRequest(BaseModel):
    """The body of POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="allow")
    lora_name: str = Field(min_length=1, max_length=128)


class Unloaded(BaseModel):
    """An adapter that is no longer offered."""

    id: str
    object: str
    deleted: bool


def router(adapters: Adapters | None, model: Model) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["Models"], default_response_class=JSONResponse)

    def ours() -> Adapters:
        if adapters is None:
            raise NotFoundError("this server has no adapters; start it with --adapter-dir FOLDER")
        return adapters

    @routes.post("/load_lora_adapter", responses={200: {"model": ModelCard}}, summary="Load an adapter")
    async def load(body: LoadRequest) -> HttpResponse:
        offered = await ours().load_for_client(body.lora_name, body.lora_path, model, in_place=body.load_inplace)
        return JSONResponse(card(offered, model.name))

    @routes.post("/unload_lora_adapter", responses={200: {"model": Unloaded}}, summary="Unload an adapter")
    async def unload(body: UnloadRequest) -> HttpResponse:
        await ours().unload_for_client(body.lora_name)
        return JSONResponse({"id": body.lora_name, "object": "model", "deleted": True})

    return routes


def card(offered: Offered, parent: str) -> Json:
    """An adapter as the list of models shows it."""
    return {
        "id": offered.model.name,
        "object": "model",
        "created": offered.created_at,
        "owned_by": "ossia",
        "parent": parent,
    }
