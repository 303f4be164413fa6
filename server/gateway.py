"""What the routes of one gateway share."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from server.auth import Keyring, OperatorKey, Tickets
from server.endpoints import ENDPOINTS
from server.engine.local import preview_path, scratch_of
from server.ledger import Blob, CancelAnswer, Ledger, RequestRow, State
from server.ledger.ledger import CANCELLED
from server.metrics import GatewayMetrics
from server.settings import Settings
from server.storage import Storage, input_key
from server.uploads import Uploads
from server.wakeup import Bell, Ringer

ADMISSION_S = 3600.0
RECORDING_S = 60.0
POLL_S = 0.5  # a bell that was missed delays no longer than this


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """Everything behind the routes; open while the app runs."""

    settings: Settings
    ledger: Ledger
    storage: Storage
    keyring: Keyring
    operator_key: OperatorKey
    tickets: Tickets
    uploads: Uploads
    bell: Bell
    dispatcher: Ringer
    own_hosts: frozenset[str]  # `host[:port]` of every URL under which our files are known
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
    tasks: set[asyncio.Task[Any]] = field(default_factory=set)
    opened: float = field(default_factory=time.time)

    def in_background(self, work: Coroutine[Any, Any, Any]) -> None:
        """Do something that must happen although its caller has gone."""
        task = asyncio.get_running_loop().create_task(work)
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    async def store_input(self, data: bytes) -> str:
        """Store an input under the name of its content; returns the key."""
        key = await asyncio.to_thread(input_key, data)
        # Held before it is there and before its request is: whatever happens next, the sweep finds it in its time.
        if not await self._hold(key, ADMISSION_S):
            # An old file of this name is being deleted, and this one would be in its place.
            key = f"{key}-{secrets.token_hex(8)}"
            await self._hold(key, ADMISSION_S)
        if await self.storage.head(key) is None:
            await self.storage.put_bytes(key, data)
        return key

    async def hold_stored(self, key: str) -> bool:
        """Keep a file of ours until the request that names it is recorded; False when there is no such file."""
        return await self._hold(key, RECORDING_S) and await self.storage.head(key) is not None

    async def _hold(self, key: str, seconds: float) -> bool:
        return await self.ledger.hold_blob(Blob(key, "admission", time.time() + seconds))

    async def cancel(self, request_id: str) -> CancelAnswer:
        """Cancel a request and tell the dispatcher."""
        answer = await self.ledger.request_cancel(request_id)
        if answer == "OK" and (row := await self.ledger.get(request_id)) is not None:
            self.metrics.ended.count(row.endpoint, CANCELLED)
        self.wake_dispatcher()
        return answer

    async def preview(self, row: RequestRow) -> bytes | None:
        """The newest preview of a request that runs, as JPEG; None where there is none, or not any more."""
        if row.slot is None or row.token is None or row.state != State.IN_PROGRESS.value:
            return None
        path = preview_path(scratch_of(self.settings, row.slot), row.token)
        with contextlib.suppress(FileNotFoundError):
            return await asyncio.to_thread(path.read_bytes)
        return None

    async def endpoint_faults(self) -> dict[str, str]:
        """By endpoint, why it cannot serve a request now; empty for one that can."""
        slots = await self.ledger.able_slots(since=self.opened)
        reports = [slot.report for slot in slots]
        faults = {}
        for endpoint in ENDPOINTS.values():
            reasons = [report.failed[endpoint.pipeline] for report in reports if endpoint.pipeline in report.failed]
            is_served = any(endpoint.pipeline in report.serves for report in reports)
            faults[endpoint.id] = "" if is_served else next(iter(reasons), "No slot can take a request.")
        return faults

    def wake_dispatcher(self) -> None:
        """Tell the dispatcher that there is something new in the ledger."""
        self.dispatcher.ring()

    async def completed(self, request_id: str) -> RequestRow | None:
        """Wait until a request is over; None if it was forgotten in the meantime."""
        row = await self.ledger.get(request_id)
        while row is not None and not row.is_completed:
            await self.bell.wait(POLL_S)
            row = await self.ledger.get(request_id)
        return row
