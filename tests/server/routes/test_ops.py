"""Health and readiness."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.app import create_app
from server.ledger import SlotRow
from server.metrics import DispatcherMetrics
from server.settings import Settings
from tests.server.fake_slot import FakeSlot, picture

ENDPOINT = "fal-ai/creative-upscaler"
IMAGE = {"image_url": "https://example.com/a.png"}


def test_ready_follows_the_slots(client: TestClient, slot: FakeSlot) -> None:
    """503 until a slot can take a request; what it is can be read there."""
    states = []
    for state in ("starting", "ready", "busy", "down"):
        asyncio.run(slot.ledger.put_slot(SlotRow("slot-0", state, "cpu", "pocket")))
        states.append(client.get("/ready").status_code)

    assert states == [503, 200, 200, 503]
    assert client.get("/ready").json() == {
        "ready": False,
        "slots": [{"id": "slot-0", "state": "down", "device": "cpu", "weights": "pocket", "detail": ""}],
    }


def test_slots_of_an_earlier_server_do_not_make_this_one_ready(app_settings: Settings) -> None:
    """After kill -9 and restart nobody is told to send requests before a slot has said that it is there."""
    slot = FakeSlot(app_settings)
    row = SlotRow("slot-0", "ready", "cpu", "pocket")
    asyncio.run(slot.ledger.put_slot(replace(row, heartbeat=time.time() - 1.0)))

    with TestClient(create_app(app_settings), base_url="http://127.0.0.1:8000") as client:
        before = client.get("/ready").status_code
        asyncio.run(slot.ledger.put_slot(replace(row, heartbeat=time.time())))
        after = client.get("/ready").status_code

    slot.close()
    assert (before, after) == (503, 200)


def test_metrics_tell_of_queue_slots_and_webhooks(client: TestClient, slot: FakeSlot, app_settings: Settings) -> None:
    """Prometheus reads the state of the moment, and what the dispatcher counted, as one document."""
    counts = DispatcherMetrics()
    for _ in range(2):
        client.post(f"/queue/{ENDPOINT}?fal_webhook=http://127.0.0.1:9/", json=IMAGE)
    slot.start(first := slot.wait_for_request(state="IN_QUEUE").id)
    counts.started(slot.row(first))
    asyncio.run(slot.ledger.put_slot(SlotRow("0", "busy", "cpu", "pocket")))
    slot.finish(first, replace(picture(), body={"image": {"width": 2000, "height": 500}}))
    counts.ended(ENDPOINT, replace(picture(), body={"image": {"width": 2000, "height": 500}}), 2.0)
    counts.lost(ENDPOINT)
    counts.write(app_settings.run_dir / "dispatcher.prom")

    text = client.get("/metrics").text

    mine = {"endpoint": ENDPOINT}
    waiting = {**mine, "state": "IN_QUEUE", "priority": "normal"}
    assert figure(text, "upscaler_requests_open", **waiting) == 1
    assert 0 <= figure(text, "upscaler_oldest_request_seconds", **waiting) < 60
    assert figure(text, "upscaler_webhooks_pending") == figure(text, "upscaler_ready") == 1
    assert figure(text, "upscaler_slot", slot="0", state="busy", device="cpu", weights="pocket") == 1
    assert figure(text, "upscaler_requests_total", **mine, status="200", error_type="") == 1
    assert figure(text, "upscaler_attempts_lost_total", **mine) == 1
    assert figure(text, "upscaler_wait_seconds_count", **mine) == 1
    assert figure(text, "upscaler_inference_seconds_per_megapixel_sum", **mine) == 1.5


def test_figures_of_several_roles_are_one_family(client: TestClient, app_settings: Settings) -> None:
    """What two processes have under one name is announced once and told for both."""
    for name in ("a", "b"):
        head = "# HELP upscaler_memory_bytes Memory.\n# TYPE upscaler_memory_bytes gauge\n"
        (app_settings.run_dir / f"{name}.prom").write_text(f'{head}upscaler_memory_bytes{{slot="{name}"}} 1\n')

    text = client.get("/metrics").text

    assert text.count("# TYPE upscaler_memory_bytes gauge") == 1
    assert [figure(text, "upscaler_memory_bytes", slot=name) for name in ("a", "b")] == [1, 1]


def test_strangers_learn_no_figures(app_settings: Settings) -> None:
    """Where there is a key, Prometheus needs it too."""
    settings = app_settings.model_copy(update={"api_keys": ["secret"]})
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        answers = [client.get("/metrics", headers=headers) for headers in ({}, {"authorization": "Bearer secret"})]

    assert [answer.status_code for answer in answers] == [401, 200]


def figure(text: str, name: str, **labels: str) -> float:
    """The one sample of this name and these labels."""
    families = text_string_to_metric_families(text)
    (found,) = [
        sample.value
        for family in families
        for sample in family.samples
        if (sample.name, sample.labels) == (name, labels)
    ]
    return float(found)


def test_health_needs_no_slot(client: TestClient) -> None:
    """The process answers, also to HEAD."""
    assert client.get("/health").json() == {"status": "ok"}
    assert client.head("/health").status_code == 200
