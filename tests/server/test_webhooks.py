"""Webhooks arrive signed, are tried again while the receiver fails, and never follow a redirect."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from server.ledger import Ledger, NewRequest, Outcome
from server.settings import Settings
from server.webhooks import MAX_CONCURRENT, SigningKey, WebhookSender, delay_s

GOOD = Outcome(status=200, body={"image": {"url": "blob:out/a.png"}, "seed": 7})
BAD_BODY = {"detail": [{"type": "image_load_error"}]}
BAD = Outcome(status=422, body=BAD_BODY, error="no image", error_type="image_load_error")


@dataclass
class Receiver:
    """A webhook receiver that answers from a list, and remembers what it got."""

    url: str = ""
    answers: list[int] = field(default_factory=list)
    calls: list[tuple[dict[str, str], bytes]] = field(default_factory=list)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    seen = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            seen.calls.append(({name.lower(): value for name, value in self.headers.items()}, body))
            self.send_response(seen.answers.pop(0) if seen.answers else 200)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    seen.url = f"http://127.0.0.1:{server.server_port}/hook"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield seen
    server.shutdown()
    server.server_close()


Story = Callable[[Ledger, WebhookSender, SigningKey], Awaitable[None]]


def play(tmp_path: Path, story: Story, **knobs: object) -> None:
    async def scene() -> None:
        settings = Settings(data=tmp_path, **knobs)
        with closing(Ledger.open(settings)) as ledger:
            key = await SigningKey.open(ledger)
            sender = WebhookSender(settings, ledger, key)
            try:
                await story(ledger, sender, key)
            finally:
                await sender.close()

    asyncio.run(scene())


async def finished(ledger: Ledger, url: str, outcome: Outcome, request_id: str = "r") -> None:
    base_url = "https://up.lan"
    await ledger.submit(
        NewRequest(id=request_id, endpoint="e", job=None, webhook_url=url, base_url=base_url, outcome=outcome)
    )


async def send(sender: WebhookSender) -> None:
    await sender.send_due()
    while sender._under_way:
        await asyncio.sleep(0.01)


def test_a_result_is_delivered_and_its_signature_holds(tmp_path: Path, receiver: Receiver) -> None:
    """The receiver gets fal's body, and verifies it with the published key."""

    async def story(ledger: Ledger, sender: WebhookSender, key: SigningKey) -> None:
        await finished(ledger, receiver.url, GOOD)

        await send(sender)

        (headers, body), (jwk,) = receiver.calls[0], key.jwks()["keys"]
        assert json.loads(body) == {
            "request_id": "r",
            "gateway_request_id": "r",
            "status": "OK",
            "payload": {"image": {"url": "https://up.lan/files/out/a.png"}, "seed": 7},
        }
        lines = [headers[f"x-fal-webhook-{name}"] for name in ("request-id", "user-id", "timestamp")]
        message = "\n".join([*lines, hashlib.sha256(body).hexdigest()]).encode()
        public = Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(jwk["x"] + "="))
        public.verify(bytes.fromhex(headers["x-fal-webhook-signature"]), message)
        assert await ledger.outbox_due(2e9, 10) == []

    play(tmp_path, story)


def test_a_failure_is_delivered_with_its_status(tmp_path: Path, receiver: Receiver) -> None:
    """An error's body is the payload, and its status is said as fal says it."""

    async def story(ledger: Ledger, sender: WebhookSender, key: SigningKey) -> None:
        await finished(ledger, receiver.url, BAD)

        await send(sender)

        body = json.loads(receiver.calls[0][1])
        assert (body["status"], body["error"], body["payload"]) == ("ERROR", "Invalid status code: 422", BAD.body)

    play(tmp_path, story)


def test_a_failing_receiver_is_tried_again_with_a_fresh_signature(tmp_path: Path, receiver: Receiver) -> None:
    """A 500 leaves the webhook due some seconds later; the next success ends it."""

    async def story(ledger: Ledger, sender: WebhookSender, key: SigningKey) -> None:
        receiver.answers = [500]
        await finished(ledger, receiver.url, GOOD)
        await send(sender)
        (row,) = await ledger.outbox_due(2e9, 10)
        assert (row.tries, row.last_status) == (1, 500)
        await ledger.outbox_failed("r", 0.0, 500)

        await send(sender)

        assert len(receiver.calls) == 2
        assert await ledger.outbox_due(2e9, 10) == []

    play(tmp_path, story)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_is_final(tmp_path: Path, receiver: Receiver, status: int) -> None:
    """A redirect is neither followed nor tried again."""

    async def story(ledger: Ledger, sender: WebhookSender, key: SigningKey) -> None:
        receiver.answers = [status]
        await finished(ledger, receiver.url, GOOD)

        await send(sender)

        assert len(receiver.calls) == 1
        assert await ledger.outbox_due(2e9, 10) == []

    play(tmp_path, story)


def test_private_receivers_can_be_forbidden(tmp_path: Path, receiver: Receiver) -> None:
    """With the setting off, loopback is not dialled, unless the operator named it."""

    async def story(ledger: Ledger, sender: WebhookSender, key: SigningKey) -> None:
        await finished(ledger, receiver.url, GOOD)
        await send(sender)

    play(tmp_path / "closed", story, webhook_allow_private=False)
    assert receiver.calls == []
    play(tmp_path / "named", story, webhook_allow_private=False, fetch_allow_hosts=["127.0.0.1"])
    assert len(receiver.calls) == 1


