"""The playground: a page at `/` that does what clients do, and what it has to know of this server.

The page is a handful of plain files in `server/static`, sent as they are but for the style sheet, which goes out inside
the page: so the browser can paint before it has asked for anything else. It may run only its own scripts and talk only
to this server, and no text becomes markup in it; the header says so.
"""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from server.endpoints import ENDPOINTS
from server.errors import PathNotFound, to_json
from server.ledger import SlotRow
from server.routes.declared import IS_FACTS
from server.routes.dependencies import BaseDep, GatewayDep

STATIC = Path(__file__).parents[1] / "static"
PAGE, STYLE = "index.html", "style.css"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src '{style}'; img-src 'self' blob: data: {root}; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)

router = APIRouter(tags=["playground"])


@router.get("/", include_in_schema=False)
async def page(request: Request, base: BaseDep) -> Response:
    """The playground."""
    found = read_page()
    policy = POLICY.format(root=base.root, style=found.style)
    return _answer(request, found.part, {"content-security-policy": policy, "referrer-policy": "no-referrer"})


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
    found = read_part(name)
    if found is None:
        raise PathNotFound(request.url.path)
    return _answer(request, found, {})


def _slot(slot: SlotRow) -> dict[str, str]:
    return {"state": slot.state, "device": slot.device, "weights": slot.weights}


@dataclass(frozen=True)
class Part:
    """A file of the page as it is sent: as it is, and compressed."""

    content: bytes
    packed: bytes
    etag: str
    media_type: str

    @classmethod
    def of(cls, content: bytes, suffix: str) -> Part:
        """With this content, of the kind that the suffix names."""
        etag = hashlib.sha256(content).hexdigest()[:32]
        return cls(content, gzip.compress(content, 9, mtime=0), etag, MEDIA_TYPES[suffix])


@dataclass(frozen=True)
class Page:
    """The page, and the source of its style as a policy names it."""

    part: Part
    style: str


@functools.cache
def read_page() -> Page:
    """The page with its style sheet inside, as long as this process lives."""
    style = (STATIC / STYLE).read_bytes()
    page = (STATIC / PAGE).read_bytes()
    link = f'<link rel="stylesheet" href="playground/{STYLE}">'.encode()
    assert link in page
    whole = page.replace(link, b"<style>" + style + b"</style>")
    return Page(Part.of(whole, ".html"), f"sha256-{base64.b64encode(hashlib.sha256(style).digest()).decode()}")


@functools.lru_cache(maxsize=64)
def read_part(name: str) -> Part | None:
    """A file of the page by its name, as long as this process lives; None when there is none."""
    path = STATIC / name
    if path.suffix not in MEDIA_TYPES or name not in os.listdir(STATIC):
        return None
    return Part.of(path.read_bytes(), path.suffix)


def _answer(request: Request, part: Part, headers: dict[str, str]) -> Response:
    is_packed = "gzip" in request.headers.get("accept-encoding", "")
    etag = f'"{part.etag}{"-gzip" if is_packed else ""}"'
    headers |= {
        "etag": etag,
        "cache-control": "no-cache",
        "x-content-type-options": "nosniff",
        "vary": "accept-encoding",
    }
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if is_packed:
        headers["content-encoding"] = "gzip"
    return Response(part.packed if is_packed else part.content, headers=headers, media_type=part.media_type)
