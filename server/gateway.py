"""What the routes of one gateway share."""

from __future__ import annotations

from dataclasses import dataclass

from server.auth import Keyring, Tickets
from server.ledger import Ledger, RequestRow
from server.settings import Settings
from server.storage import Storage
from server.uploads import Uploads
from server.wakeup import Bell, ring

POLL_S = 0.5  # a bell that was missed delays no longer than this


@dataclass(frozen=True, kw_only=True)
class Gateway:
    """Everything behind the routes; open while the app runs."""

    settings: Settings
    ledger: Ledger
    storage: Storage
    keyring: Keyring
    tickets: Tickets
    uploads: Uploads
    bell: Bell

    def wake_dispatcher(self) -> None:
        """Tell the dispatcher that there is something new in the ledger."""
        ring(self.settings.run_dir, "dispatcher")

    async def completed(self, request_id: str) -> RequestRow | None:
        """Wait until a request is over; None if it was forgotten in the meantime."""
        row = await self.ledger.get(request_id)
        while row is not None and not row.is_completed:
            await self.bell.wait(POLL_S)
            row = await self.ledger.get(request_id)
        return row
