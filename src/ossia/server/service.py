"""What all endpoints share: the model, the store, the limits, and the responses that are under way.

begin    request -> Run                     history looked up, model checked
choices  Runs -> events                     a turn taken for all; stored before the last event is told
start    Run -> Live                        in the background: events kept for whoever follows
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Container, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from pydantic import BaseModel

from ossia.engine import EngineStats
from ossia.errors import InputError, ModelNotFoundError, OssiaError
from ossia.responses.convert import Entry, History
from ossia.responses.events import DONE, Event, sse
from ossia.responses.loop import Extras, Model, Phase, Prepared, Run, prepare
from ossia.responses.schema import PromptRequest, ResponseRequest, check_request
from ossia.responses.toolbox import Toolboxes
from ossia.responses.tools import Toolbox
from ossia.server.adapters import Adapters
from ossia.server.limits import Admission, Keys, Rates
from ossia.server.metrics import Metrics, Watch
from ossia.server.store import Store, Stored
from ossia.server.stream import merged
from ossia.server.tracing import Tracing, current_trace

_log = logging.getLogger(__name__)
T = TypeVar("T")

# What is read beside the event loop from this many characters on: it is tokenization that takes time.
_LONG_INPUT_CHARS = 50_000
# Names of tools and fields that the log has told of already.
_MAX_PASSED_BY = 1_000


class Live:
    """A background response under way: its events so far, as bytes, for any number of followers."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.sent: list[bytes] = []
        self.task: asyncio.Task[None] | None = None
        # Whether the response is complete and being stored.
        self.is_ending = False
        self.is_done = False
        self._news = asyncio.Event()

    def tell(self, data: bytes) -> None:
        self.sent.append(data)
        self._wake()

    def end(self) -> None:
        self.is_done = True
        self._wake()

    def leave(self) -> None:
        """Stop making the response, unless it is complete."""
        if self.task is not None and not self.is_ending:
            self.task.cancel()

    async def follow(self, begin: int) -> AsyncGenerator[bytes, None]:
        """Events from number ``begin`` on, as they come, to the end."""
        position = begin
        while True:
            while position < len(self.sent):
                yield self.sent[position]
                position += 1
            if self.is_done:
                yield DONE
                return
            await self._news.wait()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()


