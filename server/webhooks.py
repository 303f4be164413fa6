"""Delivery of results to callers' URLs: signed as fal signs, repeated until they arrive, never twice on purpose.

What is due stands in the ledger's outbox, written in the transaction that completed the request; this module only
sends. Signature: Ed25519 over request id, user id, timestamp and SHA-256 of the body, one a line, made anew for each
try because receivers refuse timestamps older than five minutes.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import httpcore2
import httpx2
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from server.inputs import CONNECT_TIMEOUT_S, NETWORK_ERRORS, Patience, Reach, guarded_client
from server.ledger import Ledger, OutboxRow, RequestRow
from server.schemas import with_urls
from server.settings import Settings

KEY_NAME = "webhook_signing_key"
USER_ID = "self-hosted"
FIRST_DELAY_S = 5.0
MAX_DELAY_S = 3600.0
MAX_CONCURRENT = 8

log = structlog.get_logger()


class SigningKey:
    """The server's Ed25519 key; it stands in the ledger, made at first use."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    async def open(cls, ledger: Ledger) -> SigningKey:
        """Read the key, or make one; processes that do so at once agree on the one that came first."""
        pem = await ledger.kv_get(KEY_NAME)
        if pem is None:
            new = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            pem = await ledger.kv_add(KEY_NAME, new.decode())
        key = load_pem_private_key(pem.encode(), password=None)
        assert isinstance(key, Ed25519PrivateKey)
        return cls(key)

    def jwks(self) -> dict[str, Any]:
        """The public key as a JSON web key set, for receivers that verify."""
        public = self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw)
        x = base64.urlsafe_b64encode(public).rstrip(b"=").decode()
        kid = hashlib.sha256(public).hexdigest()[:16]
        return {"keys": [{"kty": "OKP", "crv": "Ed25519", "use": "sig", "alg": "EdDSA", "kid": kid, "x": x}]}

    def headers(self, request_id: str, body: bytes, timestamp: int) -> dict[str, str]:
        """The headers that fal's receivers verify."""
        lines = [request_id, USER_ID, str(timestamp), hashlib.sha256(body).hexdigest()]
        return {
            "X-Fal-Webhook-Request-Id": request_id,
            "X-Fal-Webhook-User-Id": USER_ID,
            "X-Fal-Webhook-Timestamp": str(timestamp),
            "X-Fal-Webhook-Signature": self._key.sign("\n".join(lines).encode()).hex(),
        }


def delay_s(tries: int) -> float:
    """Seconds until the next try after `tries` of them; twelve tries span more than two hours."""
    return min(FIRST_DELAY_S * 2.0 ** (tries - 1), MAX_DELAY_S)


class WebhookSender:
    """Sends what is due in the outbox, several at a time; one per server."""

    def __init__(self, settings: Settings, ledger: Ledger, key: SigningKey) -> None:
        self._ledger, self._key, self._max_tries = ledger, key, settings.webhook_max_tries
        reach = Reach(
            allow_hosts=Reach.naming(settings.fetch_allow_hosts).allow_hosts,
            ports=None,
            private=settings.may_call_private,
        )
        self._client = guarded_client(reach)
        self._timeout_s = settings.webhook_timeout_s
        self._under_way: dict[str, asyncio.Task[None]] = {}
        # Threads of our own: receivers that say nothing must not hold those that read the ledger.
        self._threads = ThreadPoolExecutor(MAX_CONCURRENT, thread_name_prefix="webhook")
        self._is_closed = False

    async def send_due(self) -> None:
        """Start a delivery for every row that is due and not under way; does not wait for them."""
        room = MAX_CONCURRENT - len(self._under_way)
        if room <= 0:
            return
        for row in await self._ledger.outbox_due(time.time(), MAX_CONCURRENT):
            if row.request_id not in self._under_way and len(self._under_way) < MAX_CONCURRENT:
                task = asyncio.create_task(self._deliver(row))
                self._under_way[row.request_id] = task
                task.add_done_callback(partial(self._ended, row.request_id))

    def _ended(self, request_id: str, task: asyncio.Task[None]) -> None:
        del self._under_way[request_id]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("webhook_not_recorded", request_id=request_id, error=repr(error))

    async def close(self) -> None:
        """Abandon what is under way; it stays in the outbox."""
        self._is_closed = True  # the threads see it within half a second
        for task in list(self._under_way.values()):
            task.cancel()
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _deliver(self, row: OutboxRow) -> None:
        request = await self._ledger.get(row.request_id)
        if request is None:
            await self._ledger.outbox_failed(row.request_id, None, None)
            return
        status = await asyncio.get_running_loop().run_in_executor(self._threads, self._try, row, request)
        event = log.bind(request_id=row.request_id, status=status, tries=row.tries + 1)
        if status is not None and 200 <= status < 300:
            await self._ledger.outbox_delivered(row.request_id)
            event.info("webhook_delivered")
            return
        # A redirect is the receiver's mistake and following it would evade the check of the address: no more tries.
        is_final = row.tries + 1 >= self._max_tries or (status is not None and 300 <= status < 400)
        next_try = None if is_final else time.time() + delay_s(row.tries + 1)
        await self._ledger.outbox_failed(row.request_id, next_try, status)
        event.warning("webhook_failed", gave_up=is_final)

    def _try(self, row: OutboxRow, request: RequestRow) -> int | None:
        """The receiver's status; None, whatever went wrong, when there is none."""
        try:
            return self._post(row, webhook_body(request))
        except (httpx2.InvalidURL, httpx2.HTTPError, httpcore2.UnsupportedProtocol, *NETWORK_ERRORS) as error:
            log.warning("webhook_unreachable", request_id=row.request_id, error=str(error) or type(error).__name__)
        except _Closed:
            log.info("webhook_abandoned", request_id=row.request_id)
        except Exception:
            log.exception("webhook_broken", request_id=row.request_id)
        return None

    def _post(self, row: OutboxRow, body: bytes) -> int:
        headers = self._key.headers(row.request_id, body, int(time.time()))
        # Only the head of the answer counts: what follows it may be without end.
        with self._client.stream(
            "POST",
            row.url,
            content=body,
            headers={"content-type": "application/json", **headers},
            timeout=httpx2.Timeout(self._timeout_s, connect=CONNECT_TIMEOUT_S),
            extensions={"patience": Patience.of(self._timeout_s, self._check_open)},
        ) as answer:
            return answer.status_code

    def _check_open(self) -> None:
        if self._is_closed:
            raise _Closed


class _Closed(Exception):
    """The sender was closed while a delivery was under way."""


def webhook_body(request: RequestRow) -> bytes:
    """The JSON that fal posts: the output under `payload`, or the error's body and its status."""
    is_good = request.outcome_status == 200
    body: dict[str, Any] = {
        "request_id": request.id,
        "gateway_request_id": request.id,
        "status": "OK" if is_good else "ERROR",
        "payload": with_urls(request.outcome_body, request.base_url) if is_good else request.outcome_body,
    }
    if not is_good:
        body["error"] = f"Invalid status code: {request.outcome_status}"
    return json.dumps(body, ensure_ascii=False).encode()
