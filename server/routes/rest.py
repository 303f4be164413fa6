"""fal's REST API as far as clients use it: uploads in all their forms, tokens, the webhook's public key.

An upload's place is decided when it is asked for, and travels in a signed ticket: in the URL that JavaScript clients
put to without a key, or in the id of a Python client's multipart upload. `storage_type` makes no difference here.
"""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi import Path as PathParameter
from fastapi.responses import Response

from server.auth import presented_key
from server.errors import BadRequest, InvalidCredentials, InvalidInput, detail_item, to_json
from server.gateway import Gateway
from server.routes.admission import lifecycle_s
from server.routes.declared import FILE, FILE_NAME, IS_KEY_SET, IS_PART, PARTS, TOKEN, answers, texts
from server.routes.dependencies import BaseDep, Caller, GatewayDep, parse_json, read_body
from server.schemas import file_url
from server.uploads import MAX_PARTS, new_upload_id, place_upload
from server.webhooks import SigningKey

UPLOAD_LIFE_S = 24 * 3600.0
CDN_LIFE_S = 3600.0
MAX_TOKEN_S = 24 * 3600
MAX_JSON_BYTES = 2 * 2**20
LIFECYCLE = "x-fal-object-lifecycle"

router = APIRouter(tags=["rest"])
PartNumber = Annotated[int, PathParameter(ge=1, le=MAX_PARTS)]


# -- by a URL that is asked for first (JavaScript, and Python's fallback) --------------------------------------------


@router.post("/storage/upload/initiate", openapi_extra=FILE_NAME, responses=answers(texts("upload_url", "file_url")))
@router.post(
    "/storage/upload/initiate-multipart", openapi_extra=FILE_NAME, responses=answers(texts("upload_url", "file_url"))
)
async def initiate(request: Request, gateway: GatewayDep, base: BaseDep, caller: Caller) -> Response:
    """Where to put a file, in one piece or in numbered parts, and where it will be read."""
    payload = await _json(request)
    key = place_upload(_text(payload, "file_name"), _text(payload, "content_type"))
    ticket = _ticket(gateway, key, request)
    location, _, signature = ticket.partition(".")
    upload_url = f"{base.root}/storage/upload/{location}?signature={signature}"
    return _answer({"upload_url": upload_url, "file_url": file_url(base.root, key)})


@router.put("/storage/upload/{location}", openapi_extra=FILE, responses=answers(texts("file_url")))
async def put_upload(
    request: Request, gateway: GatewayDep, base: BaseDep, location: str, signature: str = ""
) -> Response:
    """Take a file; the URL itself is the permission."""
    facts = gateway.tickets.read("upload", f"{location}.{signature}")
    await gateway.uploads.store(facts["key"], request.stream(), expires_s=facts["expires_s"])
    return _answer({"file_url": file_url(base.root, facts["key"])})


@router.post("/storage/upload/{location}/complete", openapi_extra=PARTS, responses=answers(texts("file_url")))
async def complete_upload(
    request: Request, gateway: GatewayDep, base: BaseDep, location: str, signature: str = ""
) -> Response:
    """Join the parts of an upload."""
    return await _complete(request, gateway, base.root, f"{location}.{signature}")


@router.put("/storage/upload/{location}/{number:int}", openapi_extra=FILE, responses=IS_PART)
async def put_upload_part(
    request: Request, gateway: GatewayDep, location: str, number: PartNumber, signature: str = ""
) -> Response:
    """Take one part; its entity tag is wanted at the end."""
    return await _put_part(request, gateway, f"{location}.{signature}", number)


@router.post("/storage/upload/{location}/{number:int}", responses=answers(texts("upload_url")))
async def part_url(
    gateway: GatewayDep, base: BaseDep, location: str, number: PartNumber, signature: str = ""
) -> Response:
    """The URL to put a part to, for clients that ask for each."""
    gateway.tickets.read("upload", f"{location}.{signature}")
    return _answer({"upload_url": f"{base.root}/storage/upload/{location}/{number}?signature={signature}"})


# -- to the file host (Python) ---------------------------------------------------------------------------------------


@router.post("/storage/auth/token", responses=answers(texts("token", "token_type", "base_url", "expires_at")))
async def cdn_token(gateway: GatewayDep, base: BaseDep, caller: Caller) -> Response:
    """A token for uploads to the file host, good for an hour."""
    # With an offset: Python's client compares it with an aware time, and before 3.11 it cannot read a Z.
    expires = datetime.now(UTC) + timedelta(seconds=CDN_LIFE_S)
    return _answer(
        {
            "token": gateway.tickets.issue("cdn", CDN_LIFE_S, caller=caller),
            "token_type": "Bearer",
            "base_url": base.root,
            "expires_at": expires.isoformat(timespec="seconds"),
        }
    )


@router.post("/files/upload", openapi_extra=FILE, responses=answers(texts("access_url")))
async def upload(request: Request, gateway: GatewayDep, base: BaseDep) -> Response:
    """Take a file in one piece."""
    _check_uploader(request, gateway)
    key, expires_s = _named_by_headers(request), _life_s(gateway, request)
    await gateway.uploads.store(key, request.stream(), expires_s=expires_s)
    return _answer({"access_url": file_url(base.root, key)})


