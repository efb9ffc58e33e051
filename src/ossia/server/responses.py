"""The Responses API over HTTP: responses, their items and streams."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from openai.types.responses import Response, ResponseUsage
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response as HttpResponse

from ossia.errors import InputError
from ossia.responses.builder import replayed
from ossia.responses.convert import Summary
from ossia.responses.events import DONE, sse
from ossia.responses.loop import summarize
from ossia.responses.schema import (
    HINTS,
    Json,
    PromptRequest,
    ResponseRequest,
    new_id,
)
from ossia.server.document import says
from ossia.server.lists import After, Include, Limit, Order, PlainInclude, page, shown, shown_of, wanted_of
from ossia.server.service import Service, split
from ossia.server.stream import EventStream, JSONResponse, caller_of, opened, while_there


class Compacted(BaseModel):
    """A conversation made short: the user's own messages, and an item that stands for the rest."""

    id: str
    object: Literal["response.compaction"]
    created_at: int
    output: list[Json]
    usage: ResponseUsage


class Deleted(BaseModel):
    """A response that is gone."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["Responses"], default_response_class=JSONResponse)
    store = service.store

    @routes.post("/responses", responses=says(Response), summary="Create a response")
    async def create(body: ResponseRequest, request: Request) -> HttpResponse:
        run = await service.begin(body, owner=caller_of(request))
        headers = service.ignored(body, run.tools.ignored, HINTS)
        if body.background:
            live = await service.start(run)
            if body.stream:
                return EventStream(live.follow(0), headers)
            return JSONResponse(run.response, headers=headers)
        if body.stream:
            return EventStream(await opened(request, service.encoded(run)), headers)
        await while_there(request, service.finish([run]))
        return JSONResponse(run.response, headers=headers)

    @routes.post("/responses/input_tokens", responses=says(InputTokenCountResponse), summary="Count input tokens")
    async def count(body: PromptRequest, request: Request) -> HttpResponse:
        _, read = await service.prepared(body, caller_of(request))
        return JSONResponse({"object": "response.input_tokens", "input_tokens": len(read.prompt.token_ids)})

    @routes.post("/responses/compact", responses=says(Compacted), summary="Compact a conversation")
    async def compact(body: PromptRequest, request: Request) -> HttpResponse:
        return JSONResponse(await while_there(request, _compacted(service, body, caller_of(request))))

    @routes.get("/responses/{response_id}", responses=says(Response), summary="Retrieve a response, or its stream")
    async def retrieve(
        request: Request,
        response_id: str,
        stream: bool = False,
        starting_after: Annotated[int | None, Query(ge=0)] = None,
        include: Include = None,
        plain_include: PlainInclude = None,
        include_obfuscation: Annotated[
            bool | None, Query(description="Events are told again as they were: what was padded stays so.")
        ] = None,
    ) -> HttpResponse:
        wanted = wanted_of(include, plain_include)
        owner = caller_of(request)
        live = service.live_of(response_id, owner)
        begin = 0 if starting_after is None else starting_after + 1
        if live is not None:
            return EventStream(live.follow(begin)) if stream else JSONResponse(live.run.response)
        response = await store.run(store.response, response_id, owner)
        if not stream:
            entries = await store.run(store.output_entries, response_id, owner) if wanted else []
            return JSONResponse(response | {"output": shown(service, response["output"], entries, wanted)})
        if response["status"] in ("queued", "in_progress"):
            raise InputError("the response is made by another server; ask that one for its stream", param="stream")
        sent = await store.run(store.events, response_id, owner)
        events = split(sent) if sent is not None else [sse(event) for event in replayed(response)]
        return EventStream(_each([*events[begin:], DONE]))

    @routes.delete("/responses/{response_id}", responses=says(Deleted), summary="Delete a response")
    async def delete(request: Request, response_id: str) -> HttpResponse:
        owner = caller_of(request)
        if (live := service.live_of(response_id, owner)) is not None:
            await service.cancel(live)
        await store.run(store.delete_response, response_id, owner)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @routes.post("/responses/{response_id}/cancel", responses=says(Response), summary="Cancel a background response")
    async def cancel(request: Request, response_id: str) -> HttpResponse:
        owner = caller_of(request)
        if (live := service.live_of(response_id, owner)) is not None:
            await service.cancel(live)
        response = await store.run(store.response, response_id, owner)
        if not response["background"]:
            raise InputError("only a background response can be cancelled; leave the stream of any other")
        return JSONResponse(response)

    @routes.get("/responses/{response_id}/input_items", responses=says(ResponseItemList), summary="List input items")
    async def input_items(
        request: Request,
        response_id: str,
        limit: Limit = 20,
        after: After = None,
        order: Order = "desc",
        include: Include = None,
        plain_include: PlainInclude = None,
    ) -> HttpResponse:
        entries = await store.run(store.input_entries, response_id, caller_of(request))
        return JSONResponse(page(shown_of(service, entries, include, plain_include), limit, after, order))

    return routes


async def _compacted(service: Service, body: PromptRequest, owner: str) -> Json:
    """A summary by the model itself, sealed; the user's own messages stay as they are."""
    history, read = await service.prepared(body, owner)
    entries = [*history.entries, *read.entries]
    text, used, _ = await service.within_limits(summarize(service.model_of(body.model), entries))
    kept = [e.item for e in entries if e.item.get("type") == "message" and e.item.get("role") == "user"]
    sealed = Summary(text).sealed(service.model.seal)
    return {
        "id": new_id("resp"),
        "object": "response.compaction",
        "created_at": int(time.time()),
        "output": [*kept, {"id": new_id("cmp"), "type": "compaction", "encrypted_content": sealed}],
        "usage": used.to_dict(),
    }


async def _each(chunks: list[bytes]) -> AsyncGenerator[bytes, None]:
    for chunk in chunks:
        yield chunk
