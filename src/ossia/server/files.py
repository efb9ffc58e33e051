"""Files over HTTP: what clients upload, for the python tool's containers to take by `file_ids`."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from fastapi import APIRouter, Query
from openai.types import FileDeleted, FileObject
from starlette.datastructures import UploadFile
from starlette.requests import Request
from starlette.responses import Response as HttpResponse

from ossia.errors import InputError
from ossia.responses.schema import Json
from ossia.server.containers import attachment
from ossia.server.document import says
from ossia.server.lists import After, page
from ossia.server.service import Service
from ossia.server.stream import JSONResponse, caller_of

Purpose = Literal["assistants", "batch", "fine-tune", "vision", "user_data"]
_MAX_NAME_CHARS = 255
_LIFETIMES_S = (3_600, 2_592_000)
_UPLOAD: Json = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"type": "string", "enum": list(get_args(Purpose))},
    },
}


def router(service: Service) -> APIRouter:
    store = service.store
    routes = APIRouter(prefix="/v1/files", tags=["Files"], default_response_class=JSONResponse)

    @routes.post(
        "",
        responses=says(FileObject),
        summary="Upload a file",
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _UPLOAD}}}},
    )
    async def upload(request: Request) -> HttpResponse:
        async with request.form(max_files=1, max_fields=8) as form:
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise InputError("the body has no file; expected a form with a part 'file'", param="file")
            if purpose not in get_args(Purpose):
                known = ", ".join(get_args(Purpose))
                raise InputError(f"purpose is {str(purpose)[:80]!r}; expected one of {known}", param="purpose")
            name = _plain_name(file.filename or "")
            lifetime_s = _read_lifetime(form.get("expires_after[seconds]"))
            data = await file.read()
            made = await store.run(store.save_file, name, purpose, data, lifetime_s, caller_of(request))
        return JSONResponse(made)

    @routes.get("", summary="List your files")
    async def list_all(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        after: After = None,
        order: Annotated[Literal["asc", "desc"], Query()] = "desc",
        purpose: Annotated[str | None, Query()] = None,
    ) -> HttpResponse:
        return JSONResponse(page(await store.run(store.files, purpose, caller_of(request)), limit, after, order))

    @routes.get("/{file_id}", responses=says(FileObject), summary="Retrieve a file")
    async def retrieve(request: Request, file_id: str) -> HttpResponse:
        return JSONResponse(await store.run(store.file, file_id, caller_of(request)))

    @routes.get("/{file_id}/content", summary="Fetch a file", response_class=HttpResponse)
    async def content(request: Request, file_id: str) -> HttpResponse:
        return attachment(*await store.run(store.file_content, file_id, caller_of(request)))

    @routes.delete("/{file_id}", responses=says(FileDeleted), summary="Delete a file")
    async def delete(request: Request, file_id: str) -> HttpResponse:
        await store.run(store.delete_file, file_id, caller_of(request))
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    return routes


def _plain_name(given: str) -> str:
    name = given.replace("\\", "/").rpartition("/")[2]
    if name in ("", ".", "..") or not name.isprintable() or len(name.encode()) > _MAX_NAME_CHARS:
        raise InputError(
            f"{given[:80]!r} is no name of a file; expected one of 1 to {_MAX_NAME_CHARS} bytes", param="file"
        )
    return name


def _read_lifetime(given: object) -> float | None:
    if given is None:
        return None
    low, high = _LIFETIMES_S
    if not isinstance(given, str) or not given.isdecimal() or not low <= int(given[:12]) <= high:
        raise InputError(
            f"expires_after.seconds is {str(given)[:40]!r}; expected {low} to {high}", param="expires_after"
        )
    return float(given)
