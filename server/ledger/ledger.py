"""The ledger's verbs: what gateway and dispatcher may do to a request, each one transaction."""

from __future__ import annotations

import json
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from server.ledger.migrate import migrate
from server.ledger.sqlite import SqliteConnector, Writer
from server.ledger.states import (
    Backlog,
    Blob,
    CancelAnswer,
    LogRow,
    Mode,
    NewLog,
    NewRequest,
    Order,
    OutboxRow,
    Outcome,
    QueueRow,
    RequestRow,
    SlotRow,
    State,
)
from server.settings import Settings

SLOT_SILENCE_S = 15.0  # a slot not heard of for so long is not ready
SHORT_RETENTION_S = 3600.0  # fal keeps what may not be stored for an hour, too
SWEEP_BATCH = 500
MAX_DOOMED = 10_000  # files deleted by one sweep; the next one deletes the rest
ORDERS_KEPT_S = 3600.0
MODE = "mode"
SWEEP = "sweep"  # holder of files that are to be deleted
EXACT_POSITIONS = 500  # deeper in the queue, positions may be a second old
POSITIONS_AGE_S = 1.0

CANCELLED = Outcome(
    status=499,
    body={"detail": "Request was cancelled", "error_type": "client_cancelled"},
    error="Request was cancelled",
    error_type="client_cancelled",
    headers={"X-Fal-Error-Type": "client_cancelled"},
)
START_TIMEOUT = Outcome(
    status=504,
    body={"detail": "Request could not be started within the requested time", "error_type": "request_timeout"},
    error="Request could not be started within the requested time",
    error_type="request_timeout",
    headers={"X-Fal-Error-Type": "request_timeout", "X-Fal-Request-Timeout-Type": "user"},
)

# Made once: json.dumps with an option would make one for every row and answer.
ENCODER = json.JSONEncoder(separators=(",", ":"), allow_nan=False)


def compact_json(value: Any) -> str:
    """JSON in ASCII, so that whatever a caller sent can be stored and sent again; no NaN."""
    return ENCODER.encode(value)


