"""The queue API over HTTP, with a slot that only pretends."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from typing import Any
from unittest.mock import ANY

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.engine.local import preview_path, scratch_of
from server.errors import model_error
from server.ledger import Blob
from server.routes import queue
from server.settings import Settings
from server.storage import Storage
from tests.server.fake_slot import PICTURE, TOKEN, FakeSlot

APP = "/queue/fal-ai/creative-upscaler"
IMAGE = {"image_url": "https://example.com/a.png", "prompt": "an owl"}
IDS = {"request_id", "status_url", "response_url", "cancel_url"}


def submit(client: TestClient, payload: Any = IMAGE, query: str = "", **headers: str) -> str:
    """Submit and return the id."""
    answer = client.post(APP + query, json=payload, headers={name.replace("_", "-"): v for name, v in headers.items()})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["request_id"])


def status_of(client: TestClient, request_id: str, query: str = "") -> dict[str, Any]:
    """The status body, its HTTP status checked."""
    answer = client.get(f"{APP}/requests/{request_id}/status{query}")
    body: dict[str, Any] = answer.json()
    assert answer.status_code == (200 if body["status"] == "COMPLETED" else 202)
    assert answer.headers["x-fal-request-id"] == request_id
    return body


def test_submit_answers_with_everything_a_client_follows(client: TestClient) -> None:
    """Id, three URLs and a place in the queue; the id in the header, too."""
    answer = client.post(APP, json=IMAGE)

    body = answer.json()
    url = f"http://127.0.0.1:8000{APP}/requests/{body['request_id']}"
    assert body == {
        "status": "IN_QUEUE",
        "request_id": answer.headers["x-fal-request-id"],
        "response_url": url,
        "status_url": f"{url}/status",
        "cancel_url": f"{url}/cancel",
        "queue_position": 0,
    }


def test_a_request_goes_its_way(client: TestClient, slot: FakeSlot) -> None:
    """Each state has the keys that clients read, and the result names its file by URL."""
    request_id = submit(client)
    waiting = status_of(client, request_id)
    slot.start(request_id)
    running = status_of(client, request_id)
    early = client.get(f"{APP}/requests/{request_id}")
    slot.finish(request_id)
    done = status_of(client, request_id)
    result = client.get(f"{APP}/requests/{request_id}")

    assert set(waiting) == IDS | {"status", "queue_position", "logs"} and waiting["logs"] is None
    assert set(running) == IDS | {"status", "logs"} and running["status"] == "IN_PROGRESS"
    assert early.status_code == 400 and early.headers["x-fal-request-id"] == request_id
    assert set(done) == IDS | {"status", "logs", "metrics"} and done["metrics"] == {"inference_time": 1.5}
    assert result.status_code == 200 and result.headers["x-fal-request-id"] == request_id
    assert float(result.headers["x-fal-billable-units"]) == 1.5
    assert result.json()["image"]["url"] == f"http://127.0.0.1:8000/files/{PICTURE}"


@pytest.mark.parametrize("query", ["?logs=1", "?logs=true", "?logs=True"])
def test_logs_have_both_shapes(client: TestClient, slot: FakeSlot, query: str) -> None:
    """Entries carry level and source at the top and under `labels`; all lines come each time."""
    request_id = submit(client, IMAGE | {"bogus": 1})
    slot.start(request_id)
    slot.log(request_id, "denoise 1/20")

    logs = status_of(client, request_id, query)["logs"]

    assert logs[0]["message"] == "unknown field 'bogus' is ignored" and logs[0]["level"] == "WARN"
    assert logs[-1]["message"] == "denoise 1/20"
    assert logs[-1]["labels"] == {"level": "INFO", "source": "USER"} and logs[-1]["source"] == "USER"
    assert logs[-1]["timestamp"].endswith("Z")
    assert status_of(client, request_id, query)["logs"] == logs
    assert status_of(client, request_id, "?logs=0")["logs"] is None


@pytest.mark.parametrize("form", ["", "/", "/response", "/response/"])
@pytest.mark.parametrize("app", [APP, f"{APP}/some/path", "/fal-ai/creative-upscaler"])
def test_results_are_found_under_every_form_of_their_url(
    client: TestClient, slot: FakeSlot, app: str, form: str
) -> None:
    """Sub-paths, slashes and /response change nothing and redirect nowhere."""
    request_id = submit(client)
    slot.start(request_id)
    slot.finish(request_id)

    answer = client.get(f"{app}/requests/{request_id}{form}", follow_redirects=False)

    assert answer.status_code == 200 and answer.json()["seed"] == 7


def test_an_invalid_input_is_accepted_and_fails_as_a_result(client: TestClient) -> None:
    """As with fal: 200 at submission, COMPLETED at once, 422 as the result."""
    request_id = submit(client, {"scale": 99})

    done = status_of(client, request_id)
    result = client.get(f"{APP}/requests/{request_id}")

    assert done["status"] == "COMPLETED" and done["error"] and done["error_type"] == "missing"
    assert result.status_code == 422 and len(result.json()["detail"]) == 2
    assert result.headers["x-fal-retryable"] == "false" and result.headers["x-fal-billable-units"] == "0"


def test_a_model_error_is_replayed(client: TestClient, slot: FakeSlot) -> None:
    """Status, body and headers of a failure are what the slot recorded."""
    request_id = submit(client)
    slot.start(request_id)
    slot.finish(request_id, model_error("image_load_error", "not an image", loc=("body", "image_url")))

    answer = client.get(f"{APP}/requests/{request_id}")

    assert answer.status_code == 422 and answer.json()["detail"][0]["type"] == "image_load_error"
    assert status_of(client, request_id)["error_type"] == "image_load_error"


def test_cancel_answers_by_state(client: TestClient, slot: FakeSlot) -> None:
    """200 for a waiting request, 202 for a running one, 400 for one that is over; clients send an empty JSON body."""
    waiting, running = submit(client), submit(client)
    slot.start(running)
    json_type = {"content-type": "application/json"}

    answers = [client.put(f"{APP}/requests/{i}/cancel", headers=json_type) for i in (waiting, waiting, running)]

    assert [(answer.status_code, answer.json()["status"]) for answer in answers] == [
        (200, "OK"),
        (400, "ALREADY_COMPLETED"),
        (202, "CANCELLATION_REQUESTED"),
    ]
    assert status_of(client, waiting)["error_type"] == "client_cancelled"
    result = client.get(f"{APP}/requests/{waiting}")
    assert (result.status_code, result.json()["error_type"]) == (499, "client_cancelled")
    assert slot.row(running).cancel_requested


def test_positions_shift_when_somebody_leaves(client: TestClient) -> None:
    """A cancelled request makes room; low priority waits for normal."""
    low = submit(client, x_fal_queue_priority="low")
    first, second = submit(client), submit(client, x_fal_queue_priority="urgent")
    before = [status_of(client, request_id)["queue_position"] for request_id in (first, second, low)]
    client.put(f"{APP}/requests/{first}/cancel")

    assert before == [0, 1, 2]
    assert [status_of(client, request_id)["queue_position"] for request_id in (second, low)] == [0, 1]


@pytest.mark.parametrize("header", ["x_fal_request_timeout", "x_fal_request_start_timeout"])
def test_a_request_that_starts_too_late_ends_with_504(client: TestClient, slot: FakeSlot, header: str) -> None:
    """The header that names the user's own timeout keeps clients from trying again."""
    request_id = submit(client, **{header: "0.01"})
    time.sleep(0.02)
    slot.expire()

    answer = client.get(f"{APP}/requests/{request_id}")

    assert answer.status_code == 504 and answer.headers["x-fal-request-timeout-type"] == "user"
    assert answer.json()["error_type"] == answer.headers["x-fal-error-type"] == "request_timeout"


