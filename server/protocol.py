"""HTTP on our ports: uvicorn's own protocol, with an end to its patience.

uvicorn waits as long as a client likes: for the head of a request, for its body, for room to write the answer. A client
that sends a byte now and then would hold its connection and whatever the request holds for ever; here it is cut off.
"""

from __future__ import annotations

import asyncio
import http
import uuid
from enum import StrEnum
from typing import Any

import structlog
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from server.envelope import ORIGIN
from server.errors import BadRequest, answer_to, to_json

MIN_BYTES_PER_S = 500
MAX_HEAD_BYTES = 64 * 1024  # fal's own limit for headers is a quarter of it

log = structlog.get_logger()


class Awaited(StrEnum):
    """What the client owes."""

    HEAD = "head"  # of its next request, from the first byte on
    BODY = "body"
    NOTHING = "nothing"  # it waits for us, or rests between two requests, which uvicorn's keep-alive limits


class PatientProtocol(HttpToolsProtocol):
    """A connection whose client must get on: a whole head within `patience_s`, then 500 bytes a second on average.

    The average is taken over `patience_s`. What we do not read or write at the moment is not held against the client.
    """

    def __init__(self, *arguments: Any, patience_s: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._patience_s = patience_s
        self._awaited = Awaited.HEAD
        self._num_seen = 0
        self._timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._unwritten = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Wait for the first request."""
        super().connection_made(transport)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of the timers."""
        self._await(Awaited.NOTHING)
        self._stop_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what came, and watch for the rest."""
        self._num_seen += len(data)
        super().data_received(data)
        if self._awaited is not Awaited.NOTHING:
            if self._awaited is Awaited.HEAD and self._num_seen > MAX_HEAD_BYTES:
                self._refuse(431, f"The request's head is larger than {MAX_HEAD_BYTES} bytes")
            self._watch()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._await(Awaited.HEAD)

    def on_headers_complete(self) -> None:
        """The head is there."""
        super().on_headers_complete()
        self._await(Awaited.BODY)

    def on_message_complete(self) -> None:
        """The request is there."""
        super().on_message_complete()
        self._await(Awaited.NOTHING)

    def pause_writing(self) -> None:
        """The client reads slower than we write: see to it that it reads at all."""
        super().pause_writing()
        self._unwritten = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(self._patience_s, self._check_reading)

    def resume_writing(self) -> None:
        """It has read."""
        super().resume_writing()
        self._stop_write_timer()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP gets an answer like any other error."""
        self._refuse(400, msg)

    def _await(self, what: Awaited) -> None:
        self._awaited, self._num_seen = what, 0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self) -> None:
        if self._timer is None and not self.transport.is_closing():
            self._timer = self.loop.call_later(self._patience_s, self._check_sending)

    def _check_sending(self) -> None:
        self._timer = None
        if self._awaited is Awaited.HEAD:
            log.info("client_too_slow", awaited=self._awaited, client=self.client)
            self._refuse(408, f"The request's head did not arrive within {self._patience_s:g} s")
        elif self.flow.read_paused or self._num_seen >= MIN_BYTES_PER_S * self._patience_s:
            self._num_seen = 0
            self._watch()
        else:
            # The route that reads the body learns that the client is gone.
            log.info("client_too_slow", awaited=self._awaited, client=self.client)
            self.transport.abort()

    def _check_reading(self) -> None:
        left = self.transport.get_write_buffer_size()
        if self._unwritten - left >= MIN_BYTES_PER_S * self._patience_s:
            self._unwritten = left
            self._write_timer = self.loop.call_later(self._patience_s, self._check_reading)
        else:
            log.info("client_too_slow", awaited="reading", client=self.client)
            self.transport.abort()

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _refuse(self, status: int, detail: str) -> None:
        """Answer what never became a request, and hang up."""
        body = to_json(answer_to(BadRequest(detail))[1])
        head = (
            f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\nx-fal-request-id: {uuid.uuid4()}\r\n"
            f"{ORIGIN[0].decode()}: {ORIGIN[1].decode()}\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
