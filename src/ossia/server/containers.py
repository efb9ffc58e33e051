"""Containers and their files over HTTP: what the python tool works with, listed, uploaded and fetched."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal
from urllib.parse import quote

from fastapi import APIRouter, Query
from openai.types import ContainerCreateResponse
from openai.types.containers import FileCreateResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response as HttpResponse

from ossia.errors import InputError, NotFoundError, OssiaError, UnsupportedError
from ossia.responses.schema import Json
from ossia.server.document import says
from ossia.server.lists import After, Limit, page
from ossia.server.service import Service
from ossia.server.stream import JSONResponse, caller_of
from ossia.tools.containers import Container, ContainerFile, Containers

Order = Annotated[Literal["asc", "desc"], Query()]


_UPLOAD: Json = {
    "type": "object",
    "properties": {"file": {"type": "string", "format": "binary"}, "file_id": {"type": "string"}},
}
_UPLOADS: Json = {
    "multipart/form-data": {"schema": _UPLOAD},
    "application/json": {"schema": {"type": "object", "properties": {"file_id": {"type": "string"}}}},
}


class NewContainer(BaseModel):
    """The body of POST /v1/containers."""

    model_config = ConfigDict(extra="allow")
    name: str = Field(max_length=256)
    # Of files that were uploaded, to be copied into it.
    file_ids: list[str] | None = Field(default=None, max_length=20)
    network_policy: Json | None = None


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1/containers", tags=["Containers"], default_response_class=JSONResponse)

    def known(request: Request, container_id: str | None = None) -> Containers:
        """The containers, if the caller may use the one that is named. Raises NotFoundError."""
        containers = service.tools.containers
        if containers is None:
            reason = service.tools.off.get("python", "the server was started without it")
            raise NotFoundError(f"there are no containers, since the python tool is off: {reason}")
        if container_id is not None:
            containers.get(container_id, caller_of(request))
        return containers

    @routes.post("", responses=says(ContainerCreateResponse), summary="Create a container")
    async def create(body: NewContainer, request: Request) -> HttpResponse:
        if body.network_policy and body.network_policy.get("type") != "disabled":
            raise UnsupportedError("network_policy: code has no network here", param="network_policy")
        containers, owner = known(request), caller_of(request)
        ids = list(dict.fromkeys(body.file_ids or ()))
        given = [await service.store.run(service.store.file_content, one, owner) for one in ids]
        made = containers.create(body.name, owner)
        try:
            for one, (name, data) in zip(ids, given, strict=True):
                await containers.copy(made.id, one, name, data)
        except OssiaError:
            await containers.end(made.id)
            raise
        return JSONResponse(_container(containers, made))

    @routes.get("", summary="List your containers")
    async def list_all(request: Request, limit: Limit = 20, after: After = None, order: Order = "desc") -> HttpResponse:
        containers = known(request)
        own = [_container(containers, one) for one in containers.all(caller_of(request))]
        return JSONResponse(page(own, limit, after, order))

    @routes.get("/{container_id}", responses=says(ContainerCreateResponse), summary="Retrieve a container")
    async def retrieve(request: Request, container_id: str) -> HttpResponse:
        containers = known(request, container_id)
        return JSONResponse(_container(containers, containers.get(container_id)))

    @routes.delete("/{container_id}", summary="Delete a container")
    async def delete(request: Request, container_id: str) -> HttpResponse:
        await known(request, container_id).delete(container_id)
        return JSONResponse({"id": container_id, "object": "container.deleted", "deleted": True})

    @routes.post(
        "/{container_id}/files",
        responses=says(FileCreateResponse),
        summary="Upload a file",
        openapi_extra={"requestBody": {"required": True, "content": _UPLOADS}},
    )
    async def upload(container_id: str, request: Request) -> HttpResponse:
        containers = known(request, container_id)
        async with request.form(max_files=1, max_fields=8) as form:
            file, file_id = form.get("file"), form.get("file_id") or await _file_id_of(request)
            if isinstance(file, UploadFile):
                made = await containers.write(container_id, file.filename or "", await file.read())
            elif isinstance(file_id, str):
                name, data = await service.store.run(service.store.file_content, file_id, caller_of(request))
                made = await containers.copy(container_id, file_id, name, data)
            else:
                raise InputError("the body has no file; expected a form with a part 'file', or a file_id", param="file")
        return JSONResponse(_file(container_id, made))

    @routes.get("/{container_id}/files", summary="List its files")
    async def files(
        request: Request, container_id: str, limit: Limit = 20, after: After = None, order: Order = "desc"
    ) -> HttpResponse:
        found = await known(request, container_id).files(container_id)
        found.sort(key=lambda file: (file.created_at, file.path))
        return JSONResponse(page([_file(container_id, file) for file in found], limit, after, order))

    @routes.get("/{container_id}/files/{file_id}", responses=says(FileCreateResponse), summary="Retrieve a file")
    async def file(request: Request, container_id: str, file_id: str) -> HttpResponse:
        found = await known(request, container_id).file(container_id, file_id)
        return JSONResponse(_file(container_id, found))

    @routes.get("/{container_id}/files/{file_id}/content", summary="Fetch a file", response_class=HttpResponse)
    async def content(request: Request, container_id: str, file_id: str) -> HttpResponse:
        found, data = await known(request, container_id).read(container_id, file_id)
        return attachment(found.path.rpartition("/")[2], data)

    @routes.delete("/{container_id}/files/{file_id}", summary="Delete a file")
    async def delete_file(request: Request, container_id: str, file_id: str) -> HttpResponse:
        await known(request, container_id).remove(container_id, file_id)
        return JSONResponse({"id": file_id, "object": "container.file.deleted", "deleted": True})

    return routes


async def _file_id_of(request: Request) -> Any:
    """What a body that is JSON names."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        return None
    try:
        body = json.loads(await request.body())
    except ValueError:
        raise InputError("the body is not JSON, as its content-type says") from None
    return body.get("file_id") if isinstance(body, dict) else None


def attachment(filename: str, data: bytes) -> HttpResponse:
    """A file for downloading: neither a model's nor a client's is to be shown as a page of this server."""
    # RFC 6266: the name in ASCII, and for others as it is besides.
    name = json.dumps("".join(char if " " <= char <= "~" else "_" for char in filename))
    disposition = f"attachment; filename={name}"
    if not filename.isascii():
        disposition += f"; filename*=UTF-8''{quote(filename, safe='', errors='replace')}"
    headers = {"content-disposition": disposition, "x-content-type-options": "nosniff"}
    return HttpResponse(data, media_type="application/octet-stream", headers=headers)


def _container(containers: Containers, container: Container) -> Json:
    return {
        "id": container.id,
        "object": "container",
        "created_at": int(container.created_at),
        "status": "running",
        "expires_after": {"anchor": "last_active_at", "minutes": max(1, int(containers.idle_s / 60))},
        "last_active_at": int(container.used_at),
        "network_policy": {"type": "disabled"},
        "name": container.name,
    }


def _file(container_id: str, file: ContainerFile) -> Json:
    return {
        "id": file.id,
        "object": "container.file",
        "created_at": int(file.created_at),
        "bytes": file.size_bytes,
        "container_id": container_id,
        "path": f"/mnt/data/{file.path}",
        "source": "user" if file.is_by_user else "assistant",
    }
