"""What routes ask for: the gateway's parts, the endpoint in the path, the caller, the body."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Request

from server.endpoints import ENDPOINTS, Endpoint
from server.errors import (
    ApplicationNotFound,
    BodyTooLarge,
    InvalidCredentials,
    InvalidInput,
    NotAuthenticated,
    detail_item,
)
from server.gateway import Gateway
from server.schemas import Base

MEBIBYTE = 2**20


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


# Made once: json.loads with an option would make one for every body.
DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


async def get_gateway(request: Request) -> Gateway:
    """The gateway this app was made for."""
    return request.app.state.gateway


GatewayDep = Annotated[Gateway, Depends(get_gateway)]


async def get_caller(request: Request, gateway: GatewayDep) -> str:
    """The fingerprint of the caller's key; 401 for strangers."""
    return gateway.keyring.identify(request.headers.get("authorization"))


Caller = Annotated[str, Depends(get_caller)]


async def get_base(request: Request) -> Base:
    """Where the caller finds us."""
    return request.scope["base"]


BaseDep = Annotated[Base, Depends(get_base)]


@dataclass(frozen=True, slots=True)
class Call:
    """A call of an endpoint by somebody who may: what every route of run and queue needs."""

    request: Request
    gateway: Gateway
    endpoint: Endpoint[Any]
    caller: str
    base: Base


async def get_call(request: Request) -> Call:
    """The call; 401 for strangers, 404 for an unknown endpoint.

    The routes that are polled call it themselves: as a dependency it would take as long as everything else they do.
    """
    owner, alias = request.path_params["owner"], request.path_params["alias"]
    gateway: Gateway = request.app.state.gateway
    subject = f'Cannot access application "{owner}/{alias}". {NotAuthenticated.__doc__}'
    authorization = request.headers.get("authorization")
    # The query is parsed only when it may hold a token: most are empty.
    may_hold = authorization is None and b"fal_jwt_token" in request.scope["query_string"]
    token = request.query_params.get("fal_jwt_token") if may_hold else None
    if token is not None:
        caller = _token_holder(gateway, token, owner, alias)
    else:
        caller = gateway.keyring.identify(authorization, subject)
    endpoint = ENDPOINTS.get(f"{owner}/{alias}")
    if endpoint is None:
        raise ApplicationNotFound(alias)
    return Call(request, gateway, endpoint, caller, request.scope["base"])


def _token_holder(gateway: Gateway, token: str, owner: str, alias: str) -> str:
    """Who got the short-lived token that a page shows in place of a key."""
    facts = gateway.tickets.read("app", token)
    if facts["apps"] and not {alias, f"{owner}/{alias}"} & set(facts["apps"]):
        raise InvalidCredentials(f'The token is not for application "{owner}/{alias}"')
    return str(facts["caller"])


CallDep = Annotated[Call, Depends(get_call)]


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


async def read_payload(call: Call) -> Any:
    """The JSON body, whatever its media type says; nothing at all is an empty object.

    Raises:
        BodyTooLarge: More than the settings allow.
        InvalidInput: It is not JSON.
    """
    return parse_json(await read_body(call.request, int(call.gateway.settings.max_body_mb * MEBIBYTE)))


def parse_json(body: bytes) -> Any:
    """Strict JSON: UTF-8, no NaN or Infinity, not nested deeper than Python's parser goes.

    Raises:
        InvalidInput: It is not.
    """
    if not body.strip():
        return {}
    try:
        return DECODER.decode(body.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        position = getattr(error, "pos", 0)
        item = detail_item("json_invalid", "JSON decode error", loc=("body", position), ctx={"error": reason}, input={})
        raise InvalidInput([item]) from error
