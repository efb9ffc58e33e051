"""Bytes to a client that may be slow, silent or gone."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from ossia.errors import OssiaError
from ossia.responses.schema import dumps, error_object

T = TypeVar("T")

KEEPALIVE_S = 15.0
# A client that takes nothing for so long is taken for gone: it would hold its turn for ever.
STALL_S = 120.0
# Nothing is sent sooner than this after the last: faster streams than a reader's eye are sent in larger pieces.
_MIN_GAP_S = 0.002
_KEEPALIVE = b": keepalive\n\n"
# Bytes that may wait for a slow client before the response itself waits.
_MAX_BUFFERED = 1 << 20


def caller_of(request: Request) -> str:
    """The name of the key that the request was made with; "" without keys."""
    return request.scope.get("ossia.caller") or ""


def error_chunk(error: OssiaError) -> bytes:
    """An error in a stream that has begun, as Chat Completions and Completions have it."""
    return b"data: %b\n\n" % dumps({"error": {**error_object(error), "type": error.type, "param": None}})


class JSONResponse(Response):
    """Our own encoder: half characters in it must not become an error of the server's."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)


class EventStream(Response):
    """Sends the chunks of a generator as server-sent events, what is ready at once in one piece.

    Comments keep the connection open while nothing is said. When the client leaves, the generator is closed. Where the
    generator raises, so does this, and the connection breaks: a stream that ends in good order would look complete.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncGenerator[bytes, None], headers: Mapping[str, str] | None = None) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._chunks = chunks
        self._buffer: list[bytes] = []
        self._num_buffered = 0
        self._ready = asyncio.Event()
        self._drained = asyncio.Event()
        self._is_done = self._is_broken = False
        # When the piece that is being sent was begun.
        self._sending_since_s = math.inf

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks = [asyncio.ensure_future(work) for work in (self._write(send), self._read(), self._until_gone(receive))]
        writing, reading, gone = tasks
        watching = [asyncio.ensure_future(work) for work in (self._keep_alive(), self._until_stalled())]
        try:
            await asyncio.wait([writing, gone, watching[1]], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (*tasks, *watching):
                task.cancel()
            await asyncio.gather(*tasks, *watching, return_exceptions=True)
            await self._chunks.aclose()
        for task in (reading, writing):
            if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, OSError):
                raise error

    async def _read(self) -> None:
        try:
            async for chunk in self._chunks:
                self._put(chunk)
                if self._num_buffered > _MAX_BUFFERED:
                    self._drained.clear()
                    await self._drained.wait()
        except Exception:
            self._is_broken = True
            raise
        finally:
            self._is_done = True
            self._ready.set()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        clock = asyncio.get_running_loop().time
        sent_s = 0.0
        while True:
            await self._ready.wait()
            if not self._is_done and (gap_s := sent_s + _MIN_GAP_S - clock()) > 0:
                await asyncio.sleep(gap_s)
            sent_s = clock()
            self._ready.clear()
            data, self._buffer, self._num_buffered = b"".join(self._buffer), [], 0
            self._drained.set()
            if data:
                self._sending_since_s = sent_s
                await send({"type": "http.response.body", "body": data, "more_body": True})
                self._sending_since_s = math.inf
            if self._is_done and not self._buffer:
                if not self._is_broken:
                    await send({"type": "http.response.body", "body": b"", "more_body": False})
                return

    async def _keep_alive(self) -> None:
        while not self._is_done:
            await asyncio.sleep(KEEPALIVE_S)
            if not self._buffer:
                self._put(_KEEPALIVE)

    async def _until_stalled(self) -> None:
        # One look now and then: a timeout around each piece would cost more than the piece.
        clock = asyncio.get_running_loop().time
        while clock() - self._sending_since_s < STALL_S:
            await asyncio.sleep(STALL_S / 8)

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    def _put(self, data: bytes) -> None:
        self._buffer.append(data)
        self._num_buffered += len(data)
        self._ready.set()


class ClientGone(Exception):
    """The client left before its answer was ready; nobody is there to be told."""


async def while_there(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Do ``work`` as long as the client waits for it. Raises ClientGone."""
    working = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientGone
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def opened(request: Request, chunks: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The same generator, its first chunk already there: what it raises before that is raised here."""
    try:
        first = await while_there(request, _first(chunks))
    except BaseException:
        await chunks.aclose()
        raise

    async def all_of_them() -> AsyncGenerator[T, None]:
        try:
            yield first
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()

    return all_of_them()


async def together(work: list[Any]) -> list[Any]:
    """All at once; when one fails, or nobody waits any more, all end."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def merged(sources: list[AsyncGenerator[Any, None]]) -> AsyncGenerator[tuple[int, Any], None]:
    """What several generators yield, as it comes. Raises what one of them raises."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as only:
            async for item in only:
                yield 0, item
        return
    queue: asyncio.Queue[tuple[int, Any, BaseException | None]] = asyncio.Queue(64)
    over = object()

    async def read(index: int) -> None:
        try:
            async with aclosing(sources[index]) as source:
                async for item in source:
                    await queue.put((index, item, None))
            await queue.put((index, over, None))
        except Exception as error:
            await queue.put((index, over, error))

    tasks = [asyncio.ensure_future(read(index)) for index in range(len(sources))]
    try:
        num_open = len(tasks)
        while num_open:
            index, item, error = await queue.get()
            if error is not None:
                raise error
            if item is over:
                num_open -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _first(chunks: AsyncGenerator[T, None]) -> T:
    return await anext(chunks)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