def test_what_the_headers_ask_for_is_recorded(client: TestClient, slot: FakeSlot) -> None:
    """Deadlines, storing, retries, lifecycle and webhook stand in the ledger; nonsense timeouts are no deadline."""
    request_id = submit(
        client,
        query="?fal_webhook=http%3A%2F%2Fhook.example%2Fx",
        x_fal_request_timeout="30.0",
        x_fal_request_start_timeout="soon",
        x_fal_store_io="0",
        x_fal_no_retry="true",
        x_fal_object_lifecycle_preference=json.dumps({"expiration_duration_seconds": 60}),
    )

    row = slot.row(request_id)
    assert row.start_deadline is not None and 25 < row.start_deadline - time.time() <= 30
    assert (bool(row.store_io), bool(row.retry), row.webhook_url) == (False, False, "http://hook.example/x")
    assert row.base_url == "http://127.0.0.1:8000"


def test_a_queue_longer_than_allowed_is_refused(client: TestClient) -> None:
    """429, and only for those who set a limit."""
    submit(client, query="?fal_max_queue_length=0")

    answer = client.post(f"{APP}?fal_max_queue_length=0", json=IMAGE)

    assert answer.status_code == 429 and answer.headers["x-fal-needs-retry"] == "1"
    assert answer.json()["error_type"] == "concurrent_requests_limit"


