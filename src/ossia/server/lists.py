"""Lists as the API shows them: a page of items, and what items show besides."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query

from ossia.errors import InputError, NotFoundError
from ossia.responses.convert import Entry
from ossia.responses.include import retrieved
from ossia.responses.schema import Json, unknown_include
from ossia.server.service import Service

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[str | None, Query(description="The id of the item behind which the page begins.")]
Order = Annotated[Literal["asc", "desc"], Query()]
# Clients of the API say include[]=, people say include=.
Include = Annotated[list[str] | None, Query(alias="include[]", description="What items show besides.")]
PlainInclude = Annotated[list[str] | None, Query(alias="include", include_in_schema=False)]


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


def wanted_of(*includes: list[str] | None) -> frozenset[str]:
    """What is to be included. Raises InputError for what the API does not know."""
    wanted = frozenset(name for include in includes for name in include or ())
    if unknown := unknown_include(wanted):
        raise InputError(f"include: {unknown}", param="include")
    return wanted


def shown(service: Service, items: list[Json], entries: list[Entry], wanted: frozenset[str]) -> list[Json]:
    """Items with what is wanted besides, which is kept in their entries."""
    kept = {entry.item["id"]: entry for entry in entries}
    return [retrieved(item, kept.get(item["id"]), wanted, service.model.seal) for item in items]


def shown_of(service: Service, entries: list[Entry], *includes: list[str] | None) -> list[Json]:
    """The items of entries, with what is to be included."""
    return shown(service, [entry.item for entry in entries], entries, wanted_of(*includes))
