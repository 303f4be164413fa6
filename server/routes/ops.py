"""For whoever operates the server: is it alive, can it work."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from server.errors import to_json
from server.ledger import SlotRow
from server.routes.declared import IS_READY, answers, texts
from server.routes.dependencies import GatewayDep

router = APIRouter(tags=["operation"])


@router.get("/health", responses=answers(texts("status")))
async def health() -> Response:
    """200 as long as this process answers."""
    return Response(b'{"status":"ok"}', media_type="application/json")


@router.get("/ready", responses=IS_READY)
async def ready(gateway: GatewayDep) -> Response:
    """200 when some slot can take a request, 503 while none can; says what each slot is and does."""
    # What slots of a server said that was killed moments ago does not count for its successor.
    is_ready = await gateway.ledger.is_ready(since=gateway.opened)
    body = {"ready": is_ready, "slots": [_slot(slot) for slot in await gateway.ledger.slots()]}
    return Response(to_json(body), 200 if is_ready else 503, media_type="application/json")


def _slot(slot: SlotRow) -> dict[str, str]:
    return {
        "id": slot.id,
        "state": slot.state,
        "device": slot.device,
        "weights": slot.weights,
        "detail": slot.detail,
    }
