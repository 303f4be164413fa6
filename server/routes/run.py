"""The synchronous API: one request, answered when the picture is there."""

from __future__ import annotations

import structlog
from fastapi import APIRouter
from fastapi.responses import Response

from server.errors import ClientDisconnected, PathNotFound, RequestNotFound
from server.routes.admission import admit
from server.routes.dependencies import CallDep, read_payload
from server.routes.queue import cancelled_on_disconnect, result_response

router = APIRouter(prefix="/run", tags=["run"])
log = structlog.get_logger()


@router.post("/{owner}/{alias}")
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


@router.api_route("/{owner}/{alias}/{path:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
async def no_such_path(call: CallDep, path: str) -> Response:
    """404: these endpoints have no sub-paths."""
    raise PathNotFound(f"/{path}")
