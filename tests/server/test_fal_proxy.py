"""The CONNECT proxy: fal's names lead to our port, everything else to a refusal, nothing anywhere else."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest

from server import fal_proxy as module
from server.demo import free_ports
from server.fal_proxy import TARGETS, FalProxy, fal_proxy
from server.settings import Settings

CONNECT = b"CONNECT queue.fal.run:443 HTTP/1.1\r\nHost: queue.fal.run:443\r\n\r\n"
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def shout(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Stands for our TLS port: sends back in capitals what it gets, and ends when the caller does."""
    while data := await reader.read(1 << 16):
        writer.write(data.upper())
        await writer.drain()
    writer.close()


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[Streams]:
    """A connection of a caller."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()


@contextlib.asynccontextmanager
async def running(**deadlines: float) -> AsyncIterator[int]:
    """A proxy before a port that shouts; yields the proxy's port."""
    behind = await asyncio.start_server(shout, "127.0.0.1", 0)
    proxy = FalProxy("127.0.0.1", behind.sockets[0].getsockname()[1], **deadlines)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0, limit=module.MAX_HEAD_BYTES)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await proxy.close()
        behind.close()


async def ask(port: int, data: bytes) -> bytes:
    """All that comes back until the proxy hangs up."""
    async with connected(port) as (reader, writer):
        writer.write(data)
        return await asyncio.wait_for(reader.read(), 5.0)


def test_bytes_pass_both_ways_unchanged() -> None:
    """After the CONNECT both sides talk as if there were nothing between them, however much they have to say."""
    message = bytes(range(65, 91)) * 100_000

    async def scene() -> tuple[bytes, bytes]:
        async with running() as port, connected(port) as (reader, writer):
            writer.write(CONNECT + b"early")
            head = await reader.readuntil(b"\r\n\r\n")
            writer.write(message)
            writer.write_eof()
            return head, await reader.read()

    head, body = asyncio.run(scene())

    assert head.startswith(b"HTTP/1.1 200 ")
    assert body == b"EARLY" + message


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_name_of_fals_leads_here(target: str) -> None:
    """The client's API, upload and file hosts, and their stand-ins, are all answered."""
    assert module.refusal(f"CONNECT {target} HTTP/1.1\r\n\r\n".encode()) is None


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"CONNECT example.com:443 HTTP/1.1", b"403"),
        (b"CONNECT fal.run:80 HTTP/1.1", b"403"),
        (b"CONNECT fal.run.example.com:443 HTTP/1.1", b"403"),
        (b"CONNECT 169.254.169.254:443 HTTP/1.1", b"403"),
        (b"GET http://fal.run/ HTTP/1.1", b"405"),
        (b"POST https://queue.fal.run/ HTTP/1.1", b"405"),
        (b"\x16\x03\x01\x02\x00", b"400"),
        (b"CONNECT fal.run:443", b"400"),
    ],
)
def test_anything_else_is_refused_without_a_socket(head: bytes, status: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """A foreign host, another port or another method is refused, and no connection is made for it."""
    opened: list[Any] = []

    async def scene() -> bytes:
        async with running() as port, connected(port) as (reader, writer):
            monkeypatch.setattr(asyncio, "open_connection", lambda *_, **__: opened.append(1))
            writer.write(head + b"\r\n\r\n")
            return await reader.read()

    answer = asyncio.run(scene())

    assert answer.split(b" ")[1] == status
    assert opened == []


def test_a_caller_that_says_nothing_is_sent_away() -> None:
    """A connection without a complete request ends after its deadline; one with too long a request at once."""

    async def scene() -> tuple[bytes, bytes]:
        async with running(head_s=0.05) as port:
            return await ask(port, b"CONNECT fal"), await ask(port, b"CONNECT " + b"a" * 2 * module.MAX_HEAD_BYTES)

    silent, endless = asyncio.run(scene())

    assert silent.startswith(b"HTTP/1.1 408 ")
    assert endless.startswith(b"HTTP/1.1 431 ")


def test_an_idle_connection_ends() -> None:
    """A connection on which nothing moves is closed; one that is used lives on."""

    async def scene() -> tuple[bytes, bytes]:
        async with running(idle_s=0.3) as port, connected(port) as (reader, writer):
            writer.write(CONNECT)
            await reader.readuntil(b"\r\n\r\n")
            for _ in range(4):
                await asyncio.sleep(0.15)
                writer.write(b"a")
            said = await reader.readexactly(4)
            return said, await asyncio.wait_for(reader.read(), 5.0)

    assert asyncio.run(scene()) == (b"AAAA", b"")


def test_without_our_port_it_says_so() -> None:
    """While the TLS port does not answer, callers get 502 and may come again."""
    (nobody,) = free_ports(1)

    async def scene() -> bytes:
        server = await asyncio.start_server(FalProxy("127.0.0.1", nobody).serve, "127.0.0.1", 0)
        try:
            return await ask(server.sockets[0].getsockname()[1], CONNECT)
        finally:
            server.close()

    assert asyncio.run(scene()).startswith(b"HTTP/1.1 502 ")


def test_the_setting_turns_it_on(settings: Settings) -> None:
    """It listens where the settings say, ends its connections when it ends, and is off by default."""
    (port,) = free_ports(1)
    on = settings.model_copy(update={"fal_proxy_port": port, "host": "0.0.0.0"})

    async def scene() -> bytes:
        async with fal_proxy(settings):
            assert not is_open(port)
        async with fal_proxy(on):
            waiting = await asyncio.open_connection("127.0.0.1", port)
            assert (await ask(port, b"GET / HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 405 ")
        rest = await waiting[0].read()
        waiting[1].close()
        return rest

    assert asyncio.run(scene()) == b""
    assert not is_open(port)


def test_it_needs_the_tls_port(settings: Settings) -> None:
    """A proxy without a TLS port behind it is a mistake that is told at once."""
    with pytest.raises(ValueError, match="tls_port"):
        Settings(data=settings.data, fal_proxy_port=8444, tls_port=0)


def is_open(port: int) -> bool:
    """Whether anybody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
