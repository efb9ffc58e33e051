"""The Responses API over HTTP: responses, their items and streams, conversations."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from openai.types.conversations import Conversation, ConversationDeletedResource, ConversationItem, ConversationItemList
from openai.types.responses import Response, ResponseUsage
from openai.types.responses.input_token_count_response import InputTokenCountResponse
from openai.types.responses.response_item_list import ResponseItemList
from pydantic import BaseModel, ConfigDict, Field, RootModel
from starlette.requests import Request
from starlette.responses import Response as HttpResponse

from ossia.errors import InputError, NotFoundError
from ossia.responses.builder import replayed
from ossia.responses.convert import Entry, History, Reader, Summary
from ossia.responses.events import DONE, sse
from ossia.responses.include import retrieved
from ossia.responses.loop import summarize
from ossia.responses.schema import (
    HINTS,
    Json,
    Metadata,
    PromptRequest,
    ResponseRequest,
    new_id,
    unknown_include,
)
from ossia.server.service import Service, split
from ossia.server.stream import EventStream, JSONResponse, caller_of, opened, while_there

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(description="The id of the item behind which the page begins.")]
Order = Annotated[Literal["asc", "desc"], Query()]
# Clients of the API say include[]=, people say include=.
Include = Annotated[list[str] | None, Query(alias="include[]", description="What items show besides.")]
PlainInclude = Annotated[list[str] | None, Query(alias="include", include_in_schema=False)]


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


class NewConversation(BaseModel):
    """The body of POST /v1/conversations."""

    model_config = ConfigDict(extra="allow")
    items: Annotated[list[Json], Field(max_length=20)] | None = None
    metadata: Metadata | None = None


class Fork(BaseModel):
    """The body of POST /v1/conversations/{id}/fork."""

    model_config = ConfigDict(extra="allow")
    item_id: str | None = Field(None, description="The last item of the copy; all of them by default.")
    metadata: Metadata | None = None


class ConversationList(BaseModel):
    """A page of conversations."""

    object: Literal["list"]
    data: list[Conversation]
    first_id: str
    last_id: str
    has_more: bool


class NewItems(BaseModel):
    """The body of POST /v1/conversations/{id}/items."""

    model_config = ConfigDict(extra="allow")
    items: Annotated[list[Json], Field(max_length=20)]


class NewMetadata(BaseModel):
    """The body of POST /v1/conversations/{id}."""

    model_config = ConfigDict(extra="allow")
    metadata: Metadata | None = None


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["Responses"], default_response_class=JSONResponse)
    store = service.store

    @routes.post("/responses", responses=_says(Response), summary="Create a response")
    async def create(body: ResponseRequest, request: Request) -> HttpResponse:
        run = await service.begin(body)
        headers = service.ignored(body, run.tools.ignored, HINTS)
        if body.background:
            live = await service.start(run)
            if body.stream:
                return EventStream(live.follow(0), headers)
            return JSONResponse(run.response, headers=headers)
        if body.stream:
            return EventStream(await opened(request, service.encoded(run)), headers)
        return JSONResponse(await while_there(request, service.finish(run)), headers=headers)

    @routes.post("/responses/input_tokens", responses=_says(InputTokenCountResponse), summary="Count input tokens")
    async def count(body: PromptRequest) -> HttpResponse:
        _, read = await service.prepared(body)
        return JSONResponse({"object": "response.input_tokens", "input_tokens": len(read.prompt.token_ids)})

    @routes.post("/responses/compact", responses=_says(Compacted), summary="Compact a conversation")
    async def compact(body: PromptRequest, request: Request) -> HttpResponse:
        return JSONResponse(await while_there(request, _compacted(service, body)))

    @routes.get("/responses/{response_id}", responses=_says(Response), summary="Retrieve a response, or its stream")
    async def retrieve(
        response_id: str,
        stream: bool = False,
        starting_after: Annotated[int | None, Query(ge=0)] = None,
        include: Include = None,
        plain_include: PlainInclude = None,
        include_obfuscation: Annotated[
            bool | None, Query(description="Events are told again as they were: what was padded stays so.")
        ] = None,
    ) -> HttpResponse:
        wanted = _wanted(include, plain_include)
        live = service.live.get(response_id)
        begin = 0 if starting_after is None else starting_after + 1
        if live is not None:
            return EventStream(live.follow(begin)) if stream else JSONResponse(live.run.response)
        response = await store.run(store.response, response_id)
        if not stream:
            entries = await store.run(store.output_entries, response_id) if wanted else []
            return JSONResponse(response | {"output": _retrieved(service, response["output"], entries, wanted)})
        if response["status"] in ("queued", "in_progress"):
            raise InputError("the response is made by another server; ask that one for its stream", param="stream")
        sent = await store.run(store.events, response_id)
        events = split(sent) if sent is not None else [sse(event) for event in replayed(response)]
        return EventStream(_each([*events[begin:], DONE]))

    @routes.delete("/responses/{response_id}", responses=_says(Deleted), summary="Delete a response")
    async def delete(response_id: str) -> HttpResponse:
        if response_id in service.live:
            await service.cancel(service.live[response_id])
        await store.run(store.delete_response, response_id)
        return JSONResponse({"id": response_id, "object": "response", "deleted": True})

    @routes.post("/responses/{response_id}/cancel", responses=_says(Response), summary="Cancel a background response")
    async def cancel(response_id: str) -> HttpResponse:
        live = service.live.get(response_id)
        if live is not None:
            await service.cancel(live)
        response = await store.run(store.response, response_id)
        if not response["background"]:
            raise InputError("only a background response can be cancelled; leave the stream of any other")
        return JSONResponse(response)

    @routes.get("/responses/{response_id}/input_items", responses=_says(ResponseItemList), summary="List input items")
    async def input_items(
        response_id: str,
        limit: Limit = 20,
        after: After = None,
        order: Order = "desc",
        include: Include = None,
        plain_include: PlainInclude = None,
    ) -> HttpResponse:
        entries = await store.run(store.input_entries, response_id)
        return JSONResponse(page(_all(service, entries, include, plain_include), limit, after, order))

    @routes.post("/conversations", responses=_says(Conversation), summary="Create a conversation")
    async def create_conversation(request: Request, body: NewConversation | None = None) -> HttpResponse:
        body = body or NewConversation()
        entries = _read(service, body.items or [])
        owner = caller_of(request)
        return JSONResponse(await store.run(store.create_conversation, body.metadata or {}, entries, owner))

    @routes.get(
        "/conversations",
        responses=_says(ConversationList),
        summary="List your conversations",
        description="Those that your key created, the last used one first; an addition to OpenAI's API.",
    )
    async def list_conversations(
        request: Request, limit: Limit = 20, after: After = None, query: Annotated[str, Query(max_length=500)] = ""
    ) -> HttpResponse:
        found = await store.run(store.conversations, caller_of(request), query, limit + 1, after)
        return JSONResponse(envelope(found[:limit], has_more=len(found) > limit))

    @routes.post(
        "/conversations/{conversation_id}/fork",
        responses=_says(Conversation),
        summary="Copy a conversation up to an item",
        description="Tokens stay as they were sampled; an addition to OpenAI's API.",
    )
    async def fork_conversation(request: Request, conversation_id: str, body: Fork) -> HttpResponse:
        metadata = body.metadata or {}
        owner = caller_of(request)
        return JSONResponse(await store.run(store.fork_conversation, conversation_id, body.item_id, metadata, owner))

    @routes.get("/conversations/{conversation_id}", responses=_says(Conversation), summary="Retrieve a conversation")
    async def conversation(conversation_id: str) -> HttpResponse:
        return JSONResponse(await store.run(store.conversation, conversation_id))

    @routes.post("/conversations/{conversation_id}", responses=_says(Conversation), summary="Update its metadata")
    async def update_conversation(conversation_id: str, body: NewMetadata) -> HttpResponse:
        return JSONResponse(await store.run(store.update_conversation, conversation_id, body.metadata or {}))

    @routes.delete(
        "/conversations/{conversation_id}",
        responses=_says(ConversationDeletedResource),
        summary="Delete a conversation",
    )
    async def delete_conversation(conversation_id: str) -> HttpResponse:
        await store.run(store.delete_conversation, conversation_id)
        return JSONResponse({"id": conversation_id, "object": "conversation.deleted", "deleted": True})

    @routes.post(
        "/conversations/{conversation_id}/items", responses=_says(ConversationItemList), summary="Add items to it"
    )
    async def add_items(
        conversation_id: str, body: NewItems, include: Include = None, plain_include: PlainInclude = None
    ) -> HttpResponse:
        history = await store.run(store.conversation_history, conversation_id)
        entries = _read(service, body.items, history)
        await store.run(store.append_items, conversation_id, entries)
        return JSONResponse(page(_all(service, entries, include, plain_include), 100, None, "asc"))

    @routes.get(
        "/conversations/{conversation_id}/items", responses=_says(ConversationItemList), summary="List its items"
    )
    async def list_items(
        conversation_id: str,
        limit: Limit = 20,
        after: After = None,
        order: Order = "desc",
        include: Include = None,
        plain_include: PlainInclude = None,
    ) -> HttpResponse:
        entries = await store.run(store.conversation_entries, conversation_id)
        return JSONResponse(page(_all(service, entries, include, plain_include), limit, after, order))

    @routes.get(
        "/conversations/{conversation_id}/items/{item_id}",
        responses=_says(RootModel[ConversationItem]),
        summary="Retrieve an item",
    )
    async def retrieve_item(
        conversation_id: str, item_id: str, include: Include = None, plain_include: PlainInclude = None
    ) -> HttpResponse:
        entries = await store.run(store.conversation_entries, conversation_id)
        for item in _all(service, entries, include, plain_include):
            if item["id"] == item_id:
                return JSONResponse(item)
        raise NotFoundError(f"item {item_id[:80]!r} is not in the conversation", param="item_id")

    @routes.delete(
        "/conversations/{conversation_id}/items/{item_id}", responses=_says(Conversation), summary="Delete an item"
    )
    async def delete_item(conversation_id: str, item_id: str) -> HttpResponse:
        return JSONResponse(await store.run(store.delete_item, conversation_id, item_id))

    return routes


def page(items: list[Json], limit: int, after: str | None, order: str) -> Json:
    """One page of a list, in the API's envelope. Raises NotFoundError for an ``after`` that is not in it."""
    ordered = items if order == "asc" else items[::-1]
    if after is not None:
        places = [i for i, item in enumerate(ordered) if item["id"] == after]
        if not places:
            raise NotFoundError(f"item {after[:80]!r} is not in the list", param="after")
        ordered = ordered[places[0] + 1 :]
    return envelope(ordered[:limit], has_more=len(ordered) > limit)


