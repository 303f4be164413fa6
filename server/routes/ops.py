"""For whoever operates the server: is it alive, can it work."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from server.errors import to_json
from server.ledger import SlotRow
from server.metrics import CONTENT_TYPE, exposition
from server.routes.declared import IS_METRICS, IS_READY, answers, texts
from server.routes.dependencies import Caller, GatewayDep

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


@router.get("/metrics", responses=IS_METRICS)
async def metrics(gateway: GatewayDep, caller: Caller) -> Response:
    """Figures for Prometheus: queue, slots, webhooks, and what the dispatcher counted; wants a key where there are."""
    ledger = gateway.ledger
    text = exposition(
        await ledger.open_requests(),
        await ledger.num_webhooks(),
        await ledger.slots(),
        is_ready=await ledger.is_ready(since=gateway.opened),
        run_dir=gateway.settings.run_dir,
    )
    return Response(text, media_type=CONTENT_TYPE)


def _slot(slot: SlotRow) -> dict[str, str]:
    return {
        "id": slot.id,
        "state": slot.state,
        "device": slot.device,
        "weights": slot.weights,
        "detail": slot.detail,
    }
