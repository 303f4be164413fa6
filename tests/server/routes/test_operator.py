"""The operator's API: who gets in, what is told, and what it sets going."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from dataclasses import replace
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError
from starlette.testclient import TestClient

from server.app import create_app
from server.ledger import LoadedModel, Mode, SlotReport, SlotRow
from server.settings import Settings
from tests.server.fake_slot import FakeSlot

ENDPOINT = "fal-ai/creative-upscaler"
IMAGE = {"image_url": "https://example.com/a.png"}
ROUTES = [
    ("GET", "/operator/status"),
    ("POST", "/operator/pause"),
    ("POST", "/operator/resume"),
    ("POST", "/operator/drain"),
    ("POST", "/operator/preload"),
    ("POST", "/operator/unload"),
    ("GET", "/operator/orders/x"),
]


@pytest.fixture
def key(client: TestClient, app_settings: Settings) -> dict[str, str]:
    """The header of the operator, whose key the server has made."""
    return {"authorization": f"Key {app_settings.operator_key_path.read_text()}"}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_only_the_operator_gets_in(method: str, path: str, app_settings: Settings) -> None:
    """Not without a key, not with that of a caller, not by way of fal's proxy, from wherever it is asked."""
    settings = app_settings.model_copy(update={"api_keys": ["of-a-caller"]})
    proxied = {"x-fal-target-url": f"http://127.0.0.1:8000{path}"}
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        answers = [
            client.request(method, path, headers=headers)
            for headers in (
                {},
                {"authorization": "Key "},
                {"authorization": "Key of-a-caller"},
                {"authorization": "Bearer wrong", "host": "rebound.example", "origin": "http://rebound.example"},
            )
        ]
        answers.append(client.request(method, "/api/fal/proxy", headers=proxied))

    assert {answer.status_code for answer in answers} == {401}
    assert asyncio.run(mode_of(app_settings)) is Mode.RUNNING


async def mode_of(settings: Settings) -> Mode:
    slot = FakeSlot(settings)
    try:
        return await slot.ledger.mode()
    finally:
        slot.close()


def test_every_route_is_guarded(client: TestClient) -> None:
    """The list above is complete."""
    paths = client.get("/openapi.json").json()["paths"]
    found = {(method.upper(), path) for path in paths if path.startswith("/operator") for method in paths[path]}

    assert found == {(method, path.replace("/x", "/{order_id}")) for method, path in ROUTES}


def test_the_key_is_made_once_and_for_the_servers_user_alone(client: TestClient, app_settings: Settings) -> None:
    """A key nobody can guess, in a file that nobody else can read; the next start finds it."""
    path = app_settings.operator_key_path
    first = path.read_text()
    with TestClient(create_app(app_settings)):
        second = path.read_text()

    assert first == second and len(first) >= 40
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_an_empty_key_file_is_filled(app_settings: Settings) -> None:
    """What a disk that was full left of the key locks nobody out, and opens to nobody."""
    app_settings.make_folders()
    path = app_settings.operator_key_path
    path.touch()
    with TestClient(create_app(app_settings)) as client:
        answers = [
            client.get("/operator/status", headers={"authorization": f"Key {key}"}) for key in ("", path.read_text())
        ]

    assert [answer.status_code for answer in answers] == [401, 200]
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_key_of_the_settings(app_settings: Settings) -> None:
    """It opens, nothing is written to disk, and it can neither be short nor one of the callers' keys."""
    settings = app_settings.model_copy(update={"operator_key": SecretStr("chosen-by-the-operator")})
    with TestClient(create_app(settings)) as client:
        answer = client.get("/operator/status", headers={"authorization": "Key chosen-by-the-operator"})

    assert answer.status_code == 200
    assert not settings.operator_key_path.exists()
    for unfit in ({"operator_key": "short"}, {"operator_key": "a" * 20, "api_keys": ["a" * 20]}):
        with pytest.raises(ValidationError, match="operator_key"):
            Settings(data=app_settings.data, **unfit)  # type: ignore[arg-type]


