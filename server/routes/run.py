"""The synchronous API: one request, answered when the picture is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from server.errors import ClientDisconnected, InvalidInput, PathNotFound, RequestNotFound
from server.ledger import RequestRow
from server.routes.admission import admit
from server.routes.declared import IS_EVENTS, IS_OUTPUT, RUN
from server.routes.dependencies import Call, CallDep, read_payload
from server.routes.queue import result_response, status_events
from server.schemas import result_bytes

router = APIRouter(prefix="/run", tags=["run"])
log = structlog.get_logger()


@router.post("/{owner}/{alias}", openapi_extra=RUN, responses=IS_OUTPUT)
async def run(call: CallDep) -> Response:
    """Make a picture and answer with it; 422 at once for an invalid input. Hanging up cancels the work."""
    new = await admit(call, await read_payload(call))
    ledger = call.gateway.ledger
    await ledger.submit(new)
    log.info("run", request_id=new.id, endpoint=new.endpoint, caller=call.caller, accepted=new.outcome is None)
    if new.outcome is None:
        call.gateway.wake_dispatcher()
        row = await cancelled_on_disconnect(call, new.id)
        if row is None:
            log.info("client_disconnected", request_id=new.id)
            raise ClientDisconnected
    else:
        row = await ledger.get(new.id)
    if row is None:
        raise RequestNotFound
    return result_response(row, call.base)


@router.post("/{owner}/{alias}/stream", openapi_extra=RUN, responses=IS_EVENTS, response_class=StreamingResponse)
async def stream(call: CallDep) -> Response:
    """Make a picture and tell of it in server-sent events: progress while it is made, the whole output last.

    An invalid input is a 422 before the stream begins; what fails later is its last event. Hanging up cancels the work.
    """
    new = await admit(call, await read_payload(call))
    if new.outcome is not None:
        raise InvalidInput(new.outcome.body["detail"])
    await call.gateway.ledger.submit(new)
    log.info("stream", request_id=new.id, endpoint=new.endpoint, caller=call.caller)
    call.gateway.wake_dispatcher()
    headers = {"x-fal-request-id": new.id, "cache-control": "no-cache", "x-accel-buffering": "no"}
    return StreamingResponse(_events(call, new.id), media_type="text/event-stream", headers=headers)


async def _events(call: Call, request_id: str) -> AsyncIterator[bytes]:
    gateway = call.gateway
    row = await gateway.ledger.get(request_id)
    try:
        if row is not None:
            async for event in status_events(gateway, call.base, row, with_logs=True):
                yield event
        row = await gateway.ledger.get(request_id)
        if row is not None and row.is_completed:
            yield b"data: " + result_bytes(row, call.base.root) + b"\n\n"
    finally:
        if row is None or not row.is_completed:
            gateway.in_background(gateway.cancel(request_id))


@router.api_route("/{owner}/{alias}/{path:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
async def no_such_path(call: CallDep, path: str) -> Response:
    """404: these endpoints have no sub-paths."""
    raise PathNotFound(f"/{path}")


async def cancelled_on_disconnect(call: Call, request_id: str) -> RequestRow | None:
    """Wait until a request is over; if the caller hangs up first, cancel it and return None."""
    done = asyncio.ensure_future(call.gateway.completed(request_id))
    gone = asyncio.ensure_future(_disconnected(call.request))
    try:
        await asyncio.wait({done, gone}, return_when=asyncio.FIRST_COMPLETED)
        if done.done():
            return done.result()
        return None
    finally:
        if not done.done():
            await call.gateway.cancel(request_id)
        done.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
