"""What an operator does to a live server from its own machine, by command; and what its logs tell."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server.__main__ import build_app
from tests.acceptance.live import FAKE, ROOT, LiveServer
from tests.acceptance.recipes import recipes

ENDPOINT = "fal-ai/creative-upscaler"
FLUX = "fal-ai/flux-vision-upscaler"
Arguments = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def operated(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that may be paused, drained and restarted, and whose Flux cannot be loaded at first."""
    data = tmp_path_factory.mktemp("operated") / "data"
    data.mkdir()
    (data / "broken").touch()
    server = LiveServer(data, FAKE, FAKE_STEP_S="0.02", FAKE_BROKEN="flux_vision_upscaler", UPSCALER_API_KEYS="a:b")
    server.http.headers["authorization"] = "Key a:b"
    server.start()
    yield server
    assert server.stop() == 0


def command(server: LiveServer, *words: str, data: Path | None = None) -> subprocess.Popen[str]:
    """A command of the operator, who knows the data folder and nothing else."""
    argv = [sys.executable, "-m", "server", *words, "--data", str(data or server.data)]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def operate(server: LiveServer, *words: str, status: int = 0, data: Path | None = None) -> str:
    """What a command says that ends with this status; in this process, since starting one takes most of the time."""
    result = CliRunner().invoke(build_app(), [*words, "--data", str(data or server.data)])
    assert result.exit_code == status, (result.output, result.exception)
    return result.output + str(result.exception or "")


def state_of(server: LiveServer, row: dict[str, Any]) -> str:
    return str(server.http.get(row["status_url"]).json()["status"])


def test_pause_outlives_a_restart(operated: LiveServer, arguments: Arguments) -> None:
    """Paused, requests are taken and wait, also over a restart; what ran ends; resumed, they run."""
    running = operated.submit(ENDPOINT, arguments(num_inference_steps=100))
    operated.wait_for_log(running["status_url"], "denoise 1/")
    paused = operate(operated, "pause")
    waiting = operated.submit(ENDPOINT, arguments())
    ended = operated.wait_for_end(running["status_url"])
    shown = operate(operated, "status")

    operated.kill("supervisor")
    operated.start()
    time.sleep(1.5)  # longer than a dispatcher rests
    state = state_of(operated, waiting)
    operate(operated, "resume")
    operated.wait_for_end(waiting["status_url"])

    assert "requests are taken" in paused and "error" not in ended
    assert "mode       paused" in shown and f"{ENDPOINT:<32}1 waiting" in shown
    assert state == "IN_QUEUE"


def test_drain_ends_with_the_last_request(operated: LiveServer, arguments: Arguments) -> None:
    """New requests are refused, the command waits until the old ones are done, and all of them are."""
    operate(operated, "pause")
    accepted = [operated.submit(ENDPOINT, arguments(num_inference_steps=30)) for _ in range(3)]
    draining = command(operated, "drain")
    operated.wait_until_ready(503)
    refused = operated.http.post(f"{operated.url}/queue/{ENDPOINT}", json=arguments())
    printed, _ = draining.communicate(timeout=60.0)
    states = [state_of(operated, row) for row in accepted]
    operate(operated, "resume")

    assert refused.status_code == 503 and refused.headers["retry-after"]
    assert "requests left" in printed and printed.splitlines()[-1].startswith("drained")
    assert states == ["COMPLETED"] * 3
    assert operated.get("/ready").status_code == 200


