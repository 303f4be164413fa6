"""A CONNECT proxy with one destination: clients keep fal's own host names, uploads included, and reach this server.

fal's Python client has the hosts of its uploads built in. With `HTTPS_PROXY` pointing here and `SSL_CERT_FILE` at our
authority it needs no other change: the certificate of our TLS port covers fal's names, so the bytes are passed on as
they come. No name is looked up and no socket is opened but to that port; every other target is refused.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from http import HTTPStatus

import structlog

from server.hosts import FAL_HOSTS, MEDIA_HOSTS
from server.settings import Settings

TARGETS = frozenset(f"{host}:443" for host in (*FAL_HOSTS, *MEDIA_HOSTS))
HEAD_S = 10.0
IDLE_S = 3600.0  # a synchronous run says nothing until its picture is done
MAX_HEAD_BYTES = 16 * 1024
CHUNK_BYTES = 64 * 1024
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}

log = structlog.get_logger()


@contextlib.asynccontextmanager
async def fal_proxy(settings: Settings) -> AsyncIterator[None]:
    """Listen while the context lasts, unless the settings turn it off; open connections end with it."""
    if not settings.fal_proxy_port:
        yield
        return
    proxy = FalProxy(EVERYWHERE.get(settings.host, settings.host), settings.tls_port)
    server = await asyncio.start_server(proxy.serve, settings.host, settings.fal_proxy_port, limit=MAX_HEAD_BYTES)
    try:
        yield
    finally:
        server.close()
        await proxy.close()


def refusal(head: bytes) -> HTTPStatus | None:
    """Why a request is not served; None for a CONNECT to one of fal's names."""
    words = head.partition(b"\r\n")[0].decode("latin-1").split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        return HTTPStatus.BAD_REQUEST
    if words[0] != "CONNECT":
        return HTTPStatus.METHOD_NOT_ALLOWED
    return None if words[1].lower() in TARGETS else HTTPStatus.FORBIDDEN


class FalProxy:
    """The connections of one proxy, all of which lead to `host:port`."""

    def __init__(self, host: str, port: int, *, head_s: float = HEAD_S, idle_s: float = IDLE_S) -> None:
        self._host, self._port, self._head_s, self._idle_s = host, port, head_s, idle_s
        self._connections: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection: one CONNECT, then bytes in both directions until both sides are done."""
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            # A peer that goes away in the middle is no event; what it wanted ends at our TLS port.
            with contextlib.suppress(OSError):
                await self._serve(reader, writer)
        finally:
            self._connections.discard(task)
            writer.close()

    async def close(self) -> None:
        """End all connections."""
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(self._head_s):
                head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            return
        except TimeoutError:
            await _answer(writer, HTTPStatus.REQUEST_TIMEOUT)
            return
        except asyncio.LimitOverrunError:
            await _answer(writer, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            return
        if status := refusal(head):
            line = head.partition(b"\r\n")[0][:200].decode("latin-1")
            log.info("fal_proxy_refused", request=line, status=int(status))
            await _answer(writer, status)
            return
        try:
            ours = await asyncio.open_connection(self._host, self._port, limit=CHUNK_BYTES)
        except OSError:
            await _answer(writer, HTTPStatus.BAD_GATEWAY)
            return
        try:
            await _answer(writer, HTTPStatus.OK)
            await self._join((reader, writer), ours)
        finally:
            ours[1].close()

    async def _join(
        self,
        caller: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        ours: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        """Pass bytes on both ways until both have ended, one has broken, or nothing moved for too long."""
        try:
            async with asyncio.timeout(self._idle_s) as deadline, asyncio.TaskGroup() as both:
                both.create_task(self._copy(caller[0], ours[1], deadline))
                both.create_task(self._copy(ours[0], caller[1], deadline))
        except* OSError:
            pass

    async def _copy(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, deadline: asyncio.Timeout
    ) -> None:
        clock = asyncio.get_running_loop().time
        while data := await source.read(CHUNK_BYTES):
            target.write(data)
            await target.drain()
            deadline.reschedule(clock() + self._idle_s)
        target.write_eof()


async def _answer(writer: asyncio.StreamWriter, status: HTTPStatus) -> None:
    """Accept with the bare line that a CONNECT expects, or refuse and say why."""
    head = f"HTTP/1.1 {int(status)} {status.phrase}\r\n"
    if status != HTTPStatus.OK:
        text = f"{status.phrase}: this proxy answers CONNECT to fal's hosts only, and leads to creative-upscaler\n"
        head += f"Allow: CONNECT\r\nContent-Type: text/plain\r\nContent-Length: {len(text)}\r\nConnection: close\r\n"
        writer.write(f"{head}\r\n{text}".encode("latin-1"))
    else:
        writer.write(f"{head}\r\n".encode("latin-1"))
    await writer.drain()