ENDLESS = {
    "no answer": (b"", b""),
    "a slow head": (b"HTTP/1.1 200 OK\r\nX-Slow: ", b"x"),
    "an endless body": (b"HTTP/1.1 200 OK\r\n\r\n", b"x" * 100_000),
}


@pytest.fixture
def endless() -> Iterator[Callable[[str], str]]:
    """Start a receiver that never comes to an end, in one of the ways above; gives its URL."""
    listeners: list[socket.socket] = []
    is_over = threading.Event()

    def talk(connection: socket.socket, head: bytes, piece: bytes) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(head)
            while not is_over.wait(0.02):
                connection.sendall(piece)

    def accept(listener: socket.socket, kind: str) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=talk, args=(connection, *ENDLESS[kind]), daemon=True).start()

    def start(kind: str) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        threading.Thread(target=accept, args=(listener, kind), daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/"

    yield start
    is_over.set()
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def test_silent_receivers_hold_nobody_else(tmp_path: Path, endless: Callable[[str], str]) -> None:
    """While as many receivers as there may be say nothing, other work of the process goes on in its threads."""

    async def story(ledger: Ledger, sender: WebhookSender, key: SigningKey) -> None:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(2))
        url = endless("no answer")
        for n in range(MAX_CONCURRENT + 1):
            await finished(ledger, url, GOOD, request_id=f"r{n}")

        await sender.send_due()
        await asyncio.sleep(0.1)

        assert len(sender._under_way) == MAX_CONCURRENT
        await asyncio.wait_for(asyncio.to_thread(bool), 1.0)

    play(tmp_path, story, webhook_timeout_s=30.0)


@pytest.mark.parametrize(("kind", "tries"), [("no answer", 1), ("a slow head", 1), ("an endless body", None)])
def test_a_delivery_has_an_end(tmp_path: Path, endless: Callable[[str], str], kind: str, tries: int | None) -> None:
    """The head of the answer must come within the time allowed, however it trickles; what follows it is not read."""

    async def story(ledger: Ledger, sender: WebhookSender, key: SigningKey) -> None:
        await finished(ledger, endless(kind), GOOD)

        await asyncio.wait_for(send(sender), 3.0)

        rows = await ledger.outbox_due(2e9, 10)
        assert [row.tries for row in rows] == ([] if tries is None else [tries])

    play(tmp_path, story, webhook_timeout_s=0.3)


def test_an_unforeseen_failure_is_a_failed_try(
    tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A delivery that fails in a way nobody thought of waits for its next try like any other."""

    def fail(*_: object) -> bytes:
        raise RuntimeError("nobody thought of this")

    async def story(ledger: Ledger, sender: WebhookSender, key: SigningKey) -> None:
        await finished(ledger, receiver.url, GOOD)
        monkeypatch.setattr("server.webhooks.webhook_body", fail)

        await send(sender)

        assert await ledger.outbox_due(time.time(), 10) == []
        (row,) = await ledger.outbox_due(2e9, 10)
        assert (row.tries, row.last_status) == (1, None)

    play(tmp_path, story)


@pytest.mark.parametrize(
    ("host", "allowed", "calls"),
    [("127.0.0.1", None, 1), ("::1", None, 1), ("0.0.0.0", None, 0), ("0.0.0.0", True, 1), ("127.0.0.1", False, 0)],
)
def test_strangers_reach_no_private_receivers(
    tmp_path: Path, receiver: Receiver, host: str, allowed: bool | None, calls: int
) -> None:
    """A server that others can reach does not dial into its own network for them, unless the operator says so."""

    async def story(ledger: Ledger, sender: WebhookSender, key: SigningKey) -> None:
        await finished(ledger, receiver.url, GOOD)
        await send(sender)

    play(tmp_path, story, host=host, webhook_allow_private=allowed)

    assert len(receiver.calls) == calls


@pytest.mark.parametrize("url", ["http://169.254.169.254/", "not a url", "ftp://127.0.0.1/", "http://[::1"])
def test_a_receiver_that_cannot_be_reached_harms_nobody(tmp_path: Path, url: str) -> None:
    """A URL that leads nowhere is a failed try and nothing else."""

    async def story(ledger: Ledger, sender: WebhookSender, key: SigningKey) -> None:
        await finished(ledger, url, GOOD)

        await send(sender)

        (row,) = await ledger.outbox_due(2e9, 10)
        assert (row.tries, row.last_status) == (1, None)

    play(tmp_path, story)


def test_a_webhook_is_given_up_after_its_last_try(tmp_path: Path, receiver: Receiver) -> None:
    """The number of tries is bounded."""

    async def story(ledger: Ledger, sender: WebhookSender, key: SigningKey) -> None:
        receiver.answers = [500, 500]
        await finished(ledger, receiver.url, GOOD)
        await send(sender)
        await ledger.outbox_failed("r", 0.0, 500)

        await send(sender)

        assert await ledger.outbox_due(2e9, 10) == []

    play(tmp_path, story, webhook_max_tries=2)


def test_the_key_outlives_the_process(tmp_path: Path) -> None:
    """Receivers that fetched the key once keep verifying after a restart."""
    seen: list[object] = []

    async def story(ledger: Ledger, sender: WebhookSender, key: SigningKey) -> None:
        seen.append(key.jwks())

    play(tmp_path, story)
    play(tmp_path, story)

    assert seen[0] == seen[1]


def test_twelve_tries_span_two_hours() -> None:
    """The schedule gives a receiver that is down time to come back."""
    delays = [delay_s(tries) for tries in range(1, 12)]

    assert sum(delays) >= 7200
    assert delays == sorted(delays)
