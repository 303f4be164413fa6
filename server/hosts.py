"""Which API a request means: by prefix, by host name, or by the header of a client's proxy mode.

fal serves its APIs on hosts of their own; here they share one. A small table decides, the path is brought into one form
(`/run/…`, `/queue/…`, or a path of our own), and nothing behind this layer knows that there were others: no slash at
the end, no sub-path before `requests`, no redirect.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from server.errors import BadRequest, MethodNotAllowed, answer_to, to_json
from server.schemas import Base

RUN, QUEUE, REST = "run", "queue", "rest"
PREFIXES = (RUN, QUEUE, REST)

FAL_HOSTS: Mapping[str, str] = {
    "fal.run": RUN,
    "falrun.com": RUN,
    "queue.fal.run": QUEUE,
    "queue.falrun.com": QUEUE,
    "rest.fal.ai": REST,
    "rest.alpha.fal.ai": REST,
}
"""What a client's proxy mode may name as its target, besides our own host."""

MEDIA_HOSTS = ("v3.fal.media", "v3b.fal.media", "fal.media")
"""Where clients upload to and read from; with DNS or CONNECT mapping they end here."""

OWN_PATHS = frozenset(
    {
        "",
        ".well-known",
        "api",
        "docs",
        "files",
        "health",
        "metrics",
        "openapi.json",
        "operator",
        "playground",
        "ready",
        "storage",
        "tokens",
    }
)
"""First segments that are no model's owner, on every host."""

PROXY_PATHS = frozenset({("api", "fal", "proxy"), ("fal", "proxy")})
PROXY_METHODS = frozenset({"GET", "POST", "PUT", "HEAD"})
TARGET_HEADER = b"x-fal-target-url"
HOST = re.compile(r"[A-Za-z0-9._-]+(?::\d{1,5})?|\[[0-9A-Fa-f:.]+\](?::\d{1,5})?", re.ASCII)
ACTIONS: Mapping[tuple[str, ...], str] = {
    (): "",
    ("response",): "",
    ("status",): "/status",
    ("status", "stream"): "/status/stream",
    ("cancel",): "/cancel",
    ("preview",): "/preview",
}


class Route(NamedTuple):
    """What a request means: `api` is run, queue or rest, `path` its path in the one form."""

    api: str
    path: str


def resolve(host: str, path: str) -> Route:
    """The API and the path that are meant by a path on a host (without port)."""
    segments = [segment for segment in path.split("/") if segment]
    first = segments[0] if segments else ""
    if first in PREFIXES:
        return _route(first, segments[1:])
    if first in OWN_PATHS or tuple(segments) in PROXY_PATHS:
        return _route(REST, segments)
    return _route(api_of(host), segments)


def api_of(host: str) -> str:
    """The API that a host name stands for: any `queue.…` is the queue's, fal's REST hosts are theirs, others run."""
    if host.partition(".")[0] == "queue":
        return QUEUE
    if host in MEDIA_HOSTS:
        return REST
    return FAL_HOSTS.get(host, RUN)


def _route(api: str, segments: Sequence[str]) -> Route:
    if api == REST:
        return Route(REST, "/" + "/".join(segments))
    if "requests" in segments[2:]:
        place = segments.index("requests", 2)
        action = ACTIONS.get(tuple(segments[place + 2 :]))
        if action is not None and place + 1 < len(segments):
            # Status and results are the queue's wherever they are asked for; what stood before is the app's sub-path.
            return Route(QUEUE, f"/queue/{segments[0]}/{segments[1]}/requests/{segments[place + 1]}{action}")
    return Route(api, f"/{api}/" + "/".join(segments))


class Networks:
    """Addresses whose forwarding headers are believed."""

    def __init__(self, names: Sequence[str]) -> None:
        self._networks = [ipaddress.ip_network(name, strict=False) for name in names]

    def __contains__(self, address: str) -> bool:
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return False
        return any(found in network for network in self._networks)

    def __bool__(self) -> bool:
        return bool(self._networks)


class Origin(NamedTuple):
    """Scheme and host as the caller sees them."""

    scheme: str
    netloc: str

    @property
    def host(self) -> str:
        """The host's name without its port."""
        return host_of(self.netloc)


