"""Whatever is killed in the middle of a request, the request ends once and well, and its polling client gets it."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.acceptance.live import FAKE, REAL, LiveServer, finish

ENDPOINT = "fal-ai/creative-upscaler"
ROLES = ["gateway", "dispatcher", "slot-0", "supervisor"]
Arguments = Callable[..., dict[str, Any]]

log = logging.getLogger(__name__)


@pytest.fixture(scope="module", params=[FAKE, pytest.param(REAL, marks=pytest.mark.slow)], ids=["fake", "real"])
def victim(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that may be hurt; what becomes of processes shows on the fake pipeline with its known steps."""
    server = LiveServer(tmp_path_factory.mktemp("victim") / "data", request.param, FAKE_STEP_S="0.03")
    server.start()
    yield server
    assert server.stop() == 0


@pytest.fixture
def hooks() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A webhook receiver: its URL, and what was delivered."""
    delivered: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            delivered.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    receiver = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=receiver.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{receiver.server_port}/", delivered
    receiver.shutdown()
    receiver.server_close()


def is_alive(pid: int) -> bool:
    """Whether a process still runs; one that only waits to be collected does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.01)


def wait_until_gone(pids: Iterable[int], timeout_s: float) -> None:
    """Wait until none of the processes runs."""
    wait_for(lambda: not any(is_alive(pid) for pid in pids), timeout_s)


@pytest.mark.parametrize("role", ROLES)
def test_a_request_outlives_the_kill_of(
    role: str, victim: LiveServer, hooks: tuple[str, list[dict[str, Any]]], arguments: Arguments
) -> None:
    """kill -9 in the middle: the client that polls gets its picture, and there is one result and one webhook."""
    check_survival(role, victim, hooks, arguments(creativity=1, num_inference_steps=100))


def test_a_request_outlives_its_slot_with_the_real_pipeline(
    server: LiveServer, hooks: tuple[str, list[dict[str, Any]]], arguments: Arguments
) -> None:
    """The same with the models: the slot that dies has torch in the middle of a step, and its successor loads again."""
    check_survival("slot-0", server, hooks, arguments(creativity=1, num_inference_steps=30))


def check_survival(
    role: str, victim: LiveServer, hooks: tuple[str, list[dict[str, Any]]], work: dict[str, Any]
) -> None:
    """Kill a role while a request of a polling client runs on it, and look at everything that must hold."""
    url, delivered = hooks
    client = victim.client("sync", "follow", json.dumps({"input": work, "webhook": url}))
    try:
        assert client.stdout is not None
        accepted = json.loads(client.stdout.readline())
        status_url = f"{victim.url}{urlsplit(accepted['status_url']).path}"
        victim.wait_for_log(status_url, "denoise 1/")
        before = victim.pids()

        started = time.monotonic()
        victim.kill(role)
        if role == "supervisor":
            wait_until_gone(before.values(), 3.0)
            log.info("supervisor killed: children gone after %.3f s", time.monotonic() - started)
            victim.start()
        answer = finish(client)
        log.info("%s killed: the client has its picture after %.2f s", role, time.monotonic() - started)
    finally:
        client.kill()
        client.wait()

    assert answer["result"]["image"]["width"] == 128
    victim.wait_until_ready()
    status = victim.wait_for_end(status_url)
    lost = [line for line in status["logs"] if "worker was lost" in line["message"]]
    assert len(lost) == (role in ("slot-0", "supervisor")), "only a dead slot costs an attempt"
    wait_for(lambda: bool(delivered), 10.0)
    time.sleep(0.3)
    assert [hook["request_id"] for hook in delivered] == [accepted["request_id"]]
    assert delivered[0]["payload"]["seed"] == 1
    assert len(list((victim.data / "files" / "out").glob(f"*/*{accepted['request_id']}*"))) == 1
    after = victim.pids()
    assert all(before[name] != after[name] for name in (ROLES if role == "supervisor" else [role]))
    assert role == "supervisor" or all(before[name] == after[name] for name in ROLES if name != role)


def test_what_waits_in_the_queue_outlives_every_kill(victim: LiveServer, arguments: Arguments) -> None:
    """Five requests in the queue, every role killed once: five results."""
    accepted = [victim.submit(ENDPOINT, arguments(seed=n)) for n in range(5)]

    for role in ("dispatcher", "slot-0", "gateway"):
        victim.kill(role)
        time.sleep(0.2)

    victim.wait_until_ready()
    for row in accepted:
        victim.wait_for_end(row["status_url"])
    assert [victim.http.get(row["response_url"]).json()["seed"] for row in accepted] == [0, 1, 2, 3, 4]


def test_a_cancelled_run_frees_its_slot_within_a_step(victim: LiveServer, arguments: Arguments) -> None:
    """The slot takes the next request no later than one denoising step after the cancellation."""
    accepted = victim.submit(ENDPOINT, arguments(creativity=1, num_inference_steps=200))
    victim.wait_for_log(accepted["status_url"], "denoise 1/")

    started = time.monotonic()
    answer = victim.http.put(accepted["cancel_url"])
    answered = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    while victim.get("/ready").json()["slots"][0]["state"] != "ready":
        assert time.monotonic() - started < 10.0
        time.sleep(0.005)
    seconds = time.monotonic() - started

    status = victim.http.get(accepted["status_url"], params={"logs": "1"}).json()
    steps = [line for line in status["logs"] if line["message"].startswith("denoise ")]
    late = [line for line in steps if line["timestamp"] > answered]
    log.info("cancelled: the slot is free after %.3f s", seconds)
    assert answer.status_code == 202
    assert len(late) <= 1 and len(steps) < 100
    assert seconds < 1.0
