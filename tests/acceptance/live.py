"""A server in processes of its own, as a test holds it: started, asked, hurt, stopped."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2

from server.demo import exports
from server.settings import Settings
from server.supervisor import read_server
from tests.acceptance.ports import reserved_ports

ROOT = Path(__file__).parents[2]
START_S = 120.0
REAL = ("-m", "server", "serve")
FAKE = ("-m", "tests.acceptance.fake_server", "serve")


class LiveServer:
    """One data folder and the server on it."""

    def __init__(self, data: Path, program: tuple[str, ...], **environment: str) -> None:
        self.data = data
        self.port, self.tls_port, self.fal_proxy_port = reserved_ports(3)
        self._program = program
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("UPSCALER_", "FAL_"))}
        self._environment = clean | {
            "UPSCALER_DATA": str(data),
            "UPSCALER_PORT": str(self.port),
            "UPSCALER_TLS_PORT": str(self.tls_port),
            "UPSCALER_FAL_PROXY_PORT": str(self.fal_proxy_port),
            "UPSCALER_WEIGHTS": "pocket",
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        }
        self.log = data.with_suffix(".log")
        self.http = httpx2.Client(timeout=60.0, trust_env=False)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Base of the plain HTTP address."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start and wait until a slot can take a request."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, *self._program], stdout=log, stderr=log, env=self._environment, cwd=ROOT
            )
        self.wait_until_ready()
        self.facts()  # of this very process: nobody else has answered in its place

    def wait_until_ready(self, status: int = 200) -> None:
        """Wait until `/ready` says 200, or something else."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            assert self._process is not None and self._process.poll() is None, self.log.read_text()[-3000:]
            try:
                if self.http.get(f"{self.url}/ready").status_code == status:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not ready after {START_S} s: {self.log.read_text()[-3000:]}")

    def wait_until_gone(self) -> int:
        """Wait for the end of a server that was asked to stop; returns its exit status."""
        assert self._process is not None
        return self._process.wait(START_S)

    def stop(self) -> int:
        """Ask the server to end; returns its exit status."""
        assert self._process is not None
        self.http.close()
        self._process.terminate()
        try:
            return self._process.wait(30.0)
        finally:
            self._process.kill()

    def facts(self) -> dict[str, Any]:
        """What the server's own file says of it, wherever that lies; a full disk may delay it."""
        settings, deadline = Settings(data=self.data), time.monotonic() + START_S
        while (facts := read_server(settings)) is None or self._process is None or facts["pid"] != self._process.pid:
            assert time.monotonic() < deadline, f"no server.json: {self.log.read_text()[-3000:]}"
            time.sleep(0.05)
        return facts

    def pids(self) -> dict[str, int]:
        """The process ids of supervisor and roles."""
        facts = self.facts()
        return {"supervisor": facts["pid"], **facts["roles"]}

    def kill(self, role: str) -> int:
        """SIGKILL a role; returns the process id it had."""
        pid = self.pids()[role]
        os.kill(pid, signal.SIGKILL)
        if role == "supervisor":
            assert self._process is not None
            self._process.wait(10.0)
        return pid

    @functools.cached_property
    def client_environment(self) -> dict[str, str]:
        """What `creative-upscaler env` prints, on top of an environment that knows nothing of this server."""
        return self._printed_environment()

    @functools.cached_property
    def proxied_environment(self) -> dict[str, str]:
        """What `creative-upscaler env --fal-proxy` prints, likewise."""
        return self._printed_environment("--fal-proxy")

    def _printed_environment(self, *options: str) -> dict[str, str]:
        command = [sys.executable, "-m", "server", "env", "--data", str(self.data), *options]
        printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, env=self._environment)
        return {"PATH": os.environ["PATH"]} | exports(printed.stdout)

    def client(
        self, *arguments: str, program: str = "client.py", environment: dict[str, str] | None = None
    ) -> subprocess.Popen[str]:
        """Start `client.py`, or another program beside it, in a process of its own."""
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(program)), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment or self.client_environment,
        )

    def get(self, path: str) -> httpx2.Response:
        """GET over plain HTTP."""
        return self.http.get(f"{self.url}{path}")

    def run(self, endpoint: str, arguments: object) -> httpx2.Response:
        """Run a request synchronously over plain HTTP."""
        return self.http.post(f"{self.url}/run/{endpoint}", json=arguments)

    def submit(self, endpoint: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """Queue a request over plain HTTP."""
        answer = self.http.post(f"{self.url}/queue/{endpoint}", json=arguments)
        assert answer.status_code == 200, answer.text
        accepted: dict[str, Any] = answer.json()
        return accepted

    def wait_for_log(self, status_url: str, text: str, timeout_s: float = 60.0) -> None:
        """Wait until a log line of a request contains `text`."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            body = self.http.get(status_url, params={"logs": "1"}).json()
            if any(text in line["message"] for line in body["logs"] or ()):
                return
            time.sleep(0.02)
        raise AssertionError(f"no log line with {text!r}: {body}")

    def wait_for_end(self, status_url: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Wait until a request is over; returns its last status, log included."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            body: dict[str, Any] = self.http.get(status_url, params={"logs": "1"}).json()
            if body["status"] == "COMPLETED":
                return body
            time.sleep(0.02)
        raise AssertionError(f"not over: {body}")

    @contextlib.contextmanager
    def occupied(self, endpoint: str, arguments: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
        """The server at work on a request, with two more of the kind in the queue; all are cancelled in the end."""
        accepted = [self.submit(endpoint, arguments) for _ in range(3)]
        try:
            while self.http.get(accepted[0]["status_url"]).json()["status"] == "IN_QUEUE":
                time.sleep(0.02)
            yield accepted
        finally:
            for row in reversed(accepted):
                self.http.put(row["cancel_url"])
            self.wait_for_end(accepted[0]["status_url"])


def finish(client: subprocess.Popen[str], timeout_s: float = 120.0) -> Any:
    """What a client printed, as JSON."""
    output, errors = client.communicate(timeout=timeout_s)
    assert client.returncode == 0, errors
    return json.loads(output)