def test_an_endpoint_that_cannot_be_loaded_spoils_no_other(operated: LiveServer, arguments: Arguments) -> None:
    """It is not ready and says why, its requests fail with the reason, the others run; mended, it is preloaded."""
    image = {"image_url": arguments()["image_url"]}
    before = operated.get("/health").json()["endpoints"]
    statuses = [operated.get(f"/ready?endpoint={name}").status_code for name in (ENDPOINT, FLUX)]
    failed, done = operated.run(FLUX, image), operated.run(ENDPOINT, arguments())
    unmended = operate(operated, "preload", FLUX, status=1)
    (operated.data / "broken").unlink()
    mended = operate(operated, "preload", FLUX)

    assert statuses == [200, 503] and before[ENDPOINT]["ready"]
    assert before[FLUX] == {"ready": False, "detail": "It could not be loaded (OSError)."}
    assert str(operated.data) not in failed.text and "is cut off" in operated.log.read_text(), "folders are for the log"
    assert failed.status_code == 500 and "cannot work at the moment" in failed.json()["detail"][0]["msg"]
    assert done.status_code == 200
    assert "failed: This endpoint cannot work" in unmended and "loaded in" in mended
    wait_until(lambda: operated.get(f"/ready?endpoint={FLUX}").status_code == 200)
    assert operated.run(FLUX, image).status_code == 200


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30.0
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_commands_of_the_readme(operated: LiveServer) -> None:
    """Each line, in its order, does what the page says beside it."""
    (script,) = recipes("Operation", "sh")
    (operated.data / "broken").unlink(missing_ok=True)
    said = []
    for line in script.splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "creative-upscaler"
        said.append(operate(operated, *words))

    status, paused, drained, resumed, loaded, unloaded = said
    assert "slots" in status and "webhooks" in status
    assert paused.startswith("paused") and "drained" in drained and resumed.startswith("running")
    assert "loaded in" in loaded and unloaded
    assert operated.get("/ready").json()["mode"] == "running"


def test_commands_say_what_is_wrong(operated: LiveServer, tmp_path: Path) -> None:
    """No server, no key, no such endpoint: one line each that says what to do."""
    nowhere = operate(operated, "status", status=1, data=tmp_path / "nowhere")
    unknown = operate(operated, "preload", "fal-ai/nothing", status=1)
    key = operated.data / "operator.key"
    text = key.read_text()
    key.write_text("another")
    wrong = operate(operated, "pause", status=1)
    key.write_text(text)

    assert "No server runs on" in nowhere and "--data" in nowhere
    assert "There is no endpoint 'fal-ai/nothing'" in unknown
    assert "operator.key" in wrong


def test_what_is_loaded_is_seen_and_freed(server: LiveServer, arguments: Arguments) -> None:
    """With the real slot: models with bytes, place and endpoints; unloaded they are gone, and come back when wanted."""
    operate(server, "preload", FLUX)
    before = json.loads(operate(server, "status", "--json"))
    unloaded = operate(server, "unload", FLUX)
    after = json.loads(operate(server, "status", "--json"))
    operate(server, "unload", "all")
    nothing = json.loads(operate(server, "status", "--json"))
    answer = server.run(ENDPOINT, arguments())

    def models(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {model["name"]: model for model in found["slots"][0]["models"]}

    assert models(before)["flux"]["endpoints"] == [FLUX] and models(before)["flux"]["size_bytes"] > 1e6
    assert models(before)["SD_1_5"]["level"] == "device" and ENDPOINT in models(before)["SD_1_5"]["endpoints"]
    assert "flux" in unloaded and "MB" in unloaded
    assert "flux" not in models(after) and "SD_1_5" in models(after), "what another endpoint uses stays"
    assert models(nothing) == {} and answer.status_code == 200
    assert all(json.loads(line)["role"] for line in server.log.read_text().splitlines()), "of libraries, too"
    memory = before["slots"][0]["memory"]
    assert 0 < memory["taken"] < memory["total"] and 0 < memory["free"] < memory["total"]


def test_every_line_about_a_request_names_it(operated: LiveServer, arguments: Arguments) -> None:
    """From gateway, dispatcher and slot: each line of the log is JSON, has its role, and the request's id."""
    ended = operated.submit(ENDPOINT, arguments(seed=3))
    operated.wait_for_end(ended["status_url"])
    cancelled = operated.submit(ENDPOINT, arguments(num_inference_steps=200))
    operated.wait_for_log(cancelled["status_url"], "denoise 1/")
    operated.http.put(cancelled["cancel_url"])
    operated.wait_for_end(cancelled["status_url"])

    lines = [json.loads(line) for line in operated.log.read_text().splitlines()]

    assert all(line["role"] and line["event"] and line["timestamp"] for line in lines)
    for row in (ended, cancelled):
        told = {(line["role"], line["event"]) for line in lines if line.get("request_id") == row["request_id"]}
        assert {("gateway", "submitted"), ("dispatcher", "run_started"), ("slot-0", "run_done")} <= told
        assert ("dispatcher", "run_finished") in told
    about_requests = {"submitted", "run_started", "run_done", "run_finished", "cancel"}
    assert all("request_id" in line for line in lines if line["event"] in about_requests)