class Ledger:
    """The truth about every request; every coroutine returns when its change is durable."""

    def __init__(
        self, connector: SqliteConnector, *, retention_s: float, clock: Callable[[], float] = time.time
    ) -> None:
        self._db, self._retention_s, self._clock = connector, retention_s, clock
        self._positions: tuple[float, list[int], list[int]] = (0.0, [], [])

    @classmethod
    def open(cls, settings: Settings, *, clock: Callable[[], float] = time.time) -> Ledger:
        """Open the ledger of this data folder, bringing its tables up to date first."""
        settings.make_folders()
        migrate(settings.ledger_path)
        return cls(SqliteConnector(settings.ledger_path), retention_s=settings.retention_s, clock=clock)

    def close(self) -> None:
        """Write what is pending and let go of the database."""
        self._db.close()

    # -- requests ------------------------------------------------------------------------------------------------

    async def submit(self, request: NewRequest) -> int:
        """Accept a request; with an outcome it is born completed, webhook included. Returns how many wait before it."""
        now = self._clock()
        outcome = request.outcome
        job = compact_json(request.job) if request.job is not None else None
        fixed = {
            "id": request.id,
            "endpoint": request.endpoint,
            "state": (State.COMPLETED if outcome else State.IN_QUEUE).value,
            "priority": request.priority,
            "created": now,
            "start_deadline": request.start_deadline,
            "job": job,
            "caller": request.caller,
            "store_io": request.store_io,
            "base_url": request.base_url,
            "expires_s": request.expires_s,
            "retry": request.retry,
            "webhook_url": request.webhook_url,
            "attempt": 0,
            "event_seq": 0,
            "cancel_requested": False,
            "retain_until": self._retain_until(now, request.store_io) if outcome else None,
            **(_outcome_columns(outcome, now) if outcome else NO_OUTCOME),
        }

        def write(db: Writer) -> int:
            seq = int(db.rows("submit", **fixed)[0][0])
            for number, line in enumerate(request.logs, 1):
                db.run("first_log", request_id=request.id, seq=number, **_log_columns(line))
            for key in request.blobs:
                db.run("hold_blob", key=key, holder=request.id, expires=None)
            if outcome and request.webhook_url:
                db.run("outbox_add", id=request.id, url=request.webhook_url, now=now)
            return seq

        seq = await self._db.write(write)
        return 0 if outcome else self._position(request.priority, seq)

    async def get(self, request_id: str) -> RequestRow | None:
        """The request, with its place in the queue while it waits; cheap enough for ten polls a second of thousands."""
        rows = self._db.read("get", id=request_id)
        if not rows:
            return None
        if rows[0][3] == "IN_QUEUE":
            return RequestRow(*(*rows[0], self._position(rows[0][4], rows[0][0])))
        return RequestRow(*rows[0])

    async def logs(self, request_id: str, after_seq: int = 0) -> list[LogRow]:
        """The request's log lines after the given one, in order."""
        return [LogRow(*row) for row in self._db.read("logs", id=request_id, after_seq=after_seq)]

    async def num_queued(self) -> int:
        """How many requests wait."""
        return int(self._db.read("count_queued")[0][0])

    async def open_requests(self) -> list[QueueRow]:
        """What waits and runs, by endpoint and priority."""
        return [QueueRow(*row) for row in await self._db.scan("open_requests")]

    async def webhook_backlog(self) -> Backlog:
        """The webhooks that are not delivered yet, and not given up."""
        return Backlog(*(await self._db.scan("outbox_backlog"))[0])

    async def request_cancel(self, request_id: str) -> CancelAnswer:
        """Cancel: at once while it waits, by asking the slot while it runs."""

        def write(db: Writer) -> CancelAnswer:
            found = db.rows("get", id=request_id)
            if not found:
                return "NOT_FOUND"
            request = RequestRow(*found[0])
            if request.is_completed:
                return "ALREADY_COMPLETED"
            if request.state == State.IN_QUEUE.value:
                self._end_queued(db, request, CANCELLED)
                return "OK"
            db.run("request_cancel", id=request_id)
            return "CANCELLATION_REQUESTED"

        return await self._db.write(write)

    # -- dispatch ------------------------------------------------------------------------------------------------

    async def queued(self, limit: int) -> list[RequestRow]:
        """The next requests to run, with their jobs: normal before low, then in order of arrival."""
        return [RequestRow(*row) for row in await self._db.scan("queued", limit=limit)]

    async def running(self) -> list[RequestRow]:
        """All requests that a slot holds."""
        return [RequestRow(*row) for row in await self._db.scan("running")]

    async def cancels(self) -> list[RequestRow]:
        """Running requests that shall stop."""
        return [RequestRow(*row) for row in await self._db.scan("cancels")]

    async def claim(self, request_id: str, slot_id: str, token: str) -> bool:
        """Give a waiting request to a slot; False when it waits no longer or its start deadline has passed."""
        now = self._clock()
        return await self._db.write(lambda db: db.run("claim", id=request_id, slot=slot_id, token_=token, now=now) == 1)

    async def append_logs(self, request_id: str, token: str, lines: Sequence[NewLog]) -> bool:
        """Add log lines of an attempt; lines whose event is recorded already are left out.

        Returns whether the attempt still holds the request.
        """

        def write(db: Writer) -> bool:
            found = db.rows("get", id=request_id)
            request = RequestRow(*found[0]) if found else None
            if request is None or request.token != token:
                return False
            new = [line for line in lines if line.event_seq == 0 or line.event_seq > request.event_seq]
            for line in new:
                db.run("log", request_id=request_id, **_log_columns(line))
            latest = max((line.event_seq for line in new), default=0)
            if latest:
                db.run("record_event", id=request_id, token_=token, event_seq=latest)
            return True

        return await self._db.write(write)

    async def complete(self, request_id: str, token: str, outcome: Outcome) -> bool:
        """End an attempt and its request, with the webhook's outbox row; False when the attempt lost its hold."""
        now = self._clock()

        def write(db: Writer) -> bool:
            found = db.rows("get", id=request_id)
            request = RequestRow(*found[0]) if found else None
            if request is None or request.token != token:
                return False
            columns = self._end_columns(request, outcome, now)
            if not db.run("complete", id=request_id, token_=token, **columns):
                return False
            self._finish(db, request, outcome, now)
            return True

        return await self._db.write(write)

    async def requeue(self, request_id: str, token: str, *, counts: bool = True) -> bool:
        """Put a request whose attempt was lost back at its old place; one that was being cancelled ends instead.

        The attempt counts unless it was us who ended it.
        """
        now = self._clock()

        def write(db: Writer) -> bool:
            if db.run("requeue", id=request_id, token_=token, uncounted=0 if counts else 1):
                return True
            found = db.rows("get", id=request_id)
            request = RequestRow(*found[0]) if found else None
            if request is None or request.token != token:
                return False
            db.run("complete", id=request_id, token_=token, **self._end_columns(request, CANCELLED, now))
            self._finish(db, request, CANCELLED, now)
            return True

        return await self._db.write(write)

    async def expire_start(self, now: float) -> list[str]:
        """End the waiting requests whose start deadline has passed; returns their ids."""
        late = [RequestRow(*row) for row in await self._db.scan("late_starters", now=now, limit=SWEEP_BATCH)]
        if not late:
            return []
        return await self._db.write(
            lambda db: [request.id for request in late if self._end_queued(db, request, START_TIMEOUT)]
        )

    # -- webhooks ------------------------------------------------------------------------------------------------

    async def outbox_due(self, now: float, limit: int) -> list[OutboxRow]:
        """Webhooks to deliver now, oldest first."""
        return [OutboxRow(*row) for row in await self._db.scan("outbox_due", now=now, limit=limit)]

    async def outbox_delivered(self, request_id: str, status: int = 200) -> None:
        """Record that the receiver took the webhook."""
        now = self._clock()
        await self._db.write(lambda db: db.run("outbox_delivered", id=request_id, status=status, now=now))

    async def outbox_failed(self, request_id: str, next_try: float | None, status: int | None) -> None:
        """Record a failed delivery; without a time for the next one it is given up."""
        await self._db.write(lambda db: db.run("outbox_failed", id=request_id, next_try=next_try, status=status))

    # -- files and retention -------------------------------------------------------------------------------------

    async def hold_blob(self, blob: Blob) -> bool:
        """Keep a stored file for a holder until a time; False when it is about to be deleted, or was just now."""

        def write(db: Writer) -> bool:
            if db.rows("is_doomed", key=blob.key, holder=SWEEP)[0][0]:
                return False
            db.run("hold_blob", key=blob.key, holder=blob.holder, expires=blob.expires)
            return True

        return await self._db.write(write)

    async def sweep(self, now: float) -> list[str]:
        """Forget what is past its retention; returns the keys of files to delete.

        Nobody can hold these any more, so that they can be deleted in peace. They are returned again until `deleted`
        is told of them.
        """
        while batch := await self._db.scan("outdated", now=now, limit=SWEEP_BATCH):
            await self._db.write(partial(_forget, ids=[row[0] for row in batch]))
        await self._db.write(lambda db: _doom_unheld(db, [row[0] for row in db.rows("expire_blobs", now=now)]))
        await self._db.write(lambda db: db.run("orders_forget", before=now - ORDERS_KEPT_S))
        return [row[0] for row in await self._db.scan("doomed", holder=SWEEP, limit=MAX_DOOMED)]

    async def deleted(self, keys: Sequence[str]) -> None:
        """Record that these files of a sweep are gone; their names are free again."""

        def write(db: Writer) -> None:
            for key in keys:
                db.run("forget_blob", key=key, holder=SWEEP)

        if keys:
            await self._db.write(write)

    # -- slots and small facts -----------------------------------------------------------------------------------

    async def put_slot(self, slot: SlotRow) -> None:
        """Record what a slot says of itself; without a heartbeat of its own, now is taken."""
        heartbeat = slot.heartbeat or self._clock()
        await self._db.write(
            lambda db: db.run(
                "put_slot",
                id=slot.id,
                state=slot.state,
                device=slot.device,
                weights=slot.weights,
                detail=slot.detail,
                heartbeat=heartbeat,
                report=slot.report_json,
            )
        )

    async def slots(self) -> list[SlotRow]:
        """Every slot that was ever heard of."""
        return [SlotRow(*row) for row in self._db.read("slots")]

    async def is_ready(self, since: float = 0.0) -> bool:
        """Whether some slot can take a request; see `able_slots`."""
        return bool(await self.able_slots(since))

    async def able_slots(self, since: float = 0.0) -> list[SlotRow]:
        """The slots that can take a request, now or after the one they are at; heard of after `since`, Unix seconds."""
        oldest = max(self._clock() - SLOT_SILENCE_S, since)
        return [slot for slot in await self.slots() if slot.state in ("ready", "busy") and slot.heartbeat > oldest]

    async def mode(self) -> Mode:
        """What the operator lets the server do."""
        return Mode(await self.kv_get(MODE) or Mode.RUNNING)

    async def set_mode(self, mode: Mode) -> None:
        """Let the server do so, until something else is said."""
        await self.kv_set(MODE, mode.value)

    async def add_order(self, order: Order) -> None:
        """Record what the operator wants."""
        await self._db.write(lambda db: db.run("order_add", answers=None, **_without_answers(order)))

    async def order(self, order_id: str) -> Order | None:
        """An order, with the slots' answers when it is done."""
        rows = self._db.read("order_get", id=order_id)
        return Order(*rows[0]) if rows else None

    async def open_orders(self) -> list[Order]:
        """What is not done yet, oldest first."""
        return [Order(*row) for row in self._db.read("orders_open")]

    async def end_order(self, order_id: str, answers: dict[str, str]) -> None:
        """Record what the slots answered."""
        await self._db.write(lambda db: db.run("order_done", id=order_id, answers=compact_json(answers)))

    async def kv_get(self, key: str) -> str | None:
        """A small fact, or None."""
        rows = self._db.read("kv_get", key=key)
        return str(rows[0][0]) if rows else None

    async def kv_set(self, key: str, value: str) -> None:
        """Remember a small fact."""
        await self._db.write(lambda db: db.run("kv_set", key=key, value=value))

    async def kv_add(self, key: str, value: str) -> str:
        """Remember a small fact unless it is known; returns what is known now."""

        def write(db: Writer) -> str:
            db.run("kv_add", key=key, value=value)
            return str(db.rows("kv_get", key=key)[0][0])

        return await self._db.write(write)

    # ------------------------------------------------------------------------------------------------------------

    def _position(self, priority: str, seq: int) -> int:
        """Requests that will run before this one: exact near the head, at most a second old further back."""
        taken, normal, low = self._positions
        if self._clock() - taken <= POSITIONS_AGE_S:
            ahead = _place_in(normal, low, priority, seq)
            if ahead > EXACT_POSITIONS:
                return ahead
        ahead = int(self._db.read("count_ahead", priority=priority, seq=seq)[0][0])
        if ahead > EXACT_POSITIONS:
            # Counting takes as long as the queue: the next ones look into a list of it.
            normal, low = [], []
            for kind, number in self._db.read("queued_order"):
                (normal if kind == "normal" else low).append(number)
            self._positions = (self._clock(), normal, low)
        return ahead

    def _retain_until(self, now: float, store_io: bool) -> float:
        return now + (self._retention_s if store_io else min(self._retention_s, SHORT_RETENTION_S))

    def _end_columns(self, request: RequestRow, outcome: Outcome, now: float) -> dict[str, Any]:
        return {
            **_outcome_columns(outcome, now),
            "retain_until": self._retain_until(now, request.store_io),
        }

    def _end_queued(self, db: Writer, request: RequestRow, outcome: Outcome) -> bool:
        now = self._clock()
        if not db.run("end_queued", id=request.id, **self._end_columns(request, outcome, now)):
            return False
        self._finish(db, request, outcome, now)
        return True

    def _finish(self, db: Writer, request: RequestRow, outcome: Outcome, now: float) -> None:
        db.run("let_go_inputs" if request.store_io else "let_go_all_inputs", id=request.id, now=now)
        expires_s = db.rows("expires_s", id=request.id)[0][0]
        for key in outcome.blobs:
            db.run("hold_blob", key=key, holder=request.id, expires=None if expires_s is None else now + expires_s)
        if request.webhook_url:
            db.run("outbox_add", id=request.id, url=request.webhook_url, now=now)