def host_of(netloc: str) -> str:
    """The name in `name:port`, lower case, brackets and a final dot removed."""
    name = netloc.partition("]")[0].lstrip("[") if netloc.startswith("[") else netloc.partition(":")[0]
    return name.lower().rstrip(".")


class HostRouting:
    """ASGI layer: rewrites `path` and notes in the scope, as `base`, under which URLs the caller finds us."""

    def __init__(self, app: ASGIApp, *, public_url: str | None, trusted_proxies: Sequence[str]) -> None:
        self._app, self._public_url, self._trusted = app, public_url, Networks(trusted_proxies)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Route one request, or answer a proxy request that names no target of ours."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        origin = self._origin(scope)
        route = resolve(origin.host, scope["path"])
        try:
            if route.api == REST and tuple(route.path.split("/")[1:]) in PROXY_PATHS:
                route = self._target(scope, origin)
                self._rewrite(scope, route, origin, by_host=False)
            else:
                self._rewrite(scope, route, origin, by_host=not scope["path"].lstrip("/").startswith("queue/"))
        except (BadRequest, MethodNotAllowed) as error:
            status, body, headers = answer_to(error)
            refusal = Response(to_json(body), status, headers, media_type="application/json")
            await refusal(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _rewrite(self, scope: Scope, route: Route, origin: Origin, *, by_host: bool) -> None:
        root = self._public_url or f"{origin.scheme}://{origin.netloc}"
        is_queue_host = by_host and self._public_url is None and api_of(origin.host) == QUEUE
        scope["base"] = Base(root, root if is_queue_host else f"{root}/queue")
        scope["path"] = route.path
        scope["raw_path"] = route.path.encode("utf-8", "replace")

    def _origin(self, scope: Scope) -> Origin:
        scheme, netloc = scope["scheme"], b""
        forwarded: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name == b"host":
                netloc = value
            elif name in (b"x-forwarded-proto", b"x-forwarded-host"):
                forwarded[name] = value.split(b",")[0].strip()
        client = scope.get("client")
        if forwarded and self._trusted and client and client[0] in self._trusted:
            if forwarded.get(b"x-forwarded-proto") in (b"http", b"https"):
                scheme = forwarded[b"x-forwarded-proto"].decode("ascii")
            netloc = forwarded.get(b"x-forwarded-host", netloc)
        text = netloc.decode("latin-1")
        if not HOST.fullmatch(text):
            server = scope.get("server") or ("localhost", None)
            text = f"{server[0]}:{server[1]}" if server[1] else str(server[0])
        return Origin(scheme, text)

    def _target(self, scope: Scope, origin: Origin) -> Route:
        """Where a proxied request is to go; it is answered here, nothing is ever fetched.

        Raises:
            BadRequest: There is no target, or it is neither fal's nor ours.
            MethodNotAllowed: No client proxies that method.
        """
        if scope["method"] not in PROXY_METHODS:
            raise MethodNotAllowed
        targets = [value for name, value in scope["headers"] if name == TARGET_HEADER]
        if len(targets) != 1:
            raise BadRequest("The header x-fal-target-url is missing")
        try:
            url = urlsplit(targets[0].decode("ascii"))
            host = (url.hostname or "").rstrip(".")
        except ValueError as error:
            raise BadRequest("The header x-fal-target-url is not a URL") from error
        if url.scheme not in ("http", "https") or not host or "@" in url.netloc:
            raise BadRequest("The header x-fal-target-url is not a URL")
        if host in FAL_HOSTS:
            route = resolve(host, unquote(url.path))
        elif url.netloc.lower() in self._own_hosts(origin):
            route = resolve(origin.host, unquote(url.path))
        else:
            raise BadRequest("The header x-fal-target-url names a host that is not served here")
        if tuple(route.path.split("/")[1:]) in PROXY_PATHS:
            raise BadRequest("The header x-fal-target-url names the proxy itself")
        scope["query_string"] = url.query.encode("ascii")
        return route

    def _own_hosts(self, origin: Origin) -> set[str]:
        own = {origin.netloc.lower()}
        if self._public_url:
            own.add(urlsplit(self._public_url).netloc.lower())
        return own