def test_data_uris_are_stored_and_not_queued(client: TestClient, slot: FakeSlot, app_settings: Settings) -> None:
    """The job names a blob; the ledger never sees the picture."""
    uri = "data:image/png;base64," + base64.b64encode(b"picture" * 1000).decode()
    job = slot.job(submit(client, {"image_url": uri}))

    assert job["image"].startswith("blob:in/") and len(json.dumps(job)) < 2000
    assert Storage.open(app_settings).read(job["image"].removeprefix("blob:")) == b"picture" * 1000
    assert slot.job(submit(client, {"image_url": uri})) == job | {"params": ANY}


@pytest.mark.parametrize(("length", "is_taken"), [(8192, True), (8193, False)])
def test_a_url_without_end_is_refused(client: TestClient, slot: FakeSlot, length: int, is_taken: bool) -> None:
    """Every URL is read again and again while its request waits: what no web server takes is a fault of the input."""
    row = slot.row(submit(client, {"image_url": "https://example.com/".ljust(length, "a")}))

    assert row.is_completed is not is_taken
    if not is_taken:
        (item,) = (row.outcome_body or {})["detail"]
        assert (item["type"], item["loc"], item["ctx"]) == (
            "sequence_too_long",
            ["body", "image_url"],
            {"max_length": 8192},
        )


def test_files_of_ours_are_read_from_the_store(client: TestClient, slot: FakeSlot, app_settings: Settings) -> None:
    """A result may be the next input, without a detour over the network, and stays for as long as it is needed."""
    asyncio.run(Storage.open(app_settings).put_bytes(PICTURE, b"x"))
    asyncio.run(slot.ledger.hold_blob(Blob(PICTURE, "upload", time.time() + 1)))
    bases = ("http://127.0.0.1:8000", "https://localhost:8443", "http://[::1]:8000", "https://v3.fal.media")
    ours = [slot.job(submit(client, {"image_url": f"{base}/files/{PICTURE}"}))["image"] for base in bases]
    others = [
        slot.job(submit(client, {"image_url": f"{base}/files/{PICTURE}"}))["image"]
        for base in ("http://elsewhere", "http://localhost:8001")
    ]

    assert ours == [f"blob:{PICTURE}"] * 4
    assert all(other.startswith("http") for other in others)
    assert asyncio.run(slot.ledger.sweep(time.time() + 3600)) == []


def test_uploaded_weights_are_held_like_pictures(client: TestClient, slot: FakeSlot, app_settings: Settings) -> None:
    """A LoRA that lies here is read from the store; a base model may be a name; what is no URL names its field."""
    asyncio.run(Storage.open(app_settings).put_bytes(PICTURE, b"x"))
    asyncio.run(slot.ledger.hold_blob(Blob(PICTURE, "upload", time.time() + 1)))
    lora = {"additional_lora_url": f"http://127.0.0.1:8000/files/{PICTURE}", "base_model_url": "owner/name"}
    ours = slot.job(submit(client, IMAGE | lora))
    refused = client.post("/run/fal-ai/creative-upscaler", json=IMAGE | {"additional_embedding_url": "owner/name"})

    assert ours["files"] == {"lora": f"blob:{PICTURE}", "base_model": "owner/name"}
    assert asyncio.run(slot.ledger.sweep(time.time() + 3600)) == []
    assert refused.status_code == 422
    assert refused.json()["detail"][0]["loc"] == ["body", "additional_embedding_url"]


