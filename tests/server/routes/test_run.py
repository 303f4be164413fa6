"""The synchronous API, with a slot that only pretends."""

from __future__ import annotations

import json
import threading
import time

from starlette.testclient import TestClient

from server.errors import model_error
from server.gateway import POLL_S
from tests.server.fake_slot import PICTURE, FakeSlot

APP = "/fal-ai/creative-upscaler"
IMAGE = {"image_url": "https://example.com/a.png", "prompt": "an owl"}


def test_run_answers_with_the_picture(client: TestClient, slot: FakeSlot) -> None:
    """The answer waits for the slot and is its result."""
    with slot.at_work():
        answer = client.post(APP, json=IMAGE)

    assert answer.status_code == 200 and answer.json()["image"]["url"].endswith(PICTURE)
    assert answer.headers["x-fal-request-id"] and answer.headers["x-fal-billable-units"] == "1.500"


def test_run_answers_as_soon_as_the_picture_is_there(client: TestClient, slot: FakeSlot) -> None:
    """The bell wakes the waiting answer before its slow poll would, at least once in three times."""
    delays = []
    for _ in range(3):
        finished: list[float] = []
        with slot.at_work(then=lambda finished=finished: finished.append(time.monotonic())):
            client.post(f"/run{APP}", json=IMAGE)
            answered = time.monotonic()
        delays.append(answered - finished[0])

    assert min(delays) < POLL_S / 2


def test_run_passes_failures_on(client: TestClient, slot: FakeSlot) -> None:
    """A model's error has its own status."""
    with slot.at_work(model_error("image_too_large", "too large", loc=("body", "image_url"))):
        answer = client.post(APP, json=IMAGE)

    assert answer.status_code == 422 and answer.json()["detail"][0]["type"] == "image_too_large"


def test_run_refuses_an_invalid_input_at_once(client: TestClient) -> None:
    """No slot is needed to say so."""
    answer = client.post(APP, json={"image_url": "https://x/a.png", "model_type": "SD_3"})

    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["body", "model_type"]
    assert answer.headers["x-fal-request-id"]


def test_run_that_starts_too_late_answers_504(client: TestClient, slot: FakeSlot) -> None:
    """A start timeout counts for run as it does for the queue."""
    timer = threading.Timer(0.3, slot.expire)
    timer.start()
    answer = client.post(APP, json=IMAGE, headers={"x-fal-request-timeout": "0.1"})
    timer.join()

    assert answer.status_code == 504 and answer.headers["x-fal-request-timeout-type"] == "user"


def test_stream_tells_of_progress_and_ends_with_the_output(client: TestClient, slot: FakeSlot) -> None:
    """Every event is JSON; the last one is what run would have answered."""
    with slot.at_work():
        answer = client.post(f"{APP}/stream", json=IMAGE)

    events = [json.loads(part[6:]) for part in answer.text.split("\n\n") if part.startswith("data: ")]
    assert answer.headers["content-type"].startswith("text/event-stream") and answer.headers["x-fal-request-id"]
    assert events[0]["status"] in ("IN_QUEUE", "IN_PROGRESS") and events[-2]["status"] == "COMPLETED"
    assert events[-1]["seed"] == 7 and events[-1]["image"]["url"].endswith(PICTURE)
