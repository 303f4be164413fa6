"""What routes ask for: the gateway's parts, the endpoint in the path, the caller, the body."""

from __future__ import annotations

import json
from typing import Annotated, Any

from fastapi import Depends, Request

from server.endpoints import ENDPOINTS, Endpoint
from server.errors import ApplicationNotFound, BodyTooLarge, InvalidInput, detail_item
from server.gateway import Gateway
from server.schemas import Base

MEBIBYTE = 2**20


async def get_gateway(request: Request) -> Gateway:
    """The gateway this app was made for."""
    return request.app.state.gateway


GatewayDep = Annotated[Gateway, Depends(get_gateway)]


async def get_caller(request: Request, gateway: GatewayDep) -> str:
    """The fingerprint of the caller's key; 401 for strangers."""
    owner, alias = request.path_params.get("owner"), request.path_params.get("alias")
    subject = (
        f'Cannot access application "{owner}/{alias}". Authentication is required to access this application.'
        if alias
        else ""
    )
    return gateway.keyring.identify(request.headers.get("authorization"), subject)


Caller = Annotated[str, Depends(get_caller)]


async def get_endpoint(owner: str, alias: str, caller: Caller) -> Endpoint[Any]:
    """The endpoint named in the path; 404 for an unknown one."""
    endpoint = ENDPOINTS.get(f"{owner}/{alias}")
    if endpoint is None:
        raise ApplicationNotFound(alias)
    return endpoint


EndpointDep = Annotated[Endpoint[Any], Depends(get_endpoint)]


async def get_base(request: Request) -> Base:
    """Where the caller finds us."""
    return request.scope["base"]


BaseDep = Annotated[Base, Depends(get_base)]


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The body, refused as soon as it is known to be too large, announced or not.

    Raises:
        BodyTooLarge: More than `max_bytes`.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise BodyTooLarge(max_bytes)
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > max_bytes:
            raise BodyTooLarge(max_bytes)
        chunks.append(chunk)
    return b"".join(chunks)


async def read_payload(request: Request, gateway: GatewayDep) -> Any:
    """The JSON body, whatever its media type says; nothing at all is an empty object.

    Raises:
        BodyTooLarge: More than the settings allow.
        InvalidInput: It is not JSON.
    """
    body = await read_body(request, int(gateway.settings.max_body_mb * MEBIBYTE))
    return parse_json(body)


def parse_json(body: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity, not nested deeper than Python's parser goes.

    Raises:
        InvalidInput: It is not.
    """
    if not body.strip():
        return {}
    try:
        return json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        position = getattr(error, "pos", 0)
        item = detail_item("json_invalid", "JSON decode error", loc=("body", position), ctx={"error": reason}, input={})
        raise InvalidInput([item]) from error


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


Payload = Annotated[Any, Depends(read_payload)]
