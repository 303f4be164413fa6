"""Health and readiness."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from starlette.testclient import TestClient

from server.app import create_app
from server.ledger import SlotRow
from server.settings import Settings
from tests.server.fake_slot import FakeSlot


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


def test_health_needs_no_slot(client: TestClient) -> None:
    """The process answers, also to HEAD."""
    assert client.get("/health").json() == {"status": "ok"}
    assert client.head("/health").status_code == 200