def events_of(text: str) -> list[dict[str, Any]]:
    """The JSON of each event."""
    return [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n") if part.startswith("data: ")]


def test_the_status_stream_tells_every_line_once_and_ends(client: TestClient, slot: FakeSlot) -> None:
    """Events carry what is new; the last one is COMPLETED; the media type does not depend on Accept."""
    request_id = submit(client)

    def work() -> None:
        slot.start(request_id)
        for number in range(5):
            slot.log(request_id, f"step {number}")
            time.sleep(0.03)
        slot.finish(request_id)

    worker = threading.Thread(target=work)
    worker.start()
    answer = client.get(f"{APP}/requests/{request_id}/status/stream?logs=1", headers={"accept": "application/json"})
    worker.join()

    events = events_of(answer.text)
    messages = [line["message"] for event in events for line in event["logs"]]
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert [message for message in messages if message.startswith("step")] == [f"step {number}" for number in range(5)]
    assert [event["status"] for event in events if event["status"] == "COMPLETED"] == ["COMPLETED"]
    # The worker may be faster than the stream is opened, so the first event is either of the earlier states.
    stages = [("IN_QUEUE", "IN_PROGRESS", "COMPLETED").index(event["status"]) for event in events]
    assert stages == sorted(stages) and stages[0] < stages[-1] == 2


def test_the_status_stream_is_kept_alive(client: TestClient, slot: FakeSlot, monkeypatch: pytest.MonkeyPatch) -> None:
    """While nothing happens comments are sent; without `logs` the key is null."""
    monkeypatch.setattr(queue, "KEEP_ALIVE_S", 0.0)
    request_id = submit(client)
    worker = threading.Timer(0.8, lambda: (slot.start(request_id), slot.finish(request_id)))
    worker.start()
    text = client.get(f"{APP}/requests/{request_id}/status/stream").text
    worker.join()

    assert ": keep-alive\n\n" in text
    assert all(event["logs"] is None for event in events_of(text))


def test_preflights_and_answers_let_browsers_in(client: TestClient) -> None:
    """Any origin may call, send what it asks for, and read the request id."""
    asked = {"origin": "https://page", "access-control-request-method": "POST"}
    preflight = client.options(APP, headers=asked | {"access-control-request-headers": "authorization,x-fal-a"})
    answer = client.post(APP, json=IMAGE, headers={"origin": "https://page"})

    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-headers"] == "authorization,x-fal-a"
    assert "PUT" in preflight.headers["access-control-allow-methods"] and preflight.headers["x-fal-request-id"]
    assert "x-fal-request-id" in answer.headers["access-control-expose-headers"]


def test_the_preview_of_a_running_request(client: TestClient, slot: FakeSlot, app_settings: Settings) -> None:
    """Nothing while it waits and when it is over; the newest picture while it runs; nobody else's under its address."""
    request_id = submit(client)
    url = f"{APP}/requests/{request_id}/preview"
    waiting = client.get(url)
    slot.start(request_id)
    without = client.get(url)
    path = preview_path(scratch_of(app_settings, "slot-0"), TOKEN)
    path.parent.mkdir()
    path.write_bytes(b"a picture")
    running = client.get(url)
    changes = (("fal-ai/creative", "fal-ai/clarity"), (request_id, request_id[::-1]))
    elsewhere = [client.get(url.replace(*change)) for change in changes]
    slot.finish(request_id)
    after = client.get(url)

    assert [answer.status_code for answer in (waiting, without, running, after)] == [204, 204, 200, 204]
    assert (running.content, running.headers["content-type"]) == (b"a picture", "image/jpeg")
    assert running.headers["cache-control"] == "no-store"
    assert {answer.status_code for answer in elsewhere} == {404}


def test_the_preview_wants_the_key(app_settings: Settings) -> None:
    """As the status does."""
    settings = app_settings.model_copy(update={"api_keys": ["secret"]})
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        answer = client.get(f"{APP}/requests/5d2c1c1c-0000-4000-8000-000000000000/preview")

    assert answer.status_code == 401
