"""The gateway as it runs: real sockets, both schemes, clients that hang up, a clean end."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx2
import pytest

from server.app import serve_gateway
from server.settings import Settings
from tests.server.fake_slot import FakeSlot

APP = "/fal-ai/creative-upscaler"
IMAGE = {"image_url": "https://example.com/a.png", "prompt": "an owl"}


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running(settings: Settings) -> Iterator[None]:
    """The gateway in a thread of its own, ended as a signal would end it."""
    loop = asyncio.new_event_loop()
    task = loop.create_task(serve_gateway(settings))

    def run() -> None:
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", settings.tls_port), 1).close()
            break
        except OSError:
            time.sleep(0.05)
    yield
    loop.call_soon_threadsafe(task.cancel)
    thread.join(20)
    assert not thread.is_alive()


@pytest.fixture
def served(app_settings: Settings) -> Settings:
    """Settings with two free ports."""
    return Settings(data=app_settings.data, port=free_port(), tls_port=free_port(), drain_s=1)


def test_http_and_https_are_one_server(served: Settings) -> None:
    """What is submitted by one is seen by the other, and each hands out URLs of its own scheme."""
    with running(served):
        trust = ssl.create_default_context(cafile=str(served.trust_dir / "ca-bundle.pem"))
        with httpx2.Client(verify=trust, trust_env=False) as client:
            plain, secure = f"http://127.0.0.1:{served.port}", f"https://localhost:{served.tls_port}"
            submitted = client.post(f"{plain}/queue{APP}", json=IMAGE).json()
            seen = client.get(f"{secure}/queue{APP}/requests/{submitted['request_id']}/status").json()
            status = client.get(seen["status_url"])

    assert submitted["status_url"].startswith(f"{plain}/queue/") and seen["status_url"].startswith(secure)
    assert status.status_code == 202 and "server" not in status.headers


def test_hanging_up_on_run_cancels_the_work(served: Settings, slot: FakeSlot) -> None:
    """A client that is gone frees the slot; one that waited in the queue leaves it."""
    with running(served):
        for is_started in (True, False):
            connection = socket.create_connection(("127.0.0.1", served.port))
            body = b'{"image_url": "https://example.com/a.png"}'
            head = f"POST {APP} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            connection.sendall(head + body)
            row = slot.wait_for_request(state="IN_QUEUE")
            if is_started:
                slot.start(row.id)
            connection.close()
            deadline = time.monotonic() + 5
            while not (slot.row(row.id).cancel_requested or slot.row(row.id).is_completed):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            assert slot.row(row.id).is_completed is not is_started
            if is_started:
                slot.finish(row.id)


def test_a_body_that_is_too_large_gets_its_answer(served: Settings) -> None:
    """The client reads the 413 although it is still sending."""
    settings = Settings(data=served.data, port=served.port, tls_port=served.tls_port, max_body_mb=1)
    with running(settings), httpx2.Client(trust_env=False) as client:
        url = f"http://127.0.0.1:{served.port}{APP}"
        announced = client.post(url, content=b"x" * (8 * 2**20))
        chunked = client.post(url, content=(b"x" * 65536 for _ in range(128)))
        after = client.get(f"http://127.0.0.1:{served.port}/health")

    assert [announced.status_code, chunked.status_code, after.status_code] == [413, 413, 200]
    assert announced.json()["error_type"] == "bad_request"


def test_a_client_that_leaves_in_the_middle_of_its_body_is_no_fault_of_ours(
    served: Settings, slot: FakeSlot, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is queued, nothing is logged as an error, and the next one is served."""
    with running(served):
        with socket.create_connection(("127.0.0.1", served.port)) as connection:
            connection.sendall(f"POST /queue{APP} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf".encode())
        with httpx2.Client(trust_env=False) as client:
            answer = client.get(f"http://127.0.0.1:{served.port}/health")

    assert answer.status_code == 200 and asyncio.run(slot.ledger.num_queued()) == 0
    assert "error" not in "".join(capfd.readouterr())


def test_the_gateway_never_loads_torch() -> None:
    """It starts in about a second because it knows nothing of pictures."""
    code = (
        "import sys, server.app; heavy = {'torch', 'diffusers', 'transformers', 'pipelines', 'numpy', 'PIL'};"
        "print(heavy & set(sys.modules))"
    )

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"
