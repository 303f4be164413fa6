"""Who works on what: claims queued requests for free slots, follows the runs, records how they end, and tries again.

There is one dispatcher at a time. It keeps nothing that matters: what it knows stands in the ledger and in the slots,
so that a new one takes over by looking at both. Every write for an attempt carries the token of that attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import math
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import structlog

from server.affinity import Place, Waiting, place
from server.engine import Engine, Event, SlotInfo, SlotLost, SlotState, Work
from server.engine.local import LocalEngine
from server.ledger import Ledger, Mode, NewLog, Order, Outcome, RequestRow, SlotRow
from server.ledger.ledger import compact_json
from server.metrics import DispatcherMetrics
from server.settings import Settings
from server.storage import OUTPUT_SUFFIXES, Storage, output_key
from server.wakeup import Bell, ring
from server.webhooks import SigningKey, WebhookSender

IDLE_S = 1.0
BEAT_S = 3.0
SWEEP_S = 60.0
LOST_S = 15.0
"""Seconds a slot may be down, without connection or heartbeat, before its run is given to another; it is killed then
if it is still there, unless it is loading."""

QUEUE_VIEW = 64
"""Queued requests looked at when a slot is free."""

GIVEN_UP = Outcome(
    # fal answers 503 here; JavaScript clients fetch a stored 503 three more times, so what is final is a 500.
    status=500,
    body={"detail": "The worker was lost while it ran the request", "error_type": "runner_disconnected"},
    error="The worker was lost while it ran the request",
    error_type="runner_disconnected",
    headers={"X-Fal-Error-Type": "runner_disconnected"},
)

ALIVE = (SlotState.READY, SlotState.BUSY)

log = structlog.get_logger()


@dataclass
class _Run:
    """An attempt that this dispatcher follows."""

    request_id: str
    endpoint: str
    slot_id: str
    token: str
    started: float = field(default_factory=time.monotonic)
    heard: float = field(default_factory=time.monotonic)
    cancelled_at: float | None = None


def kind_of(row: RequestRow) -> str:
    """Which models a request needs, by a name that such requests share."""
    job = row.job or {}
    return str(job.get("kind", job.get("pipeline", "")))


def _row_of(info: SlotInfo) -> SlotRow:
    """What the ledger keeps of a slot, as of now."""
    report = compact_json(info.report.to_json())
    return SlotRow(info.id, info.state.value, info.device, info.weights, info.detail, time.time(), report)


class Dispatcher:
    """The loop; see `step`."""

    def __init__(
        self,
        settings: Settings,
        ledger: Ledger,
        engine: Engine,
        storage: Storage,
        webhooks: WebhookSender,
        bell: Bell,
    ) -> None:
        self._settings, self._ledger, self._engine, self._storage = settings, ledger, engine, storage
        self._webhooks, self._bell = webhooks, bell
        self._runs: dict[str, _Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._unseen_since: dict[str, float] = {}
        self._told: dict[str, SlotInfo] = {}
        self._ordered: dict[str, set[str]] = {}
        self._metrics = DispatcherMetrics()
        self._mean_s = 10.0
        self._next_beat = self._next_sweep = 0.0

    async def serve(self) -> None:
        """Work until cancelled; what runs then has `drain_s` to end."""
        try:
            await self._attempt(self._disown_slots)
            while True:
                await self.step()
                await self._bell.wait(IDLE_S)
        except asyncio.CancelledError:
            await self.drain()
            raise
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def step(self) -> None:
        """One round: what is too late, what nobody follows, what can start, what shall stop, what is due.

        A part that fails is logged and comes again in the next round; the others do not wait for it.
        """
        parts: list[Callable[[], Awaitable[None]]] = [
            self._expire,
            self._adopt,
            self._pass_orders,
            self._place,
            self._stop_cancelled,
            self._end_silent,
            self._webhooks.send_due,
            self._beat,
            self._sweep_in_time,
        ]
        self._look()
        for part in parts:
            await self._attempt(part)

    async def drain(self) -> None:
        """Start nothing more, let what runs end, and queue again what does not in time, as if it had never started."""
        log.info("draining", num_runs=len(self._runs), drain_s=self._settings.drain_s)
        await self._attempt(self._refuse_more)
        deadline = time.monotonic() + self._settings.drain_s
        while self._runs and (left_s := deadline - time.monotonic()) > 0:
            await self._attempt(self._stop_cancelled)
            await self._attempt(self._webhooks.send_due)
            await self._bell.wait(min(IDLE_S, left_s))
        for run in list(self._runs.values()):
            line = "The server was stopped; the request is queued again."
            await self._ledger.append_logs(run.request_id, run.token, [NewLog(time.time(), "WARN", line)])
            await self._ledger.requeue(run.request_id, run.token, counts=False)
            log.info("request_handed_back", request_id=run.request_id)
        self._tell_gateway()

    async def _refuse_more(self) -> None:
        """Write down that no slot takes requests any more: the gateway is not ready from now on."""
        for info in self._engine.slots():
            stopping = replace(info, state=SlotState.DOWN, detail="the server is stopping")
            await self._ledger.put_slot(_row_of(stopping))

    async def _attempt(self, part: Callable[[], Awaitable[None]]) -> None:
        try:
            await part()
        except Exception:
            log.exception("dispatcher_part_failed", part=part.__name__)

    async def _disown_slots(self) -> None:
        """Write down as down what an earlier server had: whether a slot is there now is not known yet."""
        for row in await self._ledger.slots():
            await self._ledger.put_slot(replace(row, state=SlotState.DOWN.value, detail="not heard of since the start"))

    def _look(self) -> None:
        """Keep in mind since when which slots are down."""
        down = [info.id for info in self._engine.slots() if info.state is SlotState.DOWN]
        self._unseen_since = {slot_id: self._unseen_since.get(slot_id, time.monotonic()) for slot_id in down}

    async def _expire(self) -> None:
        """End what waited past its start deadline."""
        late = [await self._ledger.get(request_id) for request_id in await self._ledger.expire_start(time.time())]
        for row in filter(None, late):
            self._metrics.expired(row.endpoint)
            log.info("request_expired", request_id=row.id, endpoint=row.endpoint)
        if late:
            self._tell_gateway()

    async def _adopt(self) -> None:
        """Take up the runs that nobody follows: after a restart of this process, or when the ledger failed us."""
        slots = {info.id: info for info in self._engine.slots()}
        held = {row.token: row for row in await self._ledger.running() if row.token and row.token not in self._runs}
        for token, row in held.items():
            info = slots.get(row.slot or "")
            if info is not None and info.token == token:
                log.info("run_adopted", request_id=row.id, slot_id=info.id)
                self._follow(_Run(row.id, row.endpoint, info.id, token), self._engine.attach(info.id, token))
            elif info is None or self._is_lost(info):
                await self._take_back(row.id, token)
        for info in slots.values():
            if info.state is SlotState.DOWN:
                continue
            if info.token and info.token not in self._runs and info.token not in held:
                # Its outcome is recorded, or the attempt lost its hold: either way nobody waits for it.
                await self._engine.cancel(info.id, info.token)
                await self._engine.acknowledge(info.id, info.token)

    def _is_lost(self, info: SlotInfo) -> bool:
        """Whether a slot that does not name a run will never name it: it is up without it, or was down too long."""
        now = time.monotonic()
        return info.state is not SlotState.DOWN or now - self._unseen_since.get(info.id, now) > LOST_S

    async def _place(self) -> None:
        """Start what can start."""
        places = [self._as_place(info) for info in self._engine.slots() if info.state in ALIVE]
        if all(place.busy_s for place in places) or await self._ledger.mode() is Mode.PAUSED:
            return
        now = time.time()
        rows = {row.id: row for row in await self._ledger.queued(QUEUE_VIEW)}
        queued = [
            Waiting(request_id=row.id, pipeline=(row.job or {})["pipeline"], waited_s=now - row.created)
            for row in rows.values()
        ]
        kinds = tuple(sorted({kind_of(row) for row in rows.values()}))
        for request_id, slot_id in place(queued, places):
            await self._start(rows[request_id], slot_id, kinds)

    async def _pass_orders(self) -> None:
        """Give slots what the operator wants of them; an order whose dispatcher died is given again, which is safe."""
        for order in await self._ledger.open_orders():
            if order.id not in self._ordered:
                slot_ids = [order.slot] if order.slot else [info.id for info in self._engine.slots()]
                self._ordered[order.id] = set(slot_ids)
                self._in_background(self._follow_order(order, slot_ids))

    async def _follow_order(self, order: Order, slot_ids: list[str]) -> None:
        try:
            said = await asyncio.gather(*(self._order(slot_id, order) for slot_id in slot_ids))
            answers = dict(zip(slot_ids, said, strict=True))
            await self._ledger.end_order(order.id, answers)
            log.info("order_done", order_id=order.id, action=order.action, pipeline=order.pipeline, answers=answers)
        finally:
            del self._ordered[order.id]
        self._tell_gateway()
        ring(self._settings.run_dir, "dispatcher")

    async def _order(self, slot_id: str, order: Order) -> str:
        try:
            return await self._engine.order(slot_id, order.id, order.action, order.pipeline)
        except (SlotLost, KeyError) as error:
            return f"failed: {error if isinstance(error, SlotLost) else 'there is no such slot'}"

    def _as_place(self, info: SlotInfo) -> Place:
        started = [run.started for run in self._runs.values() if run.slot_id == info.id]
        is_ordered = any(info.id in slot_ids for slot_ids in self._ordered.values())
        is_free = info.state is SlotState.READY and not started and not is_ordered
        left_s = self._mean_s - (time.monotonic() - min(started, default=0.0))
        return Place(slot_id=info.id, hot=info.hot, busy_s=0.0 if is_free else max(1.0, left_s))

    async def _start(self, row: RequestRow, slot_id: str, queued: tuple[str, ...]) -> None:
        token = uuid.uuid4().hex
        if await self._ledger.claim(row.id, slot_id, token):
            self._metrics.started(row)
            log.info("run_started", request_id=row.id, endpoint=row.endpoint, slot_id=slot_id, attempt=row.attempt + 1)
            work = Work(request_id=row.id, endpoint=row.endpoint, token=token, job=row.job or {}, queued=queued)
            self._follow(_Run(row.id, row.endpoint, slot_id, token), self._engine.run(slot_id, work))
            self._tell_gateway()

    def _follow(self, run: _Run, batches: AsyncIterator[list[Event]]) -> None:
        self._runs[run.token] = run
        self._in_background(self._watch(run, batches))

    async def _watch(self, run: _Run, batches: AsyncIterator[list[Event]]) -> None:
        """Record what a run reports; if that fails, the next step adopts the run and reads it from its first event."""
        try:
            async for events in batches:
                await self._record(run, events)
        except SlotLost as error:
            log.warning("run_lost", request_id=run.request_id, slot_id=run.slot_id, reason=str(error))
            await self._take_back(run.request_id, run.token)
        except Exception:
            log.exception("run_not_recorded", request_id=run.request_id, slot_id=run.slot_id)
        finally:
            del self._runs[run.token]

    async def _record(self, run: _Run, events: list[Event]) -> None:
        run.heard = time.monotonic()
        lines = [replace(event.log, event_seq=event.seq) for event in events if event.log]
        if lines:
            await self._ledger.append_logs(run.request_id, run.token, lines)
        outcome = events[-1].outcome
        if outcome is not None:
            won = await self._ledger.complete(run.request_id, run.token, outcome)
            duration_s = time.monotonic() - run.started
            self._mean_s += 0.2 * (duration_s - self._mean_s)
            log.info(
                "run_finished",
                request_id=run.request_id,
                slot_id=run.slot_id,
                status=outcome.status,
                duration_s=round(duration_s, 3),
                recorded=won,
            )
            await self._engine.acknowledge(run.slot_id, run.token)
            if won:
                self._metrics.ended(run.endpoint, outcome, duration_s)
            else:
                await self._discard(run.request_id, outcome)
            ring(self._settings.run_dir, "dispatcher")  # its webhook is due
        self._tell_gateway()

    async def _discard(self, request_id: str, outcome: Outcome) -> None:
        """Delete what an attempt stored that had lost its hold; not what is the recorded result."""
        row = await self._ledger.get(request_id)
        recorded = (row.outcome_json or "") if row else ""
        for key in outcome.blobs:
            if key not in recorded:
                await self._storage.delete(key)

    async def _take_back(self, request_id: str, token: str) -> None:
        """End an attempt that has no outcome: again at its old place in the queue, or for good after too many."""
        row = await self._ledger.get(request_id)
        if row is None or row.token != token:
            return
        self._metrics.lost(row.endpoint)
        limit = self._settings.max_attempts if row.retry else 1
        if row.attempt >= limit and not row.cancel_requested:
            await self._ledger.complete(request_id, token, GIVEN_UP)
            self._metrics.ended(row.endpoint, GIVEN_UP, time.time() - (row.started or row.created))
            log.error("request_given_up", request_id=request_id, attempts=row.attempt)
        else:
            line = f"The worker was lost in attempt {row.attempt} of {limit}; the request is queued again."
            await self._ledger.append_logs(request_id, token, [NewLog(time.time(), "WARN", line)])
            await self._ledger.requeue(request_id, token)
            log.warning("request_requeued", request_id=request_id, attempts=row.attempt)
        for suffix in OUTPUT_SUFFIXES.values():
            self._in_background(self._remove(request_id, output_key(request_id, token, suffix)))
        ring(self._settings.run_dir, "dispatcher")
        self._tell_gateway()

    async def _remove(self, request_id: str, key: str) -> None:
        """Delete what a lost attempt may have stored before it could say so."""
        try:
            await self._storage.delete(key)
        except Exception as error:
            log.warning("file_not_deleted", request_id=request_id, key=key, reason=str(error))

    async def _stop_cancelled(self) -> None:
        """Ask the runs of cancelled requests to stop, and end the slot of one that does not."""
        now = time.monotonic()
        for row in await self._ledger.cancels():
            run = self._runs.get(row.token or "")
            if run is None:
                continue
            if run.cancelled_at is None:
                run.cancelled_at = now
                await self._engine.cancel(run.slot_id, run.token)
            elif now - run.cancelled_at > self._settings.cancel_grace_s:
                log.warning("slot_killed", slot_id=run.slot_id, request_id=run.request_id, reason="did not stop")
                self._metrics.killed()
                await self._engine.kill(run.slot_id)

    async def _end_silent(self) -> None:
        """Kill what is frozen: slots without a heartbeat, and those whose run gives no sign. Their runs start again."""
        now = time.monotonic()
        silent = {
            # A slot that loads has nothing `hot` yet, and may be too busy with its files to answer.
            info.id: "no heartbeat"
            for info in self._engine.slots()
            if info.state is SlotState.DOWN and info.pid is not None and info.hot and self._is_lost(info)
        }
        for run in self._runs.values():
            if now - run.heard > self._settings.run_silence_s:
                silent.setdefault(run.slot_id, f"its run was silent for {now - run.heard:.0f} s")
        for slot_id, reason in silent.items():
            request_id = next((run.request_id for run in self._runs.values() if run.slot_id == slot_id), None)
            log.error("slot_killed", slot_id=slot_id, request_id=request_id, reason=reason)
            self._metrics.killed()
            await self._engine.kill(slot_id)

    async def _beat(self) -> None:
        """Write down what the slots are, when it changed and every few seconds: readiness is read from there."""
        due = time.monotonic() >= self._next_beat
        for info in self._engine.slots():
            if due or self._told.get(info.id) != info:
                self._told[info.id] = info
                await self._ledger.put_slot(_row_of(info))
        if due:
            self._next_beat = time.monotonic() + BEAT_S
            self._metrics.write(self._settings.run_dir / "dispatcher.prom")

    async def _sweep_in_time(self) -> None:
        """Sweep now and then, beside the loop: a store that is out of reach must not hold it up."""
        if time.monotonic() >= self._next_sweep:
            self._next_sweep = math.inf  # one at a time
            self._in_background(self._sweep())

    async def _sweep(self) -> None:
        """Forget what is past its retention, files included; what cannot be deleted is left to the next sweep."""
        try:
            deleted = []
            for key in await self._ledger.sweep(time.time()):
                try:
                    await self._storage.delete(key)
                    deleted.append(key)
                except Exception as error:
                    log.warning("file_not_deleted", key=key, reason=str(error))
            await self._ledger.deleted(deleted)
        except Exception:
            log.exception("sweep_failed")
        finally:
            self._next_sweep = time.monotonic() + SWEEP_S

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _tell_gateway(self) -> None:
        ring(self._settings.run_dir, "gateway")


@contextlib.contextmanager
def leadership(path: Path) -> Iterator[None]:
    """Hold the lock of the one dispatcher; waits until the process that has it is gone."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


async def serve_dispatcher(settings: Settings, slot_ids: list[str]) -> None:
    """The dispatcher's process: everything it needs, until the task is cancelled."""
    settings.make_folders()
    run_dir = settings.run_dir
    with (
        leadership(run_dir / "dispatcher.lock"),
        contextlib.closing(Ledger.open(settings)) as ledger,
        contextlib.closing(Bell(run_dir, "dispatcher")) as bell,
    ):
        engine = LocalEngine(run_dir, slot_ids, lambda: ring(run_dir, "dispatcher"))
        webhooks = WebhookSender(settings, ledger, await SigningKey.open(ledger))
        try:
            await Dispatcher(settings, ledger, engine, Storage.open(settings), webhooks, bell).serve()
        finally:
            await webhooks.close()
            await engine.close()
