"""What is plugged into what: the gateway's layers, routes and listeners."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import uuid
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

import structlog
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from server.auth import Keyring, OperatorKey, Tickets
from server.envelope import Envelope
from server.errors import (
    ClientDisconnected,
    GatewayError,
    InvalidInput,
    MethodNotAllowed,
    PathNotFound,
    answer_to,
    detail_item,
    to_json,
)
from server.fal_proxy import fal_proxy
from server.gateway import Gateway
from server.hosts import HostRouting
from server.ledger import Ledger
from server.ledger.sqlite import LedgerUnavailable
from server.protocol import PatientProtocol
from server.routes import files, openapi, operator, ops, playground, queue, rest, run
from server.routes.declared import COMPONENTS
from server.schemas import ErrorBody
from server.settings import Settings
from server.storage import Storage, StorageUnavailable
from server.tls import ensure_certificates, own_hosts
from server.uploads import Uploads
from server.wakeup import Bell, Ringer

KEEP_ALIVE_S = 75
CERTIFICATE_CHECK_S = 86400.0
LAST_ANSWERS_S = 5  # for what is under way when the gateway is stopped; runs were waited for before

log = structlog.get_logger()


class GatewayApp(FastAPI):
    """FastAPI with our two layers outside of everything, so that they see internal errors as well."""

    settings: Settings

    def build_middleware_stack(self) -> ASGIApp:
        """The layers from outside in: envelope, routing by host, FastAPI's own."""
        routing = HostRouting(
            super().build_middleware_stack(),
            public_url=self.settings.public_url,
            trusted_proxies=self.settings.trusted_proxies,
        )
        return Envelope(routing)

    def openapi(self) -> dict[str, Any]:
        """FastAPI's document, with the schemas that our declarations refer to."""
        document = super().openapi()
        document["components"]["schemas"].update(COMPONENTS)
        return document