def _place_in(normal: list[int], low: list[int], priority: str, seq: int) -> int:
    return bisect_left(normal, seq) if priority == "normal" else len(normal) + bisect_left(low, seq)


def _without_answers(order: Order) -> dict[str, Any]:
    return {name: value for name, value in asdict(order).items() if name != "answers_json"}


NO_OUTCOME: dict[str, Any] = {
    "finished": None,
    "outcome_status": None,
    "outcome": None,
    "outcome_headers": None,
    "error": None,
    "error_type": None,
    "inference_s": None,
}


def _outcome_columns(outcome: Outcome, now: float) -> dict[str, Any]:
    return {
        "finished": now,
        "outcome_status": outcome.status,
        "outcome": compact_json(outcome.body),
        "outcome_headers": compact_json(outcome.headers) if outcome.headers else None,
        "error": outcome.error,
        "error_type": outcome.error_type,
        "inference_s": outcome.inference_s,
    }


def _log_columns(line: NewLog) -> dict[str, Any]:
    # SQLite's text is UTF-8, which has no lone surrogates.
    message = line.message.encode("utf-8", "replace").decode("utf-8")
    return {"timestamp": line.timestamp, "level": line.level, "message": message}


def _forget(db: Writer, ids: list[str]) -> None:
    released: list[str] = []
    for request_id in ids:
        released += [row[0] for row in db.rows("release_blobs", id=request_id)]
        for name in ("forget_logs", "forget_outbox", "forget_request"):
            db.run(name, id=request_id)
    _doom_unheld(db, released)


def _doom_unheld(db: Writer, keys: list[str]) -> None:
    for key in dict.fromkeys(keys):
        if not db.rows("is_held", key=key)[0][0]:
            db.run("hold_blob", key=key, holder=SWEEP, expires=None)
