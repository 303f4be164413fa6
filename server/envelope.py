"""What every answer carries, errors included: a request id, and leave for browsers to read it."""

from __future__ import annotations

import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

EXPOSED = (
    b"x-fal-request-id, x-fal-billable-units, x-fal-error-type, x-fal-request-timeout-type, x-fal-retryable, "
    b"x-fal-needs-retry, x-fal-served-from, etag, content-length, content-range, content-disposition, retry-after"
)
ALLOWED_METHODS = b"GET, HEAD, POST, PUT, DELETE, OPTIONS"
ORIGIN = (b"access-control-allow-origin", b"*")
EXPOSE = (b"access-control-expose-headers", EXPOSED)


class Envelope:
    """ASGI layer: adds `x-fal-request-id` and CORS headers, and answers OPTIONS.

    Any origin may call: callers identify themselves by a header that they set, never by a cookie, so a foreign page
    gains nothing that it does not have.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one request through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = message.setdefault("headers", [])
                headers += (ORIGIN, EXPOSE)
                if not any(name == b"x-fal-request-id" for name, _ in headers):
                    headers.append((b"x-fal-request-id", str(uuid.uuid4()).encode()))
            await send(message)

        if scope["method"] == "OPTIONS":
            await _answer_options(scope, send_with_headers)
        elif scope["method"] == "HEAD" and not scope["path"].rstrip("/").endswith("/stream"):
            # The server leaves the body out of whatever answers HEAD; files know how to do so without reading it.
            await self._app(_as_get(scope), receive, send_with_headers)
        else:
            await self._app(scope, receive, send_with_headers)


def _as_get(scope: Scope) -> Scope:
    return scope if "/files/" in scope["path"] else {**scope, "method": "GET"}


async def _answer_options(scope: Scope, send: Send) -> None:
    asked = next((value for name, value in scope["headers"] if name == b"access-control-request-headers"), b"*")
    headers = [
        (b"access-control-allow-methods", ALLOWED_METHODS),
        (b"access-control-allow-headers", asked),
        (b"access-control-allow-private-network", b"true"),
        (b"access-control-max-age", b"86400"),
        (b"vary", b"access-control-request-headers"),
    ]
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b""})
