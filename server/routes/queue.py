"""The queue API: submit, status, status as a stream, result, cancel."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urlsplit

import structlog
from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from server.errors import InvalidInput, PathNotFound, QueueFull, RequestNotFound, StillInProgress, detail_item, to_json
from server.gateway import POLL_S, Gateway
from server.ledger import LogRow, RequestRow
from server.routes.admission import admit
from server.routes.declared import (
    IS_CANCELLED,
    IS_EVENTS,
    IS_OUTPUT,
    IS_PREVIEW,
    IS_STATUS,
    IS_SUBMITTED,
    JSON,
    REQUEST,
    STATUS,
    SUBMIT,
)
from server.routes.dependencies import Call, CallDep, get_call, read_payload
from server.schemas import Base, result_bytes, status_body, submitted

KEEP_ALIVE_S = 15.0
CANCEL_STATUS = {"OK": 200, "CANCELLATION_REQUESTED": 202, "ALREADY_COMPLETED": 400, "NOT_FOUND": 404}

router = APIRouter(prefix="/queue", tags=["queue"])
log = structlog.get_logger()


@router.post("/{owner}/{alias}", openapi_extra=SUBMIT, responses=IS_SUBMITTED)
async def submit(request: Request) -> Response:
    """Queue a request and return its id and URLs.

    An input that does not fit the schema is accepted as well; its 422 is the request's result, as it is with fal.
    """
    call = await get_call(request)
    webhook_url, limit = checked_webhook(request), queue_limit(request)
    if limit is not None and await call.gateway.ledger.num_queued() > limit:
        raise QueueFull
    new = await admit(call, await read_payload(call), webhook_url=webhook_url)
    position = await call.gateway.ledger.submit(new)
    call.gateway.wake_dispatcher()
    log.info("submitted", request_id=new.id, endpoint=new.endpoint, caller=call.caller, accepted=new.outcome is None)
    return Response(
        to_json(submitted(call.base, new.endpoint, new.id, position)),
        media_type=JSON,
        headers={"x-fal-request-id": new.id},
    )


@router.get("/{owner}/{alias}/requests/{request_id}/status", openapi_extra=STATUS, responses=IS_STATUS)
async def status(request: Request) -> Response:
    """Where a request stands: 202 while it waits or runs, 200 when it is over; with its log if `logs` is true."""
    call = await get_call(request)
    row = await known(call)
    lines = await call.gateway.ledger.logs(row.id) if wants_logs(call.request) else None
    return Response(
        to_json(status_body(call.base, row, lines)),
        status_code=200 if row.is_completed else 202,
        media_type=JSON,
        headers={"x-fal-request-id": row.id},
    )


@router.get(
    "/{owner}/{alias}/requests/{request_id}/status/stream",
    openapi_extra=STATUS,
    responses=IS_EVENTS,
    response_class=StreamingResponse,
)
async def status_stream(request: Request) -> Response:
    """The status as server-sent events, one per change; each carries only new log lines. Ends when the request does."""
    call = await get_call(request)
    row = await known(call)
    return StreamingResponse(
        status_events(call.gateway, call.base, row, with_logs=wants_logs(call.request)),
        media_type="text/event-stream",
        headers={"x-fal-request-id": row.id, "cache-control": "no-cache", "x-accel-buffering": "no"},
    )


@router.get(
    "/{owner}/{alias}/requests/{request_id}/preview",
    openapi_extra=REQUEST,
    responses=IS_PREVIEW,
    response_class=Response,
)
async def preview(request: Request) -> Response:
    """A small picture (JPEG) of how far a running request is, renewed every second or so; 204 while there is none."""
    call = await get_call(request)
    row = await known(call)
    image = await call.gateway.preview(row)
    headers = {"x-fal-request-id": row.id, "cache-control": "no-store", "x-content-type-options": "nosniff"}
    if image is None:
        return Response(status_code=204, headers=headers)
    return Response(image, headers=headers, media_type="image/jpeg")


@router.get("/{owner}/{alias}/requests/{request_id}", openapi_extra=REQUEST, responses=IS_OUTPUT)
async def result(request: Request) -> Response:
    """What the model answered, its status and headers included; 400 while the request is not over."""
    call = await get_call(request)
    row = await known(call)
    if not row.is_completed:
        raise StillInProgress(row.id)
    return result_response(row, call.base)


@router.put("/{owner}/{alias}/requests/{request_id}/cancel", openapi_extra=REQUEST, responses=IS_CANCELLED)
async def cancel(request: Request) -> Response:
    """Cancel a request: 200 if it waited, 202 if it runs and will stop at its next step, 400 if it is over."""
    call = await get_call(request)
    request_id = (await known(call)).id
    answer = await call.gateway.cancel(request_id)
    log.info("cancel", request_id=request_id, answer=answer)
    status_code = CANCEL_STATUS[answer]
    body: dict[str, Any] = {"status": answer, "success": status_code < 300}
    if status_code >= 400:
        body["detail"] = "Request is already completed" if answer == "ALREADY_COMPLETED" else "Request not found"
    return Response(to_json(body), status_code, media_type=JSON, headers={"x-fal-request-id": request_id})


@router.api_route("/{owner}/{alias}/{path:path}", methods=["GET", "POST", "PUT", "DELETE"], include_in_schema=False)
async def no_such_path(call: CallDep, path: str) -> Response:
    """404: these endpoints have no sub-paths."""
    raise PathNotFound(f"/{path}")


async def known(call: Call) -> RequestRow:
    """The request that the path names.

    Raises:
        RequestNotFound: There is none, or it was forgotten.
    """
    row = await call.gateway.ledger.get(call.request.path_params["request_id"])
    if row is None or row.endpoint != call.endpoint.id:
        raise RequestNotFound
    return row


def result_response(row: RequestRow, base: Base) -> Response:
    """The answer of a completed request."""
    headers = json.loads(row.outcome_headers) if row.outcome_headers else {}
    headers["x-fal-request-id"] = row.id
    headers.setdefault("X-Fal-Billable-Units", f"{row.inference_s or 0:.3f}" if row.outcome_status == 200 else "0")
    return Response(result_bytes(row, base.root), row.outcome_status or 500, media_type=JSON, headers=headers)


def wants_logs(request: Request) -> bool:
    """Whether the caller wants log lines; clients write `1`, `true` or `True`."""
    if b"logs" not in request.scope["query_string"]:
        return False
    return request.query_params.get("logs", "").lower() in ("1", "true", "yes")


def queue_limit(request: Request) -> int | None:
    """How many requests may wait already, if the caller cares.

    Raises:
        InvalidInput: It is not a number.
    """
    text = request.query_params.get("fal_max_queue_length")
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal()):
        item = detail_item(
            "int_parsing", "Expected a number of requests", loc=("query", "fal_max_queue_length"), input=text
        )
        raise InvalidInput([item])
    return int(text[:18])


def checked_webhook(request: Request) -> str | None:
    """The URL to call when the request is over.

    Raises:
        InvalidInput: It is not an http(s) URL.
    """
    url = request.query_params.get("fal_webhook")
    if url is None:
        return None
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable() and len(url) < 4096
        url.encode()
    except ValueError:
        is_url = False
    if not is_url:
        item = detail_item("value_error", "Expected an http(s) URL", loc=("query", "fal_webhook"), input=url)
        raise InvalidInput([item])
    return url


async def status_events(gateway: Gateway, base: Base, row: RequestRow, *, with_logs: bool) -> AsyncIterator[bytes]:
    """Events for a status stream: the state at once, then every change of it, comments in between, COMPLETED last."""
    last: tuple[Any, ...] | None = None
    last_seq, spoken = 0, time.monotonic()
    current: RequestRow | None = row
    while current is not None:
        lines: list[LogRow] | None = await gateway.ledger.logs(row.id, last_seq) if with_logs else None
        seen = (current.state, current.queue_position)
        if lines or seen != last:
            last, last_seq = seen, lines[-1].seq if lines else last_seq
            spoken = time.monotonic()
            yield b"data: " + to_json(status_body(base, current, lines)) + b"\n\n"
        if current.is_completed:
            return
        if time.monotonic() - spoken >= KEEP_ALIVE_S:
            spoken = time.monotonic()
            yield b": keep-alive\n\n"
        await gateway.bell.wait(POLL_S)
        current = await gateway.ledger.get(row.id)
