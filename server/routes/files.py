"""Stored files by URL: no key is asked for, who knows the random part of the name may read."""

from __future__ import annotations

import re
from email.utils import format_datetime

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse

from server.errors import FileMissing, RangeNotSatisfiable
from server.routes.dependencies import GatewayDep
from server.storage import Found, is_public

SINGLE_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})", re.ASCII)
# Uploaded files come from strangers: a browser must show them as what they are said to be, and run nothing in them.
SAFE_HEADERS = {"x-content-type-options": "nosniff", "content-security-policy": "default-src 'none'; sandbox"}

router = APIRouter(prefix="/files", tags=["files"])


@router.head("/{key:path}", include_in_schema=False)
@router.get(
    "/{key:path}", responses={206: {"description": "The part that was asked for"}, 304: {"description": "Known"}}
)
async def read_file(request: Request, gateway: GatewayDep, key: str) -> Response:
    """A stored file, or the part of it that `Range` asks for (206); 416 for a part behind its end."""
    found = await gateway.storage.head(key) if is_public(key) else None
    if found is None:
        raise FileMissing
    headers = {
        "accept-ranges": "bytes",
        "etag": f'"{found.etag}"',
        "last-modified": format_datetime(found.modified, usegmt=True),
        "cache-control": "public, max-age=31536000, immutable",
        **SAFE_HEADERS,
    }
    if f'"{found.etag}"' in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    start, end = requested_range(request, found)
    is_part = (start, end) != (0, found.size_bytes)
    headers["content-length"] = str(end - start)
    if is_part:
        headers["content-range"] = f"bytes {start}-{end - 1}/{found.size_bytes}"
    status_code = 206 if is_part else 200
    if request.method == "HEAD" or start == end:
        return Response(status_code=status_code, headers=headers, media_type=found.content_type)
    body = gateway.storage.stream(key, start, end if is_part else None)
    return StreamingResponse(body, status_code, headers, media_type=found.content_type)


def requested_range(request: Request, found: Found) -> tuple[int, int]:
    """First byte and the byte after the last one to send; several ranges at once get the whole file (RFC 9110).

    Raises:
        RangeNotSatisfiable: It starts behind the end.
    """
    size = found.size_bytes
    match = SINGLE_RANGE.fullmatch(request.headers.get("range", "").strip())
    condition = request.headers.get("if-range")
    if match is None or match.groups() == ("", "") or (condition and condition.strip('"') != found.etag):
        return 0, size
    first, last = match.groups()
    if first == "":
        start, end = max(0, size - int(last)), size
    else:
        start, end = int(first), min(size, int(last) + 1) if last else size
        if last and int(last) < start:
            return 0, size
    if start >= size:
        raise RangeNotSatisfiable(size)
    return start, end
