"""HTTP as uvicorn reads it, with bounds on what comes before a request is known: its head's size and time.

Sources  RFC 9112 section 2.2 (a head that cannot be read), RFC 6585 section 5 (431).
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ossia.responses.schema import dumps

MAX_HEAD_BYTES = 64 << 10
# From the connection, or the first byte of a later request, to the end of its head.
HEAD_S = 30.0


class Protocol(HttpToolsProtocol):
    """One connection."""

    _num_head_bytes = 0
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._timer = self.loop.call_later(HEAD_S, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._timer is not None:
            # Still in the head: what lies in the parser's memory is all that came.
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._refuse(431, f"the request's head is larger than {MAX_HEAD_BYTES} bytes; send fewer headers")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._num_head_bytes = 0
        if self._timer is None:
            self._timer = self.loop.call_later(HEAD_S, self._too_slow)

    def on_headers_complete(self) -> None:
        self._stop_timer()
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "what came is no HTTP/1.1 request; over TLS, speak to the proxy in front of this server")

    def _refuse(self, status: int, message: str) -> None:
        self._stop_timer()
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = dumps({"error": error})
        head = f"HTTP/1.1 {status} Refused\r\nconnection: close\r\ncontent-type: application/json\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    def _too_slow(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
