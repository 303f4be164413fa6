"""Health and readiness."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import replace
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from server.app import create_app
from server.ledger import LoadedModel, SlotReport, SlotRow
from server.metrics import DispatcherMetrics
from server.settings import Settings
from tests.server.fake_slot import FakeSlot, picture

ENDPOINT = "fal-ai/creative-upscaler"
IMAGE = {"image_url": "https://example.com/a.png"}
ROOT = Path(__file__).parents[3]
README_METRICS = re.compile(r"^\| `(upscaler_\w+)` \|", re.MULTILINE)
REPORT = SlotReport(
    serves=("creative_upscaler",),
    models=(
        LoadedModel(name="sd15", level="device", size_bytes=5, users=("creative_upscaler",)),
        LoadedModel(name="captioner", level="host", size_bytes=2),
    ),
    counts={"loads": 3, "load_s": 4.5, "returns": 1, "moves_to_host": 2},
    memory={"total": 100, "free": 70},
)


def test_ready_follows_the_slots(client: TestClient, slot: FakeSlot) -> None:
    """503 until a slot can take a request; what it is can be read there."""
    states = []
    for state in ("starting", "ready", "busy", "down"):
        asyncio.run(slot.ledger.put_slot(SlotRow("slot-0", state, "cpu", "pocket")))
        states.append(client.get("/ready").status_code)

    found = client.get("/ready").json()
    assert states == [503, 200, 200, 503]
    assert (found["ready"], found["mode"]) == (False, "running")
    assert found["slots"] == [{"id": "slot-0", "state": "down", "device": "cpu", "weights": "pocket", "detail": ""}]


def test_readiness_is_told_per_endpoint(client: TestClient, slot: FakeSlot) -> None:
    """An endpoint is ready when a slot serves it; one that no slot could load says why, and spoils no other."""
    flux = "fal-ai/flux-vision-upscaler"
    report = SlotReport(serves=("creative_upscaler",), failed={"flux_vision_upscaler": "no weights"})
    asyncio.run(slot.ledger.put_slot(slot_row(report)))

    endpoints = client.get("/ready").json()["endpoints"]
    statuses = [client.get("/ready", params={"endpoint": name}).status_code for name in (ENDPOINT, flux, "fal-ai/x")]

    assert endpoints[ENDPOINT] == {"ready": True, "detail": ""}
    assert endpoints[flux] == {"ready": False, "detail": "no weights"}
    assert client.get("/health").json()["endpoints"] == endpoints
    assert statuses == [200, 503, 404]


def slot_row(report: SlotReport) -> SlotRow:
    """A slot that can work, with this inside."""
    return SlotRow("0", "busy", "cpu", "pocket", report_json=json.dumps(report.to_json()))


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
    asyncio.run(slot.ledger.put_slot(slot_row(REPORT)))
    outcome = replace(
        picture(),
        body={"image": {"width": 2000, "height": 500}},
        timings={"denoise": 1.25, "vae_decode": 0.25, "inference": 1.5},
    )
    slot.finish(first, outcome)
    counts.ended(ENDPOINT, outcome, 2.0)
    counts.lost(ENDPOINT)
    counts.killed()
    counts.expired(ENDPOINT)
    counts.write(app_settings.run_dir / "dispatcher.prom")

    text = client.get("/metrics").text

    mine = {"endpoint": ENDPOINT}
    waiting = {**mine, "state": "IN_QUEUE", "priority": "normal"}
    assert figure(text, "upscaler_requests_open", **waiting) == 1
    assert 0 <= figure(text, "upscaler_oldest_request_seconds", **waiting) < 60
    assert figure(text, "upscaler_webhooks_pending") == figure(text, "upscaler_ready") == 1
    assert figure(text, "upscaler_oldest_webhook_seconds") < 60
    idle = {"endpoint": "clarityai/crystal-upscaler", "state": "IN_PROGRESS", "priority": "normal"}
    assert figure(text, "upscaler_requests_open", **idle) == 0, "what is not there is told as nothing"
    assert figure(text, "upscaler_slot", slot="0", state="busy", device="cpu", weights="pocket") == 1
    assert figure(text, "upscaler_requests_total", **mine, status="200", error_type="") == 1
    assert figure(text, "upscaler_requests_total", **mine, status="504", error_type="request_timeout") == 1
    assert figure(text, "upscaler_attempts_lost_total", **mine) == figure(text, "upscaler_slots_killed_total") == 1
    assert figure(text, "upscaler_stage_seconds_sum", **mine, stage="denoise") == 1.25
    assert figure(text, "upscaler_output_megapixels_total", **mine) == 1
    assert figure(text, "upscaler_run_seconds_sum", **mine) == 2
    assert figure(text, "upscaler_mode", mode="running") == 1 and figure(text, "upscaler_mode", mode="paused") == 0
    assert figure(text, "upscaler_endpoint_ready", **mine) == 1
    assert figure(text, "upscaler_device_memory_bytes", slot="0", part="free") == 70
    assert figure(text, "upscaler_models_bytes", slot="0", level="device") == 5
    assert figure(text, "upscaler_models_bytes", slot="0", level="host") == 2
    assert figure(text, "upscaler_model_loads_total", slot="0") == 3
    assert figure(text, "upscaler_model_load_seconds_total", slot="0") == 4.5
    assert figure(text, "upscaler_model_returns_total", slot="0") == 1
    assert figure(text, "upscaler_model_evictions_total", slot="0", to="host") == 2
    assert figure(text, "upscaler_model_evictions_total", slot="0", to="disk") == 0
    assert figure(text, "upscaler_wait_seconds_count", **mine) == 1
    assert figure(text, "upscaler_inference_seconds_per_megapixel_sum", **mine) == 1.5
    assert families(text) == set(README_METRICS.findall((ROOT / "README.md").read_text()))


def test_what_never_reaches_a_slot_is_counted(client: TestClient, slot: FakeSlot) -> None:
    """Refused when it came, or cancelled while it waited: both are told with what the slots ended."""
    client.post(f"/queue/{ENDPOINT}", json={})
    waiting = client.post(f"/queue/{ENDPOINT}", json=IMAGE).json()
    client.put(f"/queue/{ENDPOINT}/requests/{waiting['request_id']}/cancel")

    text = client.get("/metrics").text

    name, mine = "upscaler_requests_total", {"endpoint": ENDPOINT}
    assert figure(text, name, **mine, status="422", error_type="missing") == 1
    assert figure(text, name, **mine, status="499", error_type="client_cancelled") == 1


def test_labels_are_not_what_strangers_send(client: TestClient, slot: FakeSlot) -> None:
    """However much callers make up, the number of figures stays the same."""
    client.post(f"/queue/{ENDPOINT}", json={})
    before = client.get("/metrics").text.count("\n")
    for n in range(30):
        client.post(f"/queue/{ENDPOINT}?fal_webhook=http://127.0.0.1:9/{n}", json={f"field{n}": n})
        client.post(f"/queue/fal-ai/made-up-{n}", json=IMAGE)
        client.post(f"/queue/{ENDPOINT}", json=IMAGE, headers={"x-fal-queue-priority": f"made-up-{n}"})

    assert client.get("/metrics").text.count("\n") == before


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


def families(text: str) -> set[str]:
    """Names of all families, as they are asked for."""
    return {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in text_string_to_metric_families(text)
    }


def test_health_needs_no_slot(client: TestClient) -> None:
    """The process answers, also to HEAD."""
    assert client.get("/health").json()["status"] == "ok"
    assert client.head("/health").status_code == 200
