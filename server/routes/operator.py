"""For the operator: what the server is at, and what it shall do. Wants the operator's key, whoever asks.

A browser sends no key by itself, so no page can use a browser of this machine to get here, under whatever name it
reaches it; the keys of callers do not open it.
"""

from __future__ import annotations

import time
import uuid
from typing import Any, Literal

import structlog
from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from server.endpoints import ENDPOINTS
from server.errors import BadRequest, UnknownSubject, to_json
from server.gateway import Gateway
from server.ledger import Mode, Order, QueueRow, SlotRow
from server.routes.declared import IS_MODE, IS_OPERATION, IS_ORDER, IS_ORDERED, JSON, ORDER
from server.routes.dependencies import GatewayDep, parse_json, read_body
from server.routes.ops import plain_slot, readiness

MAX_ORDER_BYTES = 10_000
ALL = "all"

log = structlog.get_logger()


async def check_operator(request: Request, gateway: GatewayDep) -> None:
    """Let the operator pass."""
    gateway.operator_key.check(request.headers.get("authorization"))


router = APIRouter(prefix="/operator", tags=["operator"], dependencies=[Depends(check_operator)])


@router.get("/status", responses=IS_OPERATION)
async def status(gateway: GatewayDep) -> Response:
    """Mode, endpoints, slots with what is loaded, queue with ages, webhooks that are not delivered."""
    ledger, now = gateway.ledger, time.time()
    backlog = await ledger.webhook_backlog()
    body = {
        "mode": (await ledger.mode()).value,
        "endpoints": await readiness(gateway),
        "slots": [_slot(slot, now) for slot in await ledger.slots()],
        "queue": [_queue(row, now) for row in await ledger.open_requests()],
        "webhooks": {"pending": backlog.number, "oldest_s": _age(backlog.oldest, now)},
        "orders": [_order(order) for order in await ledger.open_orders()],
    }
    return _answer(body)


@router.post("/pause", responses=IS_MODE)
async def pause(gateway: GatewayDep) -> Response:
    """Start no more requests; take them, and let what runs end. Holds until `resume`, also over restarts."""
    return await _set_mode(gateway, Mode.PAUSED)


@router.post("/resume", responses=IS_MODE)
async def resume(gateway: GatewayDep) -> Response:
    """Take and start requests again."""
    return await _set_mode(gateway, Mode.RUNNING)


@router.post("/drain", responses=IS_MODE)
async def drain(gateway: GatewayDep) -> Response:
    """Take no more requests (503, not ready); do what waits and what runs. Holds until `resume`, also over restarts."""
    return await _set_mode(gateway, Mode.DRAINING)


@router.post("/preload", status_code=202, openapi_extra=ORDER, responses=IS_ORDERED)
async def preload(request: Request, gateway: GatewayDep) -> Response:
    """Load the models that an endpoint needs for a request with default values; ask for the order's end by its id."""
    return await _give(request, gateway, "preload")


@router.post("/unload", status_code=202, openapi_extra=ORDER, responses=IS_ORDERED)
async def unload(request: Request, gateway: GatewayDep) -> Response:
    """Forget the models that an endpoint alone has used, or `all`; the next request that needs them loads them."""
    return await _give(request, gateway, "unload")


@router.get("/orders/{order_id}", responses=IS_ORDER)
async def order(order_id: str, gateway: GatewayDep) -> Response:
    """What the slots said of an order; they do it after what they are at."""
    found = await gateway.ledger.order(order_id)
    if found is None:
        raise UnknownSubject(f"There is no order {order_id[:100]!r}")
    return _answer(_order(found))


async def _set_mode(gateway: Gateway, mode: Mode) -> Response:
    await gateway.ledger.set_mode(mode)
    gateway.wake_dispatcher()
    log.info("mode_set", mode=mode.value)
    return _answer({"mode": mode.value})


async def _give(request: Request, gateway: Gateway, action: Literal["preload", "unload"]) -> Response:
    wish = parse_json(await read_body(request, MAX_ORDER_BYTES))
    endpoint, slot = (wish.get(name, "") for name in ("endpoint", "slot")) if isinstance(wish, dict) else ("", "")
    if not isinstance(endpoint, str) or not isinstance(slot, str) or not endpoint:
        raise BadRequest(f'Expected {{"endpoint": one of {", ".join(ENDPOINTS)}, or "{ALL}"}}')
    if endpoint != ALL and endpoint not in ENDPOINTS:
        raise UnknownSubject(f"There is no endpoint {endpoint[:100]!r}; there are {', '.join(ENDPOINTS)}")
    if slot and slot not in {row.id for row in await gateway.ledger.slots()}:
        raise UnknownSubject(f"There is no slot {slot[:100]!r}")
    pipeline = "" if endpoint == ALL else ENDPOINTS[endpoint].pipeline
    given = Order(str(uuid.uuid4()), action, pipeline, slot, time.time())
    await gateway.ledger.add_order(given)
    gateway.wake_dispatcher()
    log.info("order_given", order_id=given.id, action=action, endpoint=endpoint, slot=slot)
    return _answer(_order(given), 202)


def _slot(slot: SlotRow, now: float) -> dict[str, Any]:
    report = slot.report
    return {
        **plain_slot(slot),
        "heard_s": _age(slot.heartbeat, now),
        "memory": report.memory,
        "models": [
            {
                "name": model.name,
                "level": model.level,
                "size_bytes": model.size_bytes,
                "endpoints": [endpoint.id for endpoint in ENDPOINTS.values() if endpoint.pipeline in model.users],
            }
            for model in report.models
        ],
        "counts": report.counts,
    }


def _queue(row: QueueRow, now: float) -> dict[str, Any]:
    return {
        "endpoint": row.endpoint,
        "state": row.state,
        "priority": row.priority,
        "number": row.number,
        "oldest_s": _age(row.oldest, now),
    }


def _order(order: Order) -> dict[str, Any]:
    ids = [endpoint.id for endpoint in ENDPOINTS.values() if endpoint.pipeline == order.pipeline]
    return {
        "id": order.id,
        "action": order.action,
        "endpoint": ids[0] if ids else ALL,
        "is_done": order.answers is not None,
        "answers": order.answers or {},
    }


def _age(since: float | None, now: float) -> float | None:
    return None if since is None else round(max(0.0, now - since), 3)


def _answer(body: dict[str, Any], status_code: int = 200) -> Response:
    headers = {"cache-control": "no-store"}
    return Response(to_json(body), status_code, headers, media_type=JSON)