class Service:
    """One model, served."""

    def __init__(
        self,
        model: Model,
        store: Store,
        *,
        aliases: Iterable[str] = (),
        keys: Keys | None = None,
        rates: Rates | None = None,
        admission: Admission | None = None,
        max_request_bytes: int = 32 << 20,
        tracing: Tracing | None = None,
        tools: Toolboxes | None = None,
        adapters: Adapters | None = None,
        created_at: int = 0,
        refuses_pages: bool = False,
        context: int = 0,
        notice: str = "",
    ) -> None:
        """``refuses_pages`` is for a server that is open to this machine: pages from elsewhere are not of it.

        ``notice`` is what people should know of the model before they ask it.
        """
        self.model, self.store = model, store
        self.own_names = {model.name, *aliases}
        self.adapters = adapters
        self.keys = keys or Keys()
        self.rates = rates or Rates(0)
        self.admission = admission or Admission(64, 256)
        self.max_request_bytes = max_request_bytes
        self.tracing = tracing
        self.tools = tools or Toolboxes()
        self.tools.files = self._file
        self.created_at = created_at
        self.refuses_pages = refuses_pages
        # Tokens that prompt and answer may have together; 0 where that is not known.
        self.context = context
        self.notice = notice
        self.metrics = Metrics()
        self.live: dict[str, Live] = {}
        self.is_stopping = False
        self._passed_by: set[tuple[str, str]] = set()
        self.metrics.gauge("ossia_running", "Requests under way", lambda: self.admission.num_running)
        self.metrics.gauge("ossia_tasks", "Tasks of the event loop", lambda: len(asyncio.all_tasks()))
        self.metrics.gauge("ossia_background", "Background responses under way", lambda: len(self.live))
        self.metrics.gauge("ossia_queued", "Requests that wait for their turn", lambda: self.admission.num_queued)

    def watch(self, stats: Callable[[], EngineStats]) -> None:
        """Tell of an engine's queue, memory and cache in the metrics."""
        gauge = self.metrics.gauge
        gauge("ossia_engine_running", "Sequences under way", lambda: stats().num_running)
        gauge("ossia_engine_waiting", "Sequences that wait for memory", lambda: stats().num_waiting)
        gauge("ossia_kv_blocks", "Blocks for keys and values", lambda: stats().num_full_blocks)
        gauge("ossia_adapters", "Adapters that may be chosen", lambda: stats().num_adapters)
        gauge("ossia_adapter_bytes", "Memory that adapters take", lambda: stats().adapter_bytes)
        gauge("ossia_kv_blocks_free", "Blocks that hold nothing needed", lambda: stats().num_free_full_blocks)
        counter = self.metrics.counter
        counter("ossia_drafted_tokens", "Tokens computed ahead", lambda: stats().totals.num_drafted_tokens)
        counter("ossia_accepted_tokens", "Of these, those sampled then", lambda: stats().totals.num_accepted_tokens)

    @property
    def names(self) -> set[str]:
        """What clients may call: the model's own names, and its adapters."""
        return self.own_names | (self.adapters.offered.keys() if self.adapters is not None else set())

    def model_of(self, name: str | None) -> Model:
        """The model that a request names, through an adapter if it names one. Raises ModelNotFoundError."""
        if not name or name in self.own_names:
            return self.model
        offered = self.adapters.offered.get(name) if self.adapters is not None else None
        if offered is None:
            served = ", ".join(repr(one) for one in (self.model.name, *sorted(self.names - self.own_names)))
            told = f"model {name[:200]!r} is not served here; this server has {served}"
            raise ModelNotFoundError(told, param="model")
        return offered.model

    def ignored(self, body: BaseModel, tools: Sequence[str] = (), hints: Container[str] = ()) -> dict[str, str]:
        """Headers that tell which tools and fields of a request were passed by; the log tells of each once."""
        fields = [name for name in body.model_extra or {} if name not in hints]
        headers = {}
        for what, names in (("tools", tools), ("fields", fields)):
            if names:
                plain = [name if name.isascii() and name.isprintable() else "?" for name in names]
                headers[f"x-ossia-ignored-{what}"] = ", ".join(plain)[:500]
                new = [name for name in plain if (what, name) not in self._passed_by]
                if new and len(self._passed_by) < _MAX_PASSED_BY:
                    self._passed_by |= {(what, name) for name in new}
                    _log.info("%s of clients that change nothing here: %s", what, ", ".join(new)[:500])
        return headers

    async def begin(
        self, request: ResponseRequest, extras: Extras | None = None, *, owner: str, can_ask: bool = True
    ) -> Run:
        """Look up what the request of ``owner`` refers to, and read it. Raises what is wrong with it.

        Without ``can_ask`` the form of the API has no way to ask a person for an approval, or to come back.
        """
        model = self.model_of(request.model)
        check_request(request)
        history, references = await self.history(request, owner), await self.references(request, owner)
        toolbox = await self.toolbox(request, history, owner, can_ask=can_ask)
        return await _beside_if(
            _is_long(request, history),
            lambda: Run(request, model, history, references=references, extras=extras, toolbox=toolbox, owner=owner),
        )

    async def toolbox(
        self, request: PromptRequest, history: History, owner: str, *, can_ask: bool = True
    ) -> Toolbox | None:
        """The tools of ours that the request declares, as the chain has left them."""
        before = request.previous_response_id or request.conversation_id
        if not (request.tools or before):
            return None
        state = await self.store.run(self.store.tool_state, before) if before else None
        items = [entry.item for entry in history.entries]
        items += [item for item in request.input_items if isinstance(item, dict)]
        return await self.tools.open(request, items, state, owner=owner, can_ask=can_ask)

    async def prepared(self, request: PromptRequest, owner: str) -> tuple[History, Prepared]:
        """The same for a request that makes no response: its history, and what it says after it."""
        model = self.model_of(request.model)
        check_request(request)
        history, references = await self.history(request, owner), await self.references(request, owner)
        toolbox = await self.toolbox(request, history, owner) or model.toolbox()
        read = lambda: prepare(request, model, history, references, toolbox)  # noqa: E731
        return history, await _beside_if(_is_long(request, history), read)

    async def _file(self, file_id: str, owner: str) -> tuple[str, bytes]:
        return await self.store.run(self.store.file_content, file_id, owner)

    async def references(self, request: PromptRequest, owner: str) -> Mapping[str, Entry]:
        """The stored items that a request refers to."""
        ids = [
            item["id"]
            for item in request.input_items
            if isinstance(item, dict) and item.get("type") == "item_reference" and isinstance(item.get("id"), str)
        ]
        return await self.store.run(self.store.references, ids, owner) if ids else {}

    def live_of(self, response_id: str, owner: str) -> Live | None:
        """The background response under way that has this id, if the owner may know of it."""
        live = self.live.get(response_id)
        return live if live is not None and live.run.owner in ("", owner) else None

    async def history(self, request: PromptRequest, owner: str) -> History:
        if request.previous_response_id is not None and request.conversation is not None:
            return History()  # Refused when the request is read.
        if request.previous_response_id is not None:
            if self.live_of(request.previous_response_id, owner) is not None:
                raise InputError("the previous response is not done yet", param="previous_response_id")
            return await self.store.run(self.store.history, request.previous_response_id, owner)
        if request.conversation is not None:
            return await self.store.run(self.store.conversation_history, request.conversation_id, owner)
        return History()

    @asynccontextmanager
    async def turn(self, phases: Sequence[list[Phase]]) -> AsyncIterator[None]:
        """The turn of a request, for all of its choices; the wait for it goes to the phases of each.

        Raises LimitError.
        """
        queued_ns = time.time_ns()
        async with self.admission.slot():
            waited = Phase("queue", queued_ns, time.time_ns())
            for of_choice in phases:
                of_choice.append(waited)
            yield

    async def choices(self, runs: Sequence[Run]) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of responses that are the choices of one request. Raises LimitError before the first."""
        sources = [self._made(run, None) for run in runs]
        async with self.turn([run.phases for run in runs]), aclosing(merged(sources)) as events:
            async for index, (event, _) in events:
                yield index, event

    async def encoded(self, run: Run) -> AsyncGenerator[bytes, None]:
        """Events as they go over the wire, to the end of the stream; kept as they were if the response is stored."""
        async with self.turn([run.phases]), aclosing(self._made(run, [])) as events:
            async for _, data in events:
                yield data
        yield DONE

    async def _made(self, run: Run, sent: list[bytes] | None) -> AsyncGenerator[tuple[Event, bytes], None]:
        watch = Watch(self.metrics)
        keeps, pads, data = bool(run.response["store"]), run.request.wants_padding, b""
        async with aclosing(run.events()) as events:
            try:
                async for event in events:
                    if sent is not None:
                        data = sse(event, pads=pads)
                    if event.is_terminal:
                        event, data = await self._kept(run, event, data, sent)
                        watch.done(run.response)
                    elif watch.first_s is None and event.type.endswith(".delta"):
                        watch.token()
                    if sent is not None and keeps:
                        sent.append(data)
                    yield event, data
            finally:
                await events.aclose()
                if run.toolbox is not None:
                    await asyncio.shield(run.toolbox.close())
                self.note(run.phases, run.response["id"])

    def note(self, phases: Sequence[Phase], response_id: str) -> None:
        """Tell where the time of a response went."""
        for phase in phases:
            if phase.name == "queue":
                self.metrics.queue_s.observe((phase.end_ns - phase.begin_ns) / 1e9)
        if (trace := current_trace.get()) is not None:
            trace.add(phases, response_id)

    async def within_limits(self, work: Coroutine[Any, Any, T]) -> T:
        """Work that is no response of its own, in its turn. Raises LimitError."""
        try:
            async with self.admission.slot():
                return await work
        finally:
            work.close()

    async def finish(self, runs: Sequence[Run]) -> None:
        """Make the choices of a request. Raises what made one of them fail."""
        async with aclosing(self.choices(runs)) as events:
            async for index, _ in events:
                if (error := runs[index].error) is not None:
                    raise error

    async def start(self, run: Run) -> Live:
        """Make a response in the background. It is in the store when this returns."""
        # Taken before anything is waited for: of a burst each is refused here, or made.
        turn = self.admission.reserve()
        try:
            await self.store.run(self.store.save, Stored(run.response, run.input, owner=run.owner))
        except BaseException:
            self.admission.give_back(turn)
            raise
        live = self.live[run.response["id"]] = Live(run)
        live.task = asyncio.create_task(self._make(live, turn))
        return live

    async def _make(self, live: Live, turn: asyncio.Future[None]) -> None:
        run, watch = live.run, Watch(self.metrics)
        try:
            async with aclosing(run.events(self.admission.slot(turn))) as events:
                async for event in events:
                    data = sse(event, pads=run.request.wants_padding)
                    if event.is_terminal:
                        live.is_ending = True
                        _, data = await self._kept(run, event, data, live.sent)
                    elif event.type.endswith(".delta"):
                        watch.token()
                    live.tell(data)
        except asyncio.CancelledError:
            *before, last = run.cancel()
            told = [sse(event) for event in before]
            _, data = await self._kept(run, last, sse(last), [*live.sent, *told])
            for one in (*told, data):
                live.tell(one)
        finally:
            watch.done(run.response)
            self.note(run.phases, run.response["id"])
            live.end()
            del self.live[run.response["id"]]

    async def cancel(self, live: Live) -> None:
        """Stop a background response; it is stored when this returns, as cancelled if it was not complete yet."""
        assert live.task is not None
        live.leave()
        await asyncio.wait([live.task])

    async def _kept(self, run: Run, last: Event, data: bytes, sent: list[bytes] | None) -> tuple[Event, bytes]:
        """Store a response before its ``last`` event is told, whose bytes are ``data``; what is told then.

        A response that cannot be kept has failed: a client is not told that something is there which is not.
        """
        try:
            await self._save(run, None if sent is None else [*sent, data])
            return last, data
        except Exception as error:
            _log.exception("response=%s could not be kept", run.response["id"])
            told = (
                error
                if isinstance(error, OssiaError)
                else OssiaError("the response could not be stored; the server's log tells more")
            )
        last = run.fail(told)
        data = sse(last)
        try:
            await self._save(run, None if sent is None else [*sent, data])
        except Exception:
            _log.exception("response=%s could not be kept as failed either", run.response["id"])
        return last, data

    async def _save(self, run: Run, sent: list[bytes] | None) -> None:
        response, failed = run.response, run.response["status"] in ("failed", "cancelled")
        conversation_id = None if failed else run.request.conversation_id
        state = None
        if run.toolbox is not None and (response["store"] or conversation_id is not None):
            state = await asyncio.to_thread(run.toolbox.state)
        if response["store"]:
            stored = Stored(
                response,
                run.input,
                run.output,
                run.current_date if run.is_pending else None,
                None if sent is None else b"".join(sent),
                conversation_id,
                state,
                run.owner,
            )
            await self.store.run(self.store.save, stored)
        elif conversation_id is not None:
            await self.store.run(self.store.append_items, conversation_id, [*run.input, *run.output], run.owner)
            if state is not None:
                await self.store.run(self.store.keep_tool_state, conversation_id, state)

    async def stop(self, patience_s: float) -> None:
        """Let background responses finish, and cancel those that take longer."""
        self.is_stopping = True
        lives = {live.task: live for live in self.live.values() if live.task is not None}
        if lives:
            _, late = await asyncio.wait(lives, timeout=patience_s)
            for task in late:
                lives[task].leave()
            if late:
                await asyncio.wait(late)
        await self.tools.close()
        self.store.close()
        if self.tracing is not None:
            await asyncio.to_thread(self.tracing.close)


async def beside_if_long(given: object, work: Callable[[], T]) -> T:
    """Do work that takes as long as what was ``given`` is, JSON values: beside the event loop if that is long."""
    return await _beside_if(_num_chars(given) > _LONG_INPUT_CHARS, work)


async def _beside_if(is_long: bool, work: Callable[[], T]) -> T:
    return await asyncio.to_thread(work) if is_long else work()


def _is_long(request: PromptRequest, history: History) -> bool:
    # Tools and schemas are compiled into a grammar; a user's words in a history are made tokens each time.
    items = [*(entry.item for entry in history.entries), *request.input_items]
    has_forms = bool(request.tools or request.text)
    return has_forms or len(items) > 8 or _num_chars([request.instructions, *items]) > _LONG_INPUT_CHARS


def _num_chars(value: object) -> int:
    """Characters of all texts in JSON values; of a number, one."""
    num, left = 0, [value]
    while left:
        match left.pop():
            case str() as text:
                num += len(text)
            case list() as values:
                left += values
            case dict() as fields:
                left += fields.values()
            case int() | float():
                num += 1
    return num


def split(events: bytes) -> list[bytes]:
    """Stored events, one by one."""
    return [block + b"\n\n" for block in events.split(b"\n\n")[:-1]]
