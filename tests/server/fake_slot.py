"""A slot and its dispatcher reduced to what the gateway can see of them: changes in the ledger, and the bell."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from server.ledger import Ledger, NewLog, Outcome, RequestRow
from server.settings import Settings
from server.wakeup import ring

TOKEN = "token"
PICTURE = "out/ab/0123456789_picture.png"


def picture(seed: int = 7) -> Outcome:
    """How a request ends that went well."""
    image = {"url": f"blob:{PICTURE}", "content_type": "image/png", "width": 2, "height": 2}
    return Outcome(status=200, body={"image": image, "seed": seed}, inference_s=1.5, blobs=(PICTURE,))


class FakeSlot:
    """Drives requests through their states from outside the gateway, with a ledger connection of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self.ledger = settings, Ledger.open(settings)

    def close(self) -> None:
        """Let go of the ledger."""
        self.ledger.close()

    def start(self, request_id: str) -> None:
        """Begin to work on a request."""
        assert asyncio.run(self.ledger.claim(request_id, "slot-0", TOKEN))
        self._ring()

    def log(self, request_id: str, *messages: str) -> None:
        """Report something about it."""
        asyncio.run(self.ledger.append_logs(request_id, TOKEN, [NewLog(time.time(), "INFO", m) for m in messages]))
        self._ring()

    def finish(self, request_id: str, outcome: Outcome | None = None) -> None:
        """End it, with a picture unless told otherwise."""
        assert asyncio.run(self.ledger.complete(request_id, TOKEN, outcome or picture()))
        self._ring()

    def row(self, request_id: str) -> RequestRow:
        """What the ledger knows of it."""
        row = asyncio.run(self.ledger.get(request_id))
        assert row is not None
        return row

    def job(self, request_id: str) -> dict[str, Any]:
        """What a dispatcher would give to a slot for this waiting request."""
        job = next(row.job for row in asyncio.run(self.ledger.queued(100)) if row.id == request_id)
        assert job is not None
        return job

    def expire(self) -> None:
        """End what has waited past its start deadline, as a dispatcher does."""
        asyncio.run(self.ledger.expire_start(time.time()))
        self._ring()

    def wait_for_request(self, **attributes: Any) -> RequestRow:
        """The one request that waits or runs, as soon as it is there and has these attributes."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            for row in [*asyncio.run(self.ledger.queued(10)), *asyncio.run(self.ledger.running())]:
                if all(getattr(row, name) == value for name, value in attributes.items()):
                    return row
            time.sleep(0.01)
        raise AssertionError(f"no request with {attributes} within 5 s")

    @contextmanager
    def at_work(self, outcome: Outcome | None = None, then: Callable[[], object] = lambda: None) -> Iterator[None]:
        """Serve the next request in the background; `then` is called when it is done."""

        def serve() -> None:
            request_id = self.wait_for_request(state="IN_QUEUE").id
            self.start(request_id)
            self.finish(request_id, outcome)
            then()

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()

    def _ring(self) -> None:
        ring(self._settings.run_dir, "gateway")
