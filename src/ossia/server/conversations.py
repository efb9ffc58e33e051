"""Conversations over HTTP, and their items."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from openai.types.conversations import Conversation, ConversationDeletedResource, ConversationItem, ConversationItemList
from pydantic import BaseModel, ConfigDict, Field, RootModel
from starlette.requests import Request
from starlette.responses import Response as HttpResponse

from ossia.errors import NotFoundError
from ossia.responses.convert import Entry, History, Reader
from ossia.responses.schema import Json, Metadata
from ossia.server.document import says
from ossia.server.lists import After, Include, Limit, Order, PlainInclude, envelope, page, shown_of
from ossia.server.service import Service
from ossia.server.stream import JSONResponse, caller_of


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
    """The body of POST /v1/conversations/{id}, and of what else is given new metadata."""

    model_config = ConfigDict(extra="allow")
    metadata: Metadata | None = None


def router(service: Service) -> APIRouter:
    routes = APIRouter(prefix="/v1", tags=["Responses"], default_response_class=JSONResponse)
    store = service.store

    @routes.post("/conversations", responses=says(Conversation), summary="Create a conversation")
    async def create_conversation(request: Request, body: NewConversation | None = None) -> HttpResponse:
        body = body or NewConversation()
        entries = _read(service, body.items or [])
        owner = caller_of(request)
        return JSONResponse(await store.run(store.create_conversation, body.metadata or {}, entries, owner))

    @routes.get(
        "/conversations",
        responses=says(ConversationList),
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
        responses=says(Conversation),
        summary="Copy a conversation up to an item",
        description="Tokens stay as they were sampled; an addition to OpenAI's API.",
    )
    async def fork_conversation(request: Request, conversation_id: str, body: Fork) -> HttpResponse:
        metadata = body.metadata or {}
        owner = caller_of(request)
        return JSONResponse(await store.run(store.fork_conversation, conversation_id, body.item_id, metadata, owner))

    @routes.get("/conversations/{conversation_id}", responses=says(Conversation), summary="Retrieve a conversation")
    async def conversation(request: Request, conversation_id: str) -> HttpResponse:
        return JSONResponse(await store.run(store.conversation, conversation_id, caller_of(request)))

    @routes.post("/conversations/{conversation_id}", responses=says(Conversation), summary="Update its metadata")
    async def update_conversation(request: Request, conversation_id: str, body: NewMetadata) -> HttpResponse:
        metadata = body.metadata or {}
        owner = caller_of(request)
        return JSONResponse(await store.run(store.update_conversation, conversation_id, metadata, owner))

    @routes.delete(
        "/conversations/{conversation_id}",
        responses=says(ConversationDeletedResource),
        summary="Delete a conversation",
    )
    async def delete_conversation(request: Request, conversation_id: str) -> HttpResponse:
        await store.run(store.delete_conversation, conversation_id, caller_of(request))
        return JSONResponse({"id": conversation_id, "object": "conversation.deleted", "deleted": True})

    @routes.post(
        "/conversations/{conversation_id}/items", responses=says(ConversationItemList), summary="Add items to it"
    )
    async def add_items(
        request: Request,
        conversation_id: str,
        body: NewItems,
        include: Include = None,
        plain_include: PlainInclude = None,
    ) -> HttpResponse:
        owner = caller_of(request)
        history = await store.run(store.conversation_history, conversation_id, owner)
        entries = _read(service, body.items, history)
        await store.run(store.append_items, conversation_id, entries, owner)
        return JSONResponse(page(shown_of(service, entries, include, plain_include), 100, None, "asc"))

    @routes.get(
        "/conversations/{conversation_id}/items", responses=says(ConversationItemList), summary="List its items"
    )
    async def list_items(
        request: Request,
        conversation_id: str,
        limit: Limit = 20,
        after: After = None,
        order: Order = "desc",
        include: Include = None,
        plain_include: PlainInclude = None,
    ) -> HttpResponse:
        entries = await store.run(store.conversation_entries, conversation_id, caller_of(request))
        return JSONResponse(page(shown_of(service, entries, include, plain_include), limit, after, order))

    @routes.get(
        "/conversations/{conversation_id}/items/{item_id}",
        responses=says(RootModel[ConversationItem]),
        summary="Retrieve an item",
    )
    async def retrieve_item(
        request: Request,
        conversation_id: str,
        item_id: str,
        include: Include = None,
        plain_include: PlainInclude = None,
    ) -> HttpResponse:
        entries = await store.run(store.conversation_entries, conversation_id, caller_of(request))
        for item in shown_of(service, entries, include, plain_include):
            if item["id"] == item_id:
                return JSONResponse(item)
        raise NotFoundError(f"item {item_id[:80]!r} is not in the conversation", param="item_id")

    @routes.delete(
        "/conversations/{conversation_id}/items/{item_id}", responses=says(Conversation), summary="Delete an item"
    )
    async def delete_item(request: Request, conversation_id: str, item_id: str) -> HttpResponse:
        return JSONResponse(await store.run(store.delete_item, conversation_id, item_id, caller_of(request)))

    return routes


def _read(service: Service, items: list[Json], history: History | None = None) -> list[Entry]:
    return Reader(history or History(), service.model.seal, service.model.memory).read(items)
