"""The playground: a page at `/` that does what clients do, and what it has to know of this server.

The page is a handful of plain files in `server/static`, sent as they are, with their digest as entity tag.
It may run only its own scripts and talk only to this server, and no text becomes markup in it; the header says so.
"""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.endpoints import ENDPOINTS
from server.errors import PathNotFound, to_json
from server.ledger import SlotRow
from server.routes.declared import IS_FACTS
from server.routes.dependencies import BaseDep, GatewayDep

STATIC = Path(__file__).parents[1] / "static"
PAGE = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data: {root}; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)

router = APIRouter(tags=["playground"])


@router.get("/", include_in_schema=False)
async def page(request: Request, base: BaseDep) -> Response:
    """The playground."""
    policy = POLICY.format(root=base.root)
    return await _answer(request, PAGE, {"content-security-policy": policy, "referrer-policy": "no-referrer"})


@router.get("/playground/server.json", responses=IS_FACTS)
async def facts(gateway: GatewayDep) -> Response:
    """Which endpoints there are, whether callers need a key, whether a slot can work, and from which weights.

    Always 200, and without a key: the page asks before its user has entered one.
    """
    slots = await gateway.ledger.slots()
    body = {
        "is_open": gateway.keyring.is_open,
        "is_ready": await gateway.ledger.is_ready(since=gateway.opened),
        "endpoints": [
            {"id": endpoint.id, "title": endpoint.title, "description": endpoint.description}
            for endpoint in ENDPOINTS.values()
        ],
        "slots": [_slot(slot) for slot in slots],
    }
    return Response(to_json(body), media_type="application/json", headers={"cache-control": "no-store"})


@router.get("/playground/{name}", include_in_schema=False)
async def part(request: Request, name: str) -> Response:
    """A style sheet, script or picture of the page; 404 for anything else."""
    return await _answer(request, name, {})


def _slot(slot: SlotRow) -> dict[str, str]:
    return {"state": slot.state, "device": slot.device, "weights": slot.weights}


async def _answer(request: Request, name: str, headers: dict[str, str]) -> Response:
    path = STATIC / name
    # A name is one segment of a path, so it can lead nowhere but to a file of that folder.
    if path.suffix not in MEDIA_TYPES or path.parent != STATIC or not path.is_file():
        raise PathNotFound(request.url.path)
    content = await asyncio.to_thread(path.read_bytes)
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers |= {"etag": etag, "cache-control": "no-cache", "x-content-type-options": "nosniff"}
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=MEDIA_TYPES[path.suffix])
