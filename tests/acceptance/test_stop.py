"""A server that is asked to stop: says so at once, lets what runs end, loses nothing."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.acceptance.live import FAKE, LiveServer

ENDPOINT = "fal-ai/creative-upscaler"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], LiveServer]]:
    """Starts a server whose running requests have so many seconds to end when it is stopped."""
    servers = []

    def begin(drain_s: str) -> LiveServer:
        servers.append(LiveServer(tmp_path / "data", FAKE, FAKE_STEP_S="0.05", UPSCALER_DRAIN_S=drain_s))
        servers[0].start()
        return servers[0]

    yield begin
    assert servers[0].stop() == 0


def test_sigterm_under_load(start: Callable[[str], LiveServer], arguments: Callable[..., dict[str, Any]]) -> None:
    """Not ready from then on; the request that runs ends and can be asked for, the others wait for the next server."""
    server = start("60")
    first, *others = [server.submit(ENDPOINT, arguments(num_inference_steps=100)) for _ in range(3)]
    server.wait_for_log(first["status_url"], "denoise")

    os.kill(server.pids()["supervisor"], signal.SIGTERM)
    server.wait_until_ready(503)
    while_draining = server.http.get(first["status_url"]).json()
    assert server.wait_until_gone() == 0
    server.start()
    ends = [server.wait_for_end(row["status_url"]) for row in (first, *others)]

    assert while_draining["status"] == "IN_PROGRESS", "not ready long before the end"
    for end in ends:
        assert "error" not in end
        assert not any("queued again" in line["message"] for line in end["logs"]), "each ran once"


def test_sigterm_with_no_time_to_wait(
    start: Callable[[str], LiveServer], arguments: Callable[..., dict[str, Any]]
) -> None:
    """What does not end within the grace time is queued again; all that was taken until the last moment is done."""
    server = start("0.5")
    accepted = [server.submit(ENDPOINT, arguments(num_inference_steps=200))]
    server.wait_for_log(accepted[0]["status_url"], "denoise")

    def keep_submitting() -> None:
        with contextlib.suppress(httpx2.HTTPError, AssertionError):  # until nobody is there any more
            while True:
                accepted.append(server.submit(ENDPOINT, arguments(num_inference_steps=1)))
                time.sleep(0.05)

    load = threading.Thread(target=keep_submitting)
    load.start()
    os.kill(server.pids()["supervisor"], signal.SIGTERM)
    status = server.wait_until_gone()
    load.join()
    log = server.log.read_text()
    server.start()
    ends = [server.wait_for_end(row["status_url"]) for row in accepted]

    assert status == 0 and "role_killed" not in log, "every role ended by itself, within its time"
    assert any("queued again" in line["message"] for line in ends[0]["logs"])
    assert len(ends) > 1 and not any("error" in end for end in ends)