def envelope(shown: list[Json], *, has_more: bool) -> Json:
    """A page of a list as the API sends it."""
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else "",
        "last_id": shown[-1]["id"] if shown else "",
        "has_more": has_more,
    }


def _wanted(*includes: list[str] | None) -> frozenset[str]:
    """What is to be included. Raises InputError for what the API does not know."""
    wanted = frozenset(name for include in includes for name in include or ())
    if unknown := unknown_include(wanted):
        raise InputError(f"include: {unknown}", param="include")
    return wanted


def _retrieved(service: Service, items: list[Json], entries: list[Entry], wanted: frozenset[str]) -> list[Json]:
    kept = {entry.item["id"]: entry for entry in entries}
    return [retrieved(item, kept.get(item["id"]), wanted, service.model.seal) for item in items]


def _all(service: Service, entries: list[Entry], *includes: list[str] | None) -> list[Json]:
    return _retrieved(service, [entry.item for entry in entries], entries, _wanted(*includes))


async def _compacted(service: Service, body: PromptRequest) -> Json:
    """A summary by the model itself, sealed; the user's own messages stay as they are."""
    history, read = await service.prepared(body)
    entries = [*history.entries, *read.entries]
    text, used = await service.within_limits(summarize(service.model_of(body.model), entries))
    kept = [e.item for e in entries if e.item.get("type") == "message" and e.item.get("role") == "user"]
    sealed = Summary(text).sealed(service.model.seal)
    return {
        "id": new_id("resp"),
        "object": "response.compaction",
        "created_at": int(time.time()),
        "output": [*kept, {"id": new_id("cmp"), "type": "compaction", "encrypted_content": sealed}],
        "usage": used.to_dict(),
    }


def _read(service: Service, items: list[Json], history: History | None = None) -> list[Entry]:
    return Reader(history or History(), service.model.seal, service.model.memory).read(items)


async def _each(chunks: list[bytes]) -> AsyncGenerator[bytes, None]:
    for chunk in chunks:
        yield chunk


def _says(model: type[Any]) -> dict[int | str, dict[str, Any]]:
    """The documented answer: a type of the openai package's."""
    return {200: {"model": model}}