def create_app(settings: Settings) -> FastAPI:
    """The gateway as an ASGI application; its lifespan opens and closes the ledger."""
    app = GatewayApp(
        title="creative-upscaler",
        description="A self-hosted inference server for creative image upscaling that speaks fal's HTTP API.",
        lifespan=lifespan,
        redirect_slashes=False,
        responses={"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}},
        docs_url=None,
        redoc_url=None,
    )
    app.settings = settings
    for part in (queue, run, rest, files, openapi, ops, operator, playground):
        app.include_router(part.router)
    for kind in (GatewayError, InvalidInput, LedgerUnavailable, StorageUnavailable):
        app.add_exception_handler(kind, answer_known)
    app.add_exception_handler(ClientDisconnect, answer_nobody)
    app.add_exception_handler(HTTPException, answer_http)
    app.add_exception_handler(RequestValidationError, answer_parameters)
    app.add_exception_handler(Exception, answer_unknown)
    return app


@contextlib.asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open what the routes work with for as long as the app runs."""
    assert isinstance(app, GatewayApp)
    settings = app.settings
    with (
        contextlib.closing(Ledger.open(settings)) as ledger,
        contextlib.closing(Bell(settings.run_dir, "gateway")) as bell,
        contextlib.closing(Ringer(settings.run_dir, "dispatcher")) as dispatcher,
    ):
        storage = Storage.open(settings)
        app.state.gateway = Gateway(
            settings=settings,
            ledger=ledger,
            storage=storage,
            keyring=Keyring(settings.api_keys),
            operator_key=OperatorKey.open(settings),
            tickets=await Tickets.open(ledger),
            uploads=Uploads(settings.uploads_dir, storage, ledger, max_bytes=int(settings.max_upload_mb * 2**20)),
            bell=bell,
            dispatcher=dispatcher,
            own_hosts=frozenset(own_hosts(settings)),
        )
        sweeping = asyncio.create_task(app.state.gateway.uploads.sweep_in_time())
        try:
            yield
        finally:
            sweeping.cancel()


async def answer_known(request: Request, error: Exception) -> Response:
    """One of our exceptions in fal's words."""
    status, body, headers = answer_to(error)
    return Response(to_json(body), status, headers, media_type="application/json")


async def answer_nobody(request: Request, error: Exception) -> Response:
    """The client hung up in the middle of its body; nobody reads this."""
    return await answer_known(request, ClientDisconnected())


async def answer_http(request: Request, error: Exception) -> Response:
    """What the router itself refuses: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    known: Exception = PathNotFound(request.url.path) if error.status_code == 404 else GatewayError(str(error.detail))
    if error.status_code == 405:
        known = MethodNotAllowed()
    status, body, headers = answer_to(known)
    if type(known) is GatewayError:
        status, body = error.status_code, {"detail": error.detail}
    return Response(to_json(body), status, {**headers, **(error.headers or {})}, media_type="application/json")


async def answer_parameters(request: Request, error: Exception) -> Response:
    """Query parameters and path parts that do not fit."""
    assert isinstance(error, RequestValidationError)
    items = [
        detail_item(found["type"], found["msg"], loc=found["loc"], ctx=found.get("ctx"), input=found.get("input"))
        for found in error.errors()
    ]
    return await answer_known(request, InvalidInput(items))


async def answer_unknown(request: Request, error: Exception) -> Response:
    """A fault of ours: said without particulars, logged with all of them, under the id that the caller sees."""
    request_id = str(uuid.uuid4())
    log.error("internal_error", request_id=request_id, path=request.url.path, exc_info=error)
    answer = await answer_known(request, error)
    answer.headers["x-fal-request-id"] = request_id
    return answer


class Listener(uvicorn.Server):
    """A uvicorn server that leaves signals to whoever runs it."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Nothing to capture."""
        yield


async def serve_gateway(settings: Settings) -> None:
    """Serve the app on the HTTP and the HTTPS port until cancelled; answers under way then have some seconds to end."""
    app = create_app(settings)
    async with app.router.lifespan_context(app), fal_proxy(settings):
        listeners = make_listeners(app, settings)
        serving = [asyncio.create_task(listener.serve()) for listener in listeners]
        renewing = asyncio.create_task(renew_certificates(settings, listeners))
        try:
            await asyncio.wait(serving, return_when=asyncio.FIRST_COMPLETED)
        finally:
            renewing.cancel()
            for listener in listeners:
                listener.should_exit = True
            await asyncio.gather(*serving, return_exceptions=True)
        for task in serving:
            task.result()


def make_listeners(app: FastAPI, settings: Settings) -> list[Listener]:
    """One server per port that is not off, all with the same app."""
    common: dict[str, Any] = {
        "app": app,
        "host": settings.host,
        "lifespan": "off",
        "ws": "none",
        "access_log": False,
        "log_config": None,
        "server_header": False,
        "proxy_headers": False,
        "timeout_keep_alive": KEEP_ALIVE_S,
        "timeout_graceful_shutdown": min(LAST_ANSWERS_S, max(1, round(settings.drain_s))),
        "http": partial(PatientProtocol, patience_s=settings.client_patience_s),
    }
    configs = [uvicorn.Config(port=settings.port, **common)] if settings.port else []
    if settings.tls_port:
        certificates = ensure_certificates(settings)
        configs.append(
            uvicorn.Config(
                port=settings.tls_port, ssl_certfile=certificates.chain, ssl_keyfile=certificates.key, **common
            )
        )
    return [Listener(config) for config in configs]


async def renew_certificates(settings: Settings, listeners: list[Listener]) -> None:
    """Once a day, renew our certificate if it is due; new connections get the new one."""
    while True:
        await asyncio.sleep(CERTIFICATE_CHECK_S)
        contexts = [listener.config.ssl for listener in listeners if isinstance(listener.config.ssl, ssl.SSLContext)]
        if contexts:
            certificates = await asyncio.to_thread(ensure_certificates, settings)
            for context in contexts:
                context.load_cert_chain(certificates.chain, certificates.key)
