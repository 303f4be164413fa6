"""Clients that dawdle, flood or talk nonsense, on real sockets: each is cut off, nobody else notices."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest

from server.settings import Settings
from tests.server.test_app import APP, free_port, running

PATIENCE_S = 0.6
SUBMIT = f"POST /queue{APP} HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n".encode()


@pytest.fixture
def served(app_settings: Settings) -> Iterator[Settings]:
    """A gateway that is soon out of patience."""
    settings = Settings(
        data=app_settings.data, port=free_port(), tls_port=free_port(), drain_s=1, client_patience_s=PATIENCE_S
    )
    with running(settings):
        yield settings


@contextmanager
def connected(settings: Settings) -> Iterator[socket.socket]:
    """A connection to the plain port."""
    with socket.create_connection(("127.0.0.1", settings.port), 10) as connection:
        yield connection


def receive_until(connection: socket.socket, end: bytes) -> bytes:
    """All that comes, up to an end that is expected."""
    received = b""
    while not received.endswith(end):
        received += connection.recv(65536)
    return received


def drip(connection: socket.socket, data: bytes, *, pause_s: float) -> bytes:
    """Send a byte now and then until the server answers or hangs up; returns its answer."""
    connection.settimeout(pause_s)
    for n in range(len(data)):
        try:
            connection.sendall(data[n : n + 1])
            if answer := connection.recv(65536):
                return answer
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            return b""
        return b""
    raise AssertionError("the server has endless patience")


@pytest.mark.parametrize("beginning", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"])
def test_a_head_must_come_soon(beginning: bytes, served: Settings) -> None:
    """Head lines that drip in get a 408, on a new connection as on one that was used before."""
    with connected(served) as connection:
        if beginning:
            connection.sendall(beginning)
            assert b"200 OK" in receive_until(connection, b"}}")  # the status, and in it that of every endpoint

        answer = drip(connection, b"GET /health HTTP/1.1\r\n" + b"X-A: b\r\n" * 100, pause_s=0.1)

    assert answer.startswith(b"HTTP/1.1 408 ") and b"x-fal-request-id: " in answer
    assert b'{"detail":"The request\'s head did not arrive within 0.6 s"' in answer


def test_a_silent_connection_ends(served: Settings) -> None:
    """Who connects and says nothing does not keep the connection."""
    with connected(served) as connection:
        assert b" 408 " in receive_until(connection, b'"bad_request"}')


def test_a_body_must_get_on(served: Settings) -> None:
    """A body that drips in ends the connection; nothing is queued."""
    with connected(served) as connection:
        connection.sendall(SUBMIT)

        answer = drip(connection, b" " * 100, pause_s=0.1)

    with httpx2.Client(trust_env=False) as client:
        health = client.get(f"http://127.0.0.1:{served.port}/health")
    assert answer == b"" and health.status_code == 200


def test_a_slow_but_steady_body_is_taken(served: Settings) -> None:
    """Slow is not dead: a body that takes longer than the patience, above the least rate, gets its answer."""
    body = b'{"image_url": "https://example.com/a.png", "prompt": "' + b"x" * 2000 + b'"}'

    def slowly() -> Iterator[bytes]:
        for start in range(0, len(body), 300):
            yield body[start : start + 300]
            time.sleep(0.2)

    with httpx2.Client(trust_env=False) as client:
        answer = client.post(f"http://127.0.0.1:{served.port}/queue{APP}", content=slowly())

    assert answer.status_code == 200 and answer.json()["status"] == "IN_QUEUE"


def test_an_answer_must_be_read(served: Settings) -> None:
    """A client that asks for a large file and reads nothing of it loses its connection."""
    with httpx2.Client(trust_env=False, base_url=f"http://127.0.0.1:{served.port}") as client:
        url = client.post("/files/upload", content=b"x" * 30_000_000).json()["access_url"]
    with connected(served) as connection:
        connection.sendall(f"GET {url.partition(str(served.port))[2]} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        time.sleep(4 * PATIENCE_S)
        num_read = 0
        with contextlib.suppress(ConnectionResetError):
            while block := connection.recv(2**20):
                num_read += len(block)

    assert num_read < 30_000_000


def test_a_waiting_client_is_left_in_peace(served: Settings) -> None:
    """Patience counts what the client owes, not how long we take: a status stream stays open."""
    with httpx2.Client(trust_env=False, base_url=f"http://127.0.0.1:{served.port}") as client:
        accepted = client.post(f"/queue{APP}", json={"image_url": "https://example.com/a.png"}).json()
        with client.stream("GET", f"{accepted['status_url']}/stream") as stream:
            lines = stream.iter_lines()
            first = next(lines)
            time.sleep(3 * PATIENCE_S)
            client.put(accepted["cancel_url"])
            last = [line for line in lines if line.startswith("data: ")][-1]

    assert '"IN_QUEUE"' in first and '"COMPLETED"' in last


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET /health HTTP/1.1\r\nX-Large: " + b"x" * 300_000, b"431"),
        (b"GET /health HTTP/1.1\r\n" + b"X-Many: x\r\n" * 30_000, b"431"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"400"),
    ],
)
def test_nonsense_is_answered_like_any_error(sent: bytes, status: bytes, served: Settings) -> None:
    """Heads without end and other protocols get JSON with a request id, and the connection ends."""
    with connected(served) as connection:
        connection.sendall(sent)
        answer = receive_until(connection, b'"bad_request"}')

    assert answer.startswith(b"HTTP/1.1 " + status)
    assert b"application/json" in answer and b"x-fal-request-id: " in answer
