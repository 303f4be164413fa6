"""The health check asks the running server, however that was configured."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.healthcheck import address
from tests.acceptance.live import FAKE, ROOT
from tests.acceptance.ports import reserved_ports

START_S = 120.0


def check(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """One health check."""
    command = [sys.executable, "-m", "server.healthcheck"]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=START_S)


def test_it_follows_a_server_with_a_key_and_tls_alone(tmp_path: Path) -> None:
    """Unhealthy before the server is ready, healthy then, unhealthy when it has gone; it says why."""
    (port,) = reserved_ports(1)
    changes = {"UPSCALER_DATA": str(tmp_path), "UPSCALER_PORT": "0", "UPSCALER_TLS_PORT": str(port)}
    environment = os.environ | changes | {"UPSCALER_API_KEYS": "of:operator", "UPSCALER_WEIGHTS": "pocket"}
    reasons = [check(environment).stderr.strip()]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([sys.executable, *FAKE], env=environment, cwd=ROOT, stdout=log, stderr=log)
    try:
        while (done := check(environment)).returncode != 0:
            assert server.poll() is None, (tmp_path / "log").read_text()
            reasons.append(done.stderr.strip())
    finally:
        server.terminate()
        status = server.wait(START_S)
    after = check(environment)

    assert reasons[0] == "no server runs"
    assert all(reason.startswith(("no server runs", "no answer: ", "not ready: ")) for reason in reasons)
    assert (status, after.returncode, after.stderr.strip()) == (0, 1, "no server runs")


@pytest.mark.parametrize(
    ("host", "port", "expected"),
    [
        ("0.0.0.0", 8000, "http://127.0.0.1:8000"),
        ("::", 8000, "http://[::1]:8000"),
        ("10.0.0.7", 0, "https://10.0.0.7:8443"),
        ("localhost", 9000, "http://localhost:9000"),
    ],
)
def test_it_asks_where_the_server_listens(host: str, port: int, expected: str) -> None:
    """Plain HTTP where there is a port for it; an address of its own where it listens on all."""
    assert address({"host": host, "port": port, "tls_port": 8443}) == expected
