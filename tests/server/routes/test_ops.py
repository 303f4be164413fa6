"""Health and readiness."""

from __future__ import annotations

import asyncio

from starlette.testclient import TestClient

from server.ledger import SlotRow
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


def test_health_needs_no_slot(client: TestClient) -> None:
    """The process answers, also to HEAD."""
    assert client.get("/health").json() == {"status": "ok"}
    assert client.head("/health").status_code == 200