def test_status(client: TestClient, slot: FakeSlot, key: dict[str, str]) -> None:
    """Slots with what is loaded where, the queue with ages, what is not delivered."""
    report = SlotReport(
        serves=("creative_upscaler",),
        models=(LoadedModel(name="sd15", level="device", size_bytes=5, users=("creative_upscaler",)),),
        memory={"total": 9, "free": 4, "taken": 5},
    )
    row = SlotRow("0", "busy", "cpu", "pocket", "2 cores", report_json=json.dumps(report.to_json()))
    asyncio.run(slot.ledger.put_slot(row))
    for _ in range(2):
        client.post(f"/queue/{ENDPOINT}?fal_webhook=http://127.0.0.1:9/", json=IMAGE)
    client.post(f"/queue/{ENDPOINT}?fal_webhook=http://127.0.0.1:9/", json={})

    found = client.get("/operator/status", headers=key).json()

    (shown,) = found["slots"]
    assert found["mode"] == "running" and found["endpoints"][ENDPOINT]["ready"]
    assert (shown["id"], shown["state"], shown["memory"]["free"]) == ("0", "busy", 4)
    assert shown["models"] == [{"name": "sd15", "level": "device", "size_bytes": 5, "endpoints": [ENDPOINT]}]
    (queue,) = found["queue"]
    assert (queue["endpoint"], queue["state"], queue["number"]) == (ENDPOINT, "IN_QUEUE", 2)
    assert 0 <= queue["oldest_s"] < 60 and found["webhooks"]["pending"] == 1


def test_pause_and_resume(client: TestClient, slot: FakeSlot, key: dict[str, str]) -> None:
    """A paused server takes requests and is ready."""
    asyncio.run(slot.ledger.put_slot(SlotRow("0", "ready", "cpu", "pocket")))

    paused = client.post("/operator/pause", headers=key).json()
    submitted = client.post(f"/queue/{ENDPOINT}", json=IMAGE)
    ready = client.get("/ready")
    resumed = client.post("/operator/resume", headers=key).json()

    assert (paused["mode"], resumed["mode"]) == ("paused", "running")
    assert submitted.status_code == 200
    assert (ready.status_code, ready.json()["mode"]) == (200, "paused")


def test_drain(client: TestClient, slot: FakeSlot, key: dict[str, str]) -> None:
    """A draining server takes nothing, says when to come again, is not ready, and still tells of what it has."""
    asyncio.run(slot.ledger.put_slot(SlotRow("0", "ready", "cpu", "pocket")))
    before = client.post(f"/queue/{ENDPOINT}", json=IMAGE).json()

    client.post("/operator/drain", headers=key)
    refused = [client.post(f"/{api}/{ENDPOINT}", json=IMAGE) for api in ("queue", "run")]
    ready = client.get("/ready").status_code
    status = client.get(f"/queue/{ENDPOINT}/requests/{before['request_id']}/status")
    client.post("/operator/resume", headers=key)
    after = client.post(f"/queue/{ENDPOINT}", json=IMAGE)

    assert {answer.status_code for answer in refused} == {503}
    assert all(answer.headers["retry-after"] and "takes no more" in answer.json()["detail"] for answer in refused)
    assert (ready, status.status_code, after.status_code) == (503, 202, 200)


def test_an_order_is_followed_to_its_end(client: TestClient, slot: FakeSlot, key: dict[str, str]) -> None:
    """It is given, it is under way, and in the end it has each slot's answer."""
    given = client.post("/operator/preload", headers=key, json={"endpoint": ENDPOINT})
    order_id = given.json()["id"]
    under_way = client.get("/operator/status", headers=key).json()["orders"]
    (order,) = asyncio.run(slot.ledger.open_orders())
    asyncio.run(slot.ledger.end_order(order_id, {"0": "loaded in 1.0 s"}))

    found = client.get(f"/operator/orders/{order_id}", headers=key).json()

    assert given.status_code == 202 and [one["id"] for one in under_way] == [order_id]
    assert replace(order, created=0.0) == replace(
        order, id=order_id, pipeline="creative_upscaler", slot="", created=0.0
    )
    assert (found["is_done"], found["endpoint"], found["answers"]) == (True, ENDPOINT, {"0": "loaded in 1.0 s"})


@pytest.mark.parametrize(
    ("wish", "status"),
    [
        ({}, 400),
        ([], 400),
        ({"endpoint": 7}, 400),
        ({"endpoint": "fal-ai/nothing"}, 404),
        ({"endpoint": ENDPOINT, "slot": "9"}, 404),
    ],
)
def test_orders_that_make_no_sense(wish: Any, status: int, client: TestClient, key: dict[str, str]) -> None:
    """They are refused with what there is, and nothing is set going."""
    answer = client.post("/operator/unload", headers=key, json=wish)

    assert answer.status_code == status and answer.json()["detail"]
    assert client.get("/operator/status", headers=key).json()["orders"] == []
