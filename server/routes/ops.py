"""For whoever watches the server: is it alive, can it work, and how much does it do."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response

from server.errors import UnknownSubject, to_json
from server.gateway import Gateway
from server.ledger import Mode, SlotRow
from server.metrics import CONTENT_TYPE, Moment, exposition
from server.routes.declared import IS_HEALTH, IS_METRICS, IS_READY
from server.routes.dependencies import Caller, GatewayDep

router = APIRouter(tags=["operation"])


@router.get("/health", responses=IS_HEALTH)
async def health(gateway: GatewayDep) -> Response:
    """200 as long as this process answers; says of each endpoint whether it can serve a request."""
    return Response(to_json({"status": "ok", "endpoints": await readiness(gateway)}), media_type="application/json")


@router.get("/ready", responses=IS_READY)
async def ready(gateway: GatewayDep, endpoint: str | None = None) -> Response:
    """200 when requests are taken and some slot can serve them, else 503; `endpoint` asks for that one alone.

    A paused server takes requests and is ready; one that drains or stops is not.
    """
    endpoints, mode = await readiness(gateway), await gateway.ledger.mode()
    if endpoint is not None and endpoint not in endpoints:
        raise UnknownSubject(f"There is no endpoint {endpoint[:100]!r}")
    # What slots of a server said that was killed moments ago does not count for its successor.
    able = await gateway.ledger.is_ready(since=gateway.opened)
    is_ready = mode is not Mode.DRAINING and (able if endpoint is None else endpoints[endpoint]["ready"])
    slots = [plain_slot(slot) for slot in await gateway.ledger.slots()]
    body = {"ready": is_ready, "mode": mode.value, "endpoints": endpoints, "slots": slots}
    return Response(to_json(body), 200 if is_ready else 503, media_type="application/json")


@router.get("/metrics", responses=IS_METRICS)
async def metrics(gateway: GatewayDep, caller: Caller) -> Response:
    """Figures for Prometheus: queue, slots, webhooks, and what was counted; wants a key where there are."""
    ledger = gateway.ledger
    moment = Moment(
        queue=await ledger.open_requests(),
        webhooks=await ledger.webhook_backlog(),
        slots=await ledger.slots(),
        is_ready=await ledger.is_ready(since=gateway.opened),
        ready_endpoints=[name for name, facts in (await readiness(gateway)).items() if facts["ready"]],
        mode=await ledger.mode(),
    )
    return Response(exposition(moment, gateway.metrics, gateway.settings.run_dir), media_type=CONTENT_TYPE)


async def readiness(gateway: Gateway) -> dict[str, dict[str, Any]]:
    """By endpoint, whether some slot can serve it, and if none can, why."""
    faults = await gateway.endpoint_faults()
    return {endpoint: {"ready": not fault, "detail": fault} for endpoint, fault in faults.items()}


def plain_slot(slot: SlotRow) -> dict[str, str]:
    """What everybody may know of a slot."""
    return {
        "id": slot.id,
        "state": slot.state,
        "device": slot.device,
        "weights": slot.weights,
        "detail": slot.detail,
    }
