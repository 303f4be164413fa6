"""A server that is asked to stop: says so at once, lets what runs end, loses nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.live import FAKE, LiveServer

ENDPOINT = "fal-ai/creative-upscaler"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    """A server with time to end what runs."""
    server = LiveServer(tmp_path / "data", FAKE, FAKE_STEP_S="0.05", UPSCALER_DRAIN_S="60")
    server.start()
    yield server
    assert server.stop() == 0


def test_sigterm_under_load(server: LiveServer, arguments: Callable[..., dict[str, Any]]) -> None:
    """Not ready from then on; the request that runs ends and can be asked for, the others wait for the next server."""
    first, *others = [server.submit(ENDPOINT, arguments(num_inference_steps=100)) for _ in range(3)]
    server.wait_for_log(first["status_url"], "denoise")

    os.kill(server.pids()["supervisor"], signal.SIGTERM)
    server.wait_until_ready(503)
    while_draining = server.http.get(first["status_url"]).json()
    assert server.wait_until_gone() == 0
    server.start()
    ends = [server.wait_for_end(row["status_url"]) for row in (first, *others)]

    assert while_draining["status"] == "IN_PROGRESS"
    for end in ends:
        assert "error" not in end
        assert not any("queued again" in line["message"] for line in end["logs"]), "each ran once"
