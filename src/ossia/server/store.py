"""What outlives a request: responses, their items, conversations. SQLite in a file, or PostgreSQL by URL.

A response that a client has seen the end of is in the store already: `save` returns when it is durable (SQLite: write-
ahead log, synchronous FULL). JSON and events are kept as bytes, so that what goes out is what went in; half characters
and NULs included. Everything expires: a response after the time to live, counted from the last response that continues
it, and the oldest first when all together are larger than the bound.

What was stored with an API key is that key's, its ``owner``: for others it is not there, to list, read, change,
continue or refer to. What was stored without has the owner "", and is open to whoever has its id, which none can guess.

Schema   responses 1-n items (kind input, output), conversations 1-n items (kind conversation), chat_completions, files
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ossia.errors import ConfigError, InputError, NotFoundError, PreviousResponseError
from ossia.responses.convert import Entry, History, Spoken
from ossia.responses.schema import Json, dumps, new_id

_META = sa.MetaData()
_RESPONSES = sa.Table(
    "responses",
    _META,
    sa.Column("id", sa.String(128), primary_key=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False, index=True),
    sa.Column("is_running", sa.Boolean, nullable=False, index=True),
    # Of the server that makes it.
    sa.Column("server", sa.String(256), nullable=False),
    sa.Column("previous_id", sa.String(128)),
    sa.Column("current_date", sa.String(32)),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("events", sa.LargeBinary),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
)
_CONVERSATIONS = sa.Table(
    "conversations",
    _META,
    sa.Column("id", sa.String(128), primary_key=True),
    sa.Column("created_at", sa.Float, nullable=False),
    sa.Column("expires_at", sa.Float, nullable=False, index=True),
    sa.Column("current_date", sa.String(32)),
    sa.Column("metadata", sa.LargeBinary, nullable=False),
)
_ITEMS = sa.Table(
    "items",
    _META,
    sa.Column("owner_id", sa.String(128), primary_key=True),
    sa.Column("kind", sa.String(16), primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True),
    sa.Column("id", sa.String(512), nullable=False, index=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
    # The messages that the item stands for, with their tokens: JSON, zlib.
    sa.Column("spoken", sa.LargeBinary, nullable=False),
)
# Whose a response, conversation, chat completion or file is: the name of the API key that it was stored with, "" for
# none. The table is called as it was when conversations alone had owners, so that they keep them.
_OWNERS = sa.Table(
    "conversation_owners",
    _META,
    sa.Column("conversation_id", sa.String(128), key="stored_id", primary_key=True),
    sa.Column("owner", sa.String(256), nullable=False, index=True),
)
# What the tools of a response, or of a conversation, have left for the next one: pages, the container. JSON, zlib.
_TOOL_STATES = sa.Table(
    "tool_states",
    _META,
    sa.Column("owner_id", sa.String(128), primary_key=True),
    sa.Column("body", sa.LargeBinary, nullable=False),
)
_CHATS = sa.Table(
    "chat_completions",
    _META,
    sa.Column("id", sa.String(128), primary_key=True),
    sa.Column("created_at", sa.Float, nullable=False, index=True),
    sa.Column("expires_at", sa.Float, nullable=False, index=True),
    sa.Column("model", sa.String(512), nullable=False),
    sa.Column("metadata", sa.LargeBinary, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    # The messages that were sent with it: JSON, zlib.
    sa.Column("messages", sa.LargeBinary, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
)
# What clients have uploaded.
_FILES = sa.Table(
    "files",
    _META,
    sa.Column("id", sa.String(128), primary_key=True),
    sa.Column("created_at", sa.Float, nullable=False, index=True),
    sa.Column("expires_at", sa.Float, nullable=False, index=True),
    sa.Column("filename", sa.String(1024), nullable=False),
    sa.Column("purpose", sa.String(64), nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
)

_MAX_CHAIN = 10_000
# An expiry of what does not expire.
_NEVER = 1e12
T = TypeVar("T")


@dataclass(frozen=True)
class Stored:
    """A response as it is kept."""

    response: Json
    input: Sequence[Entry] = ()
    output: Sequence[Entry] = ()
    # Of a turn that waits for a tool's answer: the date that its prompt tells.
    current_date: str | None = None
    # The whole stream, as it went out.
    events: bytes | None = None
    # Items are also appended to this conversation.
    conversation_id: str | None = None
    # What the tools have left for the next response.
    tool_state: Json | None = None
    owner: str = ""


class Store:
    """Opens the store at an SQLAlchemy URL; methods are for threads, `run` is for the event loop.

    ``ttl_s`` and ``max_bytes`` bound what is kept, 0 for no bound. ``server`` names this server among those that share
    a PostgreSQL database. Raises ConfigError if the store cannot be opened.
    """

    def __init__(self, url: str, *, ttl_s: float = 30 * 86_400, max_bytes: int = 4 << 30, server: str = "") -> None:
        self._ttl_s, self._max_bytes, self._server = ttl_s, max_bytes, server
        try:
            self._is_sqlite = sa.make_url(url).get_backend_name() == "sqlite"
            self._db = _open_sqlite(url) if self._is_sqlite else sa.create_engine(url, pool_pre_ping=True)
            _META.create_all(self._db)
        except (sa.exc.SQLAlchemyError, ImportError, OSError) as error:
            raise ConfigError(f"store {_without_password(url)}: cannot be opened: {error}") from None
        # SQLite has one writer; one thread spares it the waiting.
        self._threads = ThreadPoolExecutor(1 if self._is_sqlite else 4, thread_name_prefix="ossia-store")
        self._num_saved = 0

    async def run(self, method: Callable[..., T], *args: Any) -> T:
        """Call a method of this store in its threads. What has been begun is finished, whoever leaves."""
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._threads, lambda: method(*args)))

    def close(self) -> None:
        self._threads.shutdown()
        self._db.dispose()

    # Responses -------------------------------------------------------------------------------------------------------

    def save(self, stored: Stored) -> None:
        """Keep a response, or its new state; durable on return.

        Raises NotFoundError, with nothing changed, if its conversation was deleted meanwhile.
        """
        response = stored.response
        body = dumps(response)
        events = None if stored.events is None else zlib.compress(stored.events, 1)
        rows = _rows(response["id"], "input", stored.input) + _rows(response["id"], "output", stored.output)
        left = None if stored.tool_state is None else zlib.compress(dumps(stored.tool_state), 1)
        size = (
            len(body)
            + len(events or b"")
            + len(left or b"")
            + sum(len(row["body"]) + len(row["spoken"]) for row in rows)
        )
        now = time.time()
        with self._db.begin() as db:
            db.execute(sa.delete(_ITEMS).where(_ITEMS.c.owner_id == response["id"]))
            db.execute(sa.delete(_RESPONSES).where(_RESPONSES.c.id == response["id"]))
            _keep_owner(db, response["id"], stored.owner)
            db.execute(
                sa.insert(_RESPONSES).values(
                    id=response["id"],
                    created_at=response["created_at"],
                    expires_at=self._expiry(now),
                    is_running=response["status"] in ("queued", "in_progress"),
                    server=self._server,
                    previous_id=response["previous_response_id"],
                    current_date=stored.current_date,
                    body=body,
                    events=events,
                    size_bytes=size,
                )
            )
            if rows:
                db.execute(sa.insert(_ITEMS), rows)
            if stored.conversation_id is not None:
                self._append(db, stored.conversation_id, [*stored.input, *stored.output], stored.current_date)
            for kept_by in (response["id"], stored.conversation_id):
                _keep_tool_state(db, kept_by, left)
        self._count_saved()

    def response(self, response_id: str, owner: str = "") -> Json:
        """Raises NotFoundError."""
        return _json(self._response_row(response_id, owner, _RESPONSES.c.body).body)

    def events(self, response_id: str, owner: str = "") -> bytes | None:
        """The stream of a response, as it went out; None if it was not kept."""
        row = self._response_row(response_id, owner, _RESPONSES.c.events)
        return None if row.events is None else zlib.decompress(row.events)

    def delete_response(self, response_id: str, owner: str = "") -> None:
        self._response_row(response_id, owner, _RESPONSES.c.id)
        with self._db.begin() as db:
            for column in (_RESPONSES.c.id, _OWNERS.c.stored_id, _ITEMS.c.owner_id, _TOOL_STATES.c.owner_id):
                db.execute(sa.delete(column.table).where(column == response_id))

    def tool_state(self, owner_id: str) -> Json | None:
        """What the tools of a response or a conversation have left; None for nothing."""
        row = self._one(sa.select(_TOOL_STATES.c.body).where(_TOOL_STATES.c.owner_id == owner_id))
        return None if row is None else _json(zlib.decompress(row.body))

    def keep_tool_state(self, owner_id: str, state: Json) -> None:
        with self._db.begin() as db:
            _keep_tool_state(db, owner_id, zlib.compress(dumps(state), 1))

    def input_entries(self, response_id: str, owner: str = "") -> list[Entry]:
        """What the response answered: the items of its own request."""
        self._response_row(response_id, owner, _RESPONSES.c.id)
        return self._kept(response_id, "input")

    def output_entries(self, response_id: str, owner: str = "") -> list[Entry]:
        self._response_row(response_id, owner, _RESPONSES.c.id)
        return self._kept(response_id, "output")

    def history(self, response_id: str, owner: str = "") -> History:
        """All that was said up to the end of a response, for the next one.

        Raises PreviousResponseError, and InputError for one that is not done yet.
        """
        chain: list[str] = []
        current: str | None = response_id
        pending_date: str | None = None
        now = time.time()
        with self._db.begin() as db:
            while current is not None and len(chain) < _MAX_CHAIN:
                columns = (_RESPONSES.c.previous_id, _RESPONSES.c.current_date, _RESPONSES.c.is_running)
                named = sa.select(*columns).where(_RESPONSES.c.id == current, _is_open_to(owner, _RESPONSES.c.id))
                row = db.execute(named).first() if _is_plain(current) else None
                if row is None:
                    raise PreviousResponseError(
                        f"previous response {current[:80]!r} not found; it was not stored, was deleted, or has expired",
                        param="previous_response_id",
                    )
                if row.is_running:
                    raise InputError(f"response {current!r} is not done yet", param="previous_response_id")
                pending_date = row.current_date if not chain else pending_date
                chain.append(current)
                current = row.previous_id
            db.execute(sa.update(_RESPONSES).where(_RESPONSES.c.id.in_(chain)).values(expires_at=self._expiry(now)))
            entries = [entry for one in reversed(chain) for entry in _entries(db, one)]
            return History([*_said_before(db, chain[-1]), *entries], pending_date)

    def references(self, ids: Iterable[str], owner: str = "") -> Mapping[str, Entry]:
        """Entries of an owner's stored items, by id. Clients may name items themselves, so no other's is found."""
        wanted = [one for one in ids if _is_plain(one)]
        if not wanted:
            return {}
        with self._db.connect() as db:
            rows = db.execute(sa.select(_ITEMS).where(_ITEMS.c.id.in_(wanted), _is_of(owner, _ITEMS.c.owner_id)))
            return {row.id: _entry(row) for row in rows}

    def fail_orphans(self) -> int:
        """End responses that were under way when their server stopped; how many there were."""
        with self._db.begin() as db:
            query = sa.select(_RESPONSES.c.id, _RESPONSES.c.body).where(_RESPONSES.c.is_running)
            if not self._is_sqlite:
                query = query.where(_RESPONSES.c.server == self._server)
            rows = db.execute(query).all()
            for row in rows:
                error = {"code": "server_error", "message": "the server stopped before the response was done"}
                body = dumps(_json(row.body) | {"status": "failed", "error": error})
                db.execute(sa.update(_RESPONSES).where(_RESPONSES.c.id == row.id).values(is_running=False, body=body))
        return len(rows)

    # Conversations ---------------------------------------------------------------------------------------------------

    def create_conversation(self, metadata: Json, entries: Sequence[Entry], owner: str = "") -> Json:
        with self._db.begin() as db:
            return self._create(db, metadata, entries, None, owner)

    def fork_conversation(self, conversation_id: str, item_id: str | None, metadata: Json, owner: str = "") -> Json:
        """A new conversation with the items up to and with ``item_id``, or all, and what the tools had left there.

        Tokens stay as they were sampled. Raises NotFoundError for an item that is not in it.
        """
        row = self._conversation_row(conversation_id, owner)
        with self._db.begin() as db:
            entries = _entries(db, conversation_id)
            if item_id is not None:
                places = [i for i, entry in enumerate(entries) if entry.item["id"] == item_id]
                if not places:
                    raise _not_found("item", item_id)
                entries = entries[: places[0] + 1]
            fork = self._create(db, metadata, entries, row.current_date, owner)
            state = db.execute(sa.select(_TOOL_STATES.c.body).where(_TOOL_STATES.c.owner_id == conversation_id))
            _keep_tool_state(db, fork["id"], state.scalar())
        return fork

    def conversations(self, owner: str, query: str, limit: int, after: str | None) -> list[Json]:
        """The first ``limit`` conversations of an owner behind ``after``, the one that was last used first.

        With a ``query``, those whose title or messages have all of its words, in whatever case.
        """
        words = query.casefold().split()
        columns = (_CONVERSATIONS.c.expires_at, _CONVERSATIONS.c.id)
        asked = (
            sa.select(_CONVERSATIONS)
            .where(_is_of(owner, _CONVERSATIONS.c.id))
            .order_by(*(column.desc() for column in columns))
        )
        if after is not None:
            row = self._conversation_row(after, owner)
            asked = asked.where(sa.tuple_(*columns) < sa.tuple_(sa.literal(row.expires_at), sa.literal(row.id)))
        found: list[Json] = []
        with self._db.connect() as db:
            for row in db.execute(asked if words else asked.limit(limit)).all():
                one = _conversation(row.id, row.created_at, _json(row.metadata))
                if not words or self._has_words(db, one, words):
                    found.append(one)
                    if len(found) == limit:
                        break
        return found

    def conversation(self, conversation_id: str, owner: str = "") -> Json:
        row = self._conversation_row(conversation_id, owner)
        return _conversation(row.id, row.created_at, _json(row.metadata))

    def update_conversation(self, conversation_id: str, metadata: Json, owner: str = "") -> Json:
        row = self._conversation_row(conversation_id, owner)
        with self._db.begin() as db:
            query = sa.update(_CONVERSATIONS).where(_CONVERSATIONS.c.id == conversation_id)
            db.execute(query.values(metadata=dumps(metadata)))
        return _conversation(row.id, row.created_at, metadata)

    def delete_conversation(self, conversation_id: str, owner: str = "") -> None:
        self._conversation_row(conversation_id, owner)
        with self._db.begin() as db:
            for column in (_CONVERSATIONS.c.id, _OWNERS.c.stored_id, _ITEMS.c.owner_id, _TOOL_STATES.c.owner_id):
                db.execute(sa.delete(column.table).where(column == conversation_id))

    def conversation_history(self, conversation_id: str, owner: str = "") -> History:
        row = self._conversation_row(conversation_id, owner)
        with self._db.begin() as db:
            query = sa.update(_CONVERSATIONS).where(_CONVERSATIONS.c.id == conversation_id)
            db.execute(query.values(expires_at=self._expiry(time.time())))
            return History(_entries(db, conversation_id), row.current_date)

    def append_items(self, conversation_id: str, entries: Sequence[Entry], owner: str = "") -> None:
        self._conversation_row(conversation_id, owner)
        with self._db.begin() as db:
            self._append(db, conversation_id, entries, None)

    def conversation_entries(self, conversation_id: str, owner: str = "") -> list[Entry]:
        self._conversation_row(conversation_id, owner)
        return self._kept(conversation_id, "conversation")

    def delete_item(self, conversation_id: str, item_id: str, owner: str = "") -> Json:
        """The conversation without the item."""
        conversation = self.conversation(conversation_id, owner)
        with self._db.begin() as db:
            query = sa.delete(_ITEMS).where(
                _ITEMS.c.owner_id == conversation_id, _ITEMS.c.id == _known(item_id, "item")
            )
            if not db.execute(query).rowcount:
                raise _not_found("item", item_id)
        return conversation

    # Chat completions ------------------------------------------------------------------------------------------------

    def save_chat(self, completion: Json, messages: Sequence[Json], owner: str = "") -> None:
        """Keep a chat completion and the messages that it answered; durable on return."""
        now = time.time()
        body, sent = dumps(completion), zlib.compress(dumps(messages), 1)
        row = {"id": completion["id"], "created_at": now, "expires_at": self._expiry(now), "model": completion["model"],
               "metadata": dumps(completion["metadata"]), "body": body, "messages": sent,
               "size_bytes": len(body) + len(sent)}  # fmt: skip
        with self._db.begin() as db:
            db.execute(sa.insert(_CHATS).values(**row))
            _keep_owner(db, completion["id"], owner)
        self._count_saved()

    def chat(self, completion_id: str, owner: str = "") -> Json:
        row = self._chat_row(completion_id, owner)
        return _json(row.body) | {"metadata": _json(row.metadata)}

    def chat_messages(self, completion_id: str, owner: str = "") -> list[Json]:
        messages: list[Json] = json.loads(zlib.decompress(self._chat_row(completion_id, owner).messages))
        return messages

    def update_chat(self, completion_id: str, metadata: Json, owner: str = "") -> Json:
        row = self._chat_row(completion_id, owner)
        with self._db.begin() as db:
            db.execute(sa.update(_CHATS).where(_CHATS.c.id == row.id).values(metadata=dumps(metadata)))
        return _json(row.body) | {"metadata": metadata}

    def delete_chat(self, completion_id: str, owner: str = "") -> None:
        row = self._chat_row(completion_id, owner)
        with self._db.begin() as db:
            db.execute(sa.delete(_CHATS).where(_CHATS.c.id == row.id))
            db.execute(sa.delete(_OWNERS).where(_OWNERS.c.stored_id == row.id))

    def chats(
        self,
        limit: int,
        after: str | None,
        order: str,
        model: str | None,
        metadata: Mapping[str, str],
        owner: str = "",
    ) -> list[Json]:
        """The first ``limit`` completions of an owner behind ``after``, of a model and with these metadata if asked."""
        is_rising = order == "asc"
        place = sa.tuple_(_CHATS.c.created_at, _CHATS.c.id)
        query = sa.select(_CHATS.c.body, _CHATS.c.metadata).where(_is_of(owner, _CHATS.c.id))
        if after is not None:
            row = self._chat_row(after, owner)
            begin = sa.tuple_(sa.literal(row.created_at), sa.literal(row.id))
            query = query.where(place > begin if is_rising else place < begin)
        if model is not None:
            query = query.where(_CHATS.c.model == (model if _is_plain(model) else ""))
        columns = (_CHATS.c.created_at, _CHATS.c.id)
        query = query.order_by(*(column.asc() if is_rising else column.desc() for column in columns))
        found: list[Json] = []
        query = query if metadata else query.limit(limit)
        with self._db.connect() as db:
            for row in db.execute(query, execution_options={"yield_per": 100}):
                has = _json(row.metadata)
                if all(has.get(key) == value for key, value in metadata.items()):
                    found.append(_json(row.body) | {"metadata": has})
                    if len(found) == limit:
                        break
        return found

    # Files -----------------------------------------------------------------------------------------------------------

    def save_file(
        self, filename: str, purpose: str, data: bytes, lifetime_s: float | None = None, owner: str = ""
    ) -> Json:
        """Keep a file, no longer than anything else; durable on return."""
        now = time.time()
        expires_at = self._expiry(now) if lifetime_s is None else min(self._expiry(now), now + lifetime_s)
        file_id = new_id("file")
        row = {"id": file_id, "created_at": now, "expires_at": expires_at, "filename": filename,
               "purpose": purpose, "body": data, "size_bytes": len(data)}  # fmt: skip
        with self._db.begin() as db:
            db.execute(sa.insert(_FILES).values(**row))
            _keep_owner(db, file_id, owner)
        self._count_saved()
        return self.file(file_id, owner)

    def file(self, file_id: str, owner: str = "") -> Json:
        """Raises NotFoundError."""
        return _file(self._file_row(file_id, owner, *_OF_FILE))

    def file_content(self, file_id: str, owner: str = "") -> tuple[str, bytes]:
        """The name and the bytes of a file. Raises NotFoundError."""
        row = self._file_row(file_id, owner, _FILES.c.filename, _FILES.c.body)
        return row.filename, row.body

    def files(self, purpose: str | None = None, owner: str = "") -> list[Json]:
        """All files of an owner without their bytes, oldest first."""
        query = sa.select(*_OF_FILE).where(_is_of(owner, _FILES.c.id)).order_by(_FILES.c.created_at, _FILES.c.id)
        if purpose is not None:
            query = query.where(_FILES.c.purpose == (purpose if _is_plain(purpose) else ""))
        with self._db.connect() as db:
            return [_file(row) for row in db.execute(query)]

    def delete_file(self, file_id: str, owner: str = "") -> None:
        self._file_row(file_id, owner, _FILES.c.id)
        with self._db.begin() as db:
            db.execute(sa.delete(_FILES).where(_FILES.c.id == file_id))
            db.execute(sa.delete(_OWNERS).where(_OWNERS.c.stored_id == file_id))

    # Bounds ----------------------------------------------------------------------------------------------------------

    def sweep(self) -> None:
        """Forget what has expired, and beyond the size bound what was not used for longest."""
        now = time.time()
        with self._db.begin() as db:
            gone = _RESPONSES.c.expires_at < now
            ids = list(db.execute(sa.select(_RESPONSES.c.id).where(gone, ~_RESPONSES.c.is_running)).scalars())
            for table in (_CONVERSATIONS, _CHATS, _FILES):
                ids += db.execute(sa.select(table.c.id).where(table.c.expires_at < now)).scalars()
            if self._max_bytes:
                size = sa.func.sum(sa.func.length(_ITEMS.c.body) + sa.func.length(_ITEMS.c.spoken))
                of_conversations = sa.select(_ITEMS.c.owner_id, size.label("size_bytes")).where(
                    _ITEMS.c.kind == "conversation"
                )
                said = of_conversations.group_by(_ITEMS.c.owner_id).subquery()
                sizes = [
                    sa.select(sa.func.coalesce(sa.func.sum(t.c.size_bytes), 0))
                    for t in (_RESPONSES, _CHATS, _FILES, said)
                ]
                total = sum(int(db.execute(size).scalar_one()) for size in sizes)
                kept = sa.union_all(
                    sa.select(_RESPONSES.c.id, _RESPONSES.c.size_bytes, _RESPONSES.c.expires_at).where(
                        ~_RESPONSES.c.is_running
                    ),
                    sa.select(_CHATS.c.id, _CHATS.c.size_bytes, _CHATS.c.expires_at),
                    sa.select(_FILES.c.id, _FILES.c.size_bytes, _FILES.c.expires_at),
                    sa.select(_CONVERSATIONS.c.id, said.c.size_bytes, _CONVERSATIONS.c.expires_at).join(
                        said, said.c.owner_id == _CONVERSATIONS.c.id
                    ),
                )
                oldest = kept.order_by("expires_at")
                for row in db.execute(oldest) if total > self._max_bytes else ():
                    if total <= self._max_bytes:
                        break
                    ids.append(row.id)
                    total -= row.size_bytes
            for begin in range(0, len(ids), 500):
                some = ids[begin : begin + 500]
                db.execute(sa.delete(_ITEMS).where(_ITEMS.c.owner_id.in_(some)))
                db.execute(sa.delete(_TOOL_STATES).where(_TOOL_STATES.c.owner_id.in_(some)))
                db.execute(sa.delete(_RESPONSES).where(_RESPONSES.c.id.in_(some)))
                db.execute(sa.delete(_CONVERSATIONS).where(_CONVERSATIONS.c.id.in_(some)))
                db.execute(sa.delete(_OWNERS).where(_OWNERS.c.stored_id.in_(some)))
                db.execute(sa.delete(_CHATS).where(_CHATS.c.id.in_(some)))
                db.execute(sa.delete(_FILES).where(_FILES.c.id.in_(some)))

    # Parts of these --------------------------------------------------------------------------------------------------

    def _expiry(self, now: float) -> float:
        return now + self._ttl_s if self._ttl_s else _NEVER

    def _count_saved(self) -> None:
        self._num_saved += 1
        if self._num_saved % 100 == 0:
            self.sweep()

    def _response_row(self, response_id: str, owner: str, *columns: sa.Column[Any]) -> Any:
        return self._row("response", _RESPONSES.c.id, response_id, owner, *columns)

    def _conversation_row(self, conversation_id: str, owner: str) -> Any:
        return self._row("conversation", _CONVERSATIONS.c.id, conversation_id, owner, *_CONVERSATIONS.c)

    def _chat_row(self, completion_id: str, owner: str) -> Any:
        return self._row("chat completion", _CHATS.c.id, completion_id, owner, *_CHATS.c)

    def _file_row(self, file_id: str, owner: str, *columns: sa.Column[Any]) -> Any:
        return self._row("file", _FILES.c.id, file_id, owner, *columns)

    def _row(self, what: str, id_column: sa.Column[Any], one: str, owner: str, *columns: sa.Column[Any]) -> Any:
        """What is stored under an id, if it is open to the owner. Raises NotFoundError."""
        # No other id was ever given out, and no other can a database be asked for.
        query = sa.select(*columns).where(id_column == one, _is_open_to(owner, id_column))
        row = self._one(query) if _is_plain(one) else None
        if row is None:
            raise _not_found(what, one)
        return row

    def _one(self, query: sa.Select[Any]) -> Any:
        with self._db.connect() as db:
            return db.execute(query).first()

    def _kept(self, owner_id: str, kind: str) -> list[Entry]:
        query = sa.select(_ITEMS).where(_ITEMS.c.owner_id == owner_id, _ITEMS.c.kind == kind)
        with self._db.connect() as db:
            return [_entry(row) for row in db.execute(query.order_by(_ITEMS.c.position))]

    def _create(
        self, db: Connection, metadata: Json, entries: Sequence[Entry], current_date: str | None, owner: str
    ) -> Json:
        conversation_id, now = new_id("conv"), time.time()
        row = {"id": conversation_id, "created_at": now, "metadata": dumps(metadata)}
        db.execute(sa.insert(_CONVERSATIONS).values(**row, expires_at=self._expiry(now)))
        _keep_owner(db, conversation_id, owner)
        self._append(db, conversation_id, entries, current_date)
        return _conversation(conversation_id, now, metadata)

    def _has_words(self, db: Connection, conversation: Json, words: Sequence[str]) -> bool:
        text = " ".join(str(value) for value in conversation["metadata"].values()).casefold()
        missing = [word for word in words if word not in text]
        if missing:
            bodies = db.execute(sa.select(_ITEMS.c.body).where(_ITEMS.c.owner_id == conversation["id"])).scalars()
            text = "\n".join(_said(_json(body)) for body in bodies).casefold()
            missing = [word for word in missing if word not in text]
        return not missing

    def _append(self, db: Connection, owner_id: str, entries: Sequence[Entry], current_date: str | None) -> None:
        # The row is locked first: two responses may end at the same time.
        values = {"current_date": current_date, "expires_at": self._expiry(time.time())}
        if not db.execute(sa.update(_CONVERSATIONS).where(_CONVERSATIONS.c.id == owner_id).values(**values)).rowcount:
            raise _not_found("conversation", owner_id)
        last = sa.select(sa.func.coalesce(sa.func.max(_ITEMS.c.position), -1)).where(_ITEMS.c.owner_id == owner_id)
        rows = _rows(owner_id, "conversation", entries, db.execute(last).scalar_one() + 1)
        if rows:
            db.execute(sa.insert(_ITEMS), rows)


def _open_sqlite(url: str) -> sa.Engine:
    path = sa.make_url(url).database
    if path and path != ":memory:":
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # Conversations are for the owner's eyes; SQLite gives its log the same mode.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        engine = sa.create_engine(url)
    else:
        engine = sa.create_engine(url, poolclass=sa.StaticPool, connect_args={"check_same_thread": False})

    @sa.event.listens_for(engine, "connect")
    def _set_up(connection: Any, _record: Any) -> None:
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "busy_timeout=10000"):
            connection.execute(f"PRAGMA {pragma}")

    return engine


def _without_password(url: str) -> str:
    try:
        return sa.make_url(url).render_as_string(hide_password=True)
    except sa.exc.ArgumentError:
        return repr(url)


def _rows(owner_id: str, kind: str, entries: Sequence[Entry], first: int = 0) -> list[Json]:
    return [
        {
            "owner_id": owner_id,
            "kind": kind,
            "position": first + i,
            "id": entry.item["id"],
            "body": dumps(entry.item),
            "spoken": zlib.compress(dumps([spoken.to_dict() for spoken in entry.spoken]), 1),
        }
        for i, entry in enumerate(entries)
    ]


def _keep_owner(db: Connection, stored_id: str, owner: str) -> None:
    db.execute(sa.delete(_OWNERS).where(_OWNERS.c.stored_id == stored_id))
    db.execute(sa.insert(_OWNERS).values(stored_id=stored_id, owner=owner))


def _is_of(owner: str, stored_id: sa.Column[Any]) -> sa.ColumnElement[bool]:
    """Whether it was stored by this owner; what no owner is known of belongs to ""."""
    known = sa.select(_OWNERS.c.owner).where(_OWNERS.c.stored_id == stored_id).scalar_subquery()
    return sa.func.coalesce(known, "") == owner


def _is_open_to(owner: str, stored_id: sa.Column[Any]) -> sa.ColumnElement[bool]:
    """Whether this owner may use what it has the id of: its own, and what was stored without a key."""
    of_others = sa.select(_OWNERS.c.owner).where(_OWNERS.c.stored_id == stored_id, _OWNERS.c.owner.not_in(("", owner)))
    return ~of_others.exists()


def _keep_tool_state(db: Connection, owner_id: str | None, body: bytes | None) -> None:
    if owner_id is None or body is None:
        return
    db.execute(sa.delete(_TOOL_STATES).where(_TOOL_STATES.c.owner_id == owner_id))
    db.execute(sa.insert(_TOOL_STATES).values(owner_id=owner_id, body=body))


def _entries(db: Connection, owner_id: str) -> list[Entry]:
    # "input" comes before "output".
    query = sa.select(_ITEMS).where(_ITEMS.c.owner_id == owner_id).order_by(_ITEMS.c.kind, _ITEMS.c.position)
    return [_entry(row) for row in db.execute(query)]


def _said_before(db: Connection, response_id: str) -> list[Entry]:
    """What a conversation had said before a response that was made in it, as far as it still has that."""
    response = _json(db.execute(sa.select(_RESPONSES.c.body).where(_RESPONSES.c.id == response_id)).scalar_one())
    conversation_id = (response.get("conversation") or {}).get("id")
    if conversation_id is None:
        return []
    own = {entry.item["id"] for entry in _entries(db, response_id)}
    said = _entries(db, conversation_id)
    begin = next((i for i, entry in enumerate(said) if entry.item["id"] in own), 0)
    return said[:begin]


def _entry(row: Any) -> Entry:
    spoken = json.loads(zlib.decompress(row.spoken))
    return Entry(_json(row.body), tuple(Spoken.from_dict(one) for one in spoken))


def _said(item: Json) -> str:
    """The text of a message; nothing of other items."""
    content = item.get("content") if item.get("type") == "message" else None
    parts = content if isinstance(content, list) else []
    return "\n".join(str(part["text"]) for part in parts if isinstance(part, dict) and "text" in part)


def _json(data: bytes) -> Json:
    loaded: Json = json.loads(data)
    return loaded


def _conversation(conversation_id: str, created_at: float, metadata: Json) -> Json:
    return {
        "id": conversation_id,
        "object": "conversation",
        "created_at": int(created_at),
        "metadata": metadata,
    }


_OF_FILE = [column for column in _FILES.c if column.name != "body"]


def _file(row: Any) -> Json:
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.size_bytes,
        "created_at": int(row.created_at),
        "expires_at": int(row.expires_at) if row.expires_at < _NEVER else None,
        "filename": row.filename,
        "purpose": row.purpose,
        "status": "processed",
    }


def _is_plain(one: object) -> bool:
    return isinstance(one, str) and len(one) <= 512 and one.isascii() and one.isprintable()


def _known(one: str, what: str) -> str:
    """An id that a database can be asked for; no other was ever given out."""
    if not _is_plain(one):
        raise _not_found(what, one)
    return one


def _not_found(what: str, one: str) -> NotFoundError:
    return NotFoundError(f"{what} {one[:80]!r} not found; it was not stored, was deleted, or has expired")