@router.post("/files/upload/multipart", responses=answers(texts("access_url", "uploadId")))
async def begin_multipart(request: Request, gateway: GatewayDep, base: BaseDep) -> Response:
    """Begin an upload in parts; they are put below the file's own URL."""
    _check_uploader(request, gateway)
    key = _named_by_headers(request)
    return _answer({"access_url": file_url(base.root, key), "uploadId": _ticket(gateway, key, request)})


@router.put("/files/{key:path}/multipart/{upload_id}/{number:int}", openapi_extra=FILE, responses=IS_PART)
async def put_part(request: Request, gateway: GatewayDep, key: str, upload_id: str, number: PartNumber) -> Response:
    """Take one part, in any order and next to others."""
    return await _put_part(request, gateway, upload_id, number)


@router.post(
    "/files/{key:path}/multipart/{upload_id}/complete", openapi_extra=PARTS, responses=answers(texts("access_url"))
)
async def complete_multipart(
    request: Request, gateway: GatewayDep, base: BaseDep, key: str, upload_id: str
) -> Response:
    """Join the parts, however they are listed."""
    return await _complete(request, gateway, base.root, upload_id)


# -- tokens and keys -------------------------------------------------------------------------------------------------


@router.post("/tokens", openapi_extra=TOKEN, responses=answers({"type": "string"}))
async def token(request: Request, gateway: GatewayDep, caller: Caller) -> Response:
    """A short-lived token for pages that must not know the key; a bare JSON string."""
    payload = await _json(request)
    apps, life_s = payload.get("allowed_apps", []), payload.get("token_expiration", 120)
    if not isinstance(apps, list) or not all(isinstance(app, str) for app in apps):
        raise _invalid("allowed_apps", "Expected a list of application names", apps)
    if isinstance(life_s, bool) or not isinstance(life_s, (int, float)) or not 0 < life_s <= MAX_TOKEN_S:
        raise _invalid("token_expiration", f"Expected seconds, at most {MAX_TOKEN_S}", life_s)
    return _answer(gateway.tickets.issue("app", life_s, apps=apps, caller=caller))


@router.get("/.well-known/jwks.json", responses=IS_KEY_SET)
async def jwks(gateway: GatewayDep) -> Response:
    """The public key that webhooks are verified with."""
    key = await SigningKey.open(gateway.ledger)
    return _answer(key.jwks(), {"cache-control": "public, max-age=3600"})


# --------------------------------------------------------------------------------------------------------------------


def _ticket(gateway: Gateway, key: str, request: Request) -> str:
    facts = {"key": key, "expires_s": _life_s(gateway, request), "parts": new_upload_id()}
    return gateway.tickets.issue("upload", UPLOAD_LIFE_S, **facts)


def _life_s(gateway: Gateway, request: Request) -> float:
    asked = lifecycle_s(request.headers.get(LIFECYCLE), LIFECYCLE)
    return gateway.settings.upload_retention_s if asked is None else asked


def _named_by_headers(request: Request) -> str:
    return place_upload(request.headers.get("x-fal-file-name", ""), request.headers.get("content-type", ""))


def _check_uploader(request: Request, gateway: Gateway) -> None:
    authorization = request.headers.get("authorization")
    try:
        gateway.tickets.read("cdn", presented_key(authorization) or "")
    except InvalidCredentials:
        gateway.keyring.identify(authorization)


async def _put_part(request: Request, gateway: Gateway, ticket: str, number: int) -> Response:
    facts = gateway.tickets.read("upload", ticket)
    etag = await gateway.uploads.store_part(facts["parts"], number, request.stream())
    return _answer({"partNumber": number, "etag": etag}, {"etag": f'"{etag}"'})


async def _complete(request: Request, gateway: Gateway, root: str, ticket: str) -> Response:
    facts = gateway.tickets.read("upload", ticket)
    parts = (await _json(request)).get("parts")
    if not isinstance(parts, list):
        raise BadRequest('Expected {"parts": [{"partNumber": number, "etag": text}, ...]}')
    await gateway.uploads.complete(facts["key"], facts["parts"], parts, expires_s=facts["expires_s"])
    url = file_url(root, facts["key"])
    return _answer({"file_url": url, "access_url": url})


async def _json(request: Request) -> dict[str, Any]:
    payload = parse_json(await read_body(request, MAX_JSON_BYTES))
    if not isinstance(payload, dict):
        raise _invalid(None, "Expected a JSON object", payload)
    return payload


def _text(payload: dict[str, Any], name: str) -> str:
    value = payload.get(name)
    if value is not None and not isinstance(value, str):
        raise _invalid(name, "Expected a text", value)
    return value or ""


def _invalid(name: str | None, msg: str, value: Any) -> InvalidInput:
    return InvalidInput([detail_item("value_error", msg, loc=("body", name) if name else ("body",), input=value)])


def _answer(body: Any, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(body), media_type="application/json", headers=headers)
