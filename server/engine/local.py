"""Slots as processes on this machine, each listening on a Unix socket; messages are lines of JSON.

Both ends are here: `LocalEngine` in the dispatcher, `SlotListener` in the slot. A slot outlives the dispatcher: it
keeps the events of its run until somebody acknowledges the outcome, and shows its state to whoever connects.

    dispatcher to slot   {"op": "run", "token", "work"} | {"op": "attach", "token"}
                         {"op": "acknowledge", "token"} | {"op": "cancel", "token"}
                         {"op": "order", "token", "action", "pipeline"}
    slot to dispatcher   {"slot": {state, device, ...}}, at once and every two seconds | {"token", "event"}
                         {"token", "lost": true} to a run or attach that cannot be served
                         {"token", "answer": text} to an order
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import structlog

from server.engine import Emit, Event, SlotInfo, SlotLost, SlotState, Work
from server.ledger.states import NewLog, Outcome, SlotReport
from server.settings import Settings

MAX_LINE_BYTES = 64 * 1024 * 1024
RECONNECT_S = 0.05
BEAT_S = 2.0
SILENCE_S = 10.0

log = structlog.get_logger()


def socket_path(run_dir: Path, slot_id: str) -> Path:
    """Where a slot listens."""
    return run_dir / f"slot-{slot_id}.sock"


def scratch_of(settings: Settings, slot_id: str) -> Path:
    """Folder of a slot's unfinished files, which its successor empties; readable by this user only."""
    return settings.run_dir / f"slot-{slot_id}.tmp"


def preview_path(scratch: Path, token: str) -> Path:
    """Where the newest preview of a run is, while it runs."""
    return scratch / f"{token}.jpg"


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


async def _hang_up(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()


class _Link:
    """The dispatcher's connection to one slot, renewed for ever."""

    def __init__(self, run_dir: Path, slot_id: str, on_change: Callable[[], None]) -> None:
        self.info = SlotInfo(id=slot_id)
        self.heard = 0.0
        self._path = socket_path(run_dir, slot_id)
        self._on_change = on_change
        self._writer: asyncio.StreamWriter | None = None
        self._runs: dict[str, asyncio.Queue[Event | None]] = {}
        self._orders: dict[str, asyncio.Future[str]] = {}
        self.task = asyncio.create_task(self._keep())

    def send(self, message: dict[str, Any]) -> None:
        """Leave a message for the slot; does not wait until it is read, which a frozen slot never does."""
        if self._writer is None or self._writer.is_closing():
            raise SlotLost(f"slot {self.info.id} is not connected")
        self._writer.write(_line(message))

    def cut(self) -> None:
        """Drop the connection, so that whoever follows a run here learns that it is lost."""
        if self._writer is not None:
            self._writer.transport.abort()

    async def follow(self, token: str, opening: dict[str, Any]) -> AsyncIterator[list[Event]]:
        queue: asyncio.Queue[Event | None] = asyncio.Queue()
        self._runs[token] = queue
        try:
            self.send(opening)
            while True:
                batch = [await queue.get()]
                while not queue.empty():
                    batch.append(queue.get_nowait())
                events = [event for event in batch if event is not None]
                if events:
                    yield events
                if events and events[-1].outcome is not None:
                    return
                if len(events) < len(batch):
                    raise SlotLost(f"slot {self.info.id} lost the run")
        finally:
            del self._runs[token]

    async def order(self, token: str, message: dict[str, Any]) -> str:
        """Send an order and wait for the answer to it."""
        future = self._orders[token] = asyncio.get_running_loop().create_future()
        try:
            self.send(message)
            return await future
        finally:
            del self._orders[token]

    async def _keep(self) -> None:
        while True:
            try:
                reader, self._writer = await asyncio.open_unix_connection(str(self._path), limit=MAX_LINE_BYTES)
            except OSError:
                await asyncio.sleep(RECONNECT_S)
                continue
            try:
                await self._listen(reader)
            except Exception as error:
                log.warning("slot_connection_failed", slot_id=self.info.id, error=repr(error))
            finally:
                await self._down(self._writer)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        while line := await reader.readline():
            message = json.loads(line)
            self.heard = time.monotonic()
            try:
                self._take(message)
            except Exception:
                log.exception("slot_message_not_understood", slot_id=self.info.id)
                token = message.get("token") if isinstance(message, dict) else None
                if token in self._runs:
                    self._runs[token].put_nowait(None)  # its account would have a gap

    def _take(self, message: dict[str, Any]) -> None:
        if "slot" in message:
            info = message["slot"]
            parsed = {"state": SlotState(info["state"]), "hot": frozenset(info["hot"])}
            self._update(SlotInfo(**info | parsed | {"report": SlotReport.from_json(info["report"])}))
        elif "answer" in message:
            order = self._orders.get(message["token"])
            if order is not None and not order.done():
                order.set_result(message["answer"])
        elif (queue := self._runs.get(message["token"])) is not None:
            queue.put_nowait(None if message.get("lost") else Event.from_json(message["event"]))

    def _update(self, info: SlotInfo) -> None:
        changed = info != self.info
        self.info = info
        if changed:
            self._on_change()

    async def _down(self, writer: asyncio.StreamWriter) -> None:
        self._writer = None
        self._update(SlotInfo(id=self.info.id, detail="its process ended or is not reachable"))
        for queue in self._runs.values():
            queue.put_nowait(None)
        for order in self._orders.values():
            if not order.done():
                order.set_exception(SlotLost(f"slot {self.info.id} ended before it was done"))
        await _hang_up(writer)


class LocalEngine:
    """The slots of this machine, seen from the dispatcher."""

    def __init__(self, run_dir: Path, slot_ids: list[str], on_change: Callable[[], None]) -> None:
        """Connect to the slots in the background; `on_change` is called whenever one changes its state."""
        self._links = {slot_id: _Link(run_dir, slot_id, on_change) for slot_id in slot_ids}

    def slots(self) -> list[SlotInfo]:
        """All slots; one that was silent for ten seconds counts as down."""
        now = time.monotonic()
        return [
            link.info
            if now - link.heard < SILENCE_S
            else replace(link.info, state=SlotState.DOWN, detail=link.info.detail or "it does not answer")
            for link in self._links.values()
        ]

    def run(self, slot_id: str, work: Work) -> AsyncIterator[list[Event]]:
        """Start an attempt and follow it to its end."""
        opening = {"op": "run", "token": work.token, "work": work.to_json()}
        return self._links[slot_id].follow(work.token, opening)

    def attach(self, slot_id: str, token: str) -> AsyncIterator[list[Event]]:
        """Follow a run that goes on already, from its first event."""
        return self._links[slot_id].follow(token, {"op": "attach", "token": token})

    async def acknowledge(self, slot_id: str, token: str) -> None:
        """Free a slot whose outcome is recorded; harmless when it is gone."""
        await self._tell(slot_id, {"op": "acknowledge", "token": token})

    async def cancel(self, slot_id: str, token: str) -> None:
        """Ask a run to stop; harmless when it is gone."""
        await self._tell(slot_id, {"op": "cancel", "token": token})

    async def order(self, slot_id: str, order_id: str, action: str, pipeline: str) -> str:
        """Have a slot load or unload; see `Engine`."""
        message = {"op": "order", "token": order_id, "action": action, "pipeline": pipeline}
        return await self._links[slot_id].order(order_id, message)

    async def kill(self, slot_id: str) -> None:
        """End a slot that does not stop when asked; its run is lost at once, also if the system cannot end it."""
        link = self._links[slot_id]
        if link.info.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(link.info.pid, signal.SIGKILL)
        link.cut()

    async def close(self) -> None:
        """Let go of the slots."""
        for link in self._links.values():
            link.task.cancel()
        await asyncio.gather(*(link.task for link in self._links.values()), return_exceptions=True)

    async def _tell(self, slot_id: str, message: dict[str, Any]) -> None:
        with contextlib.suppress(SlotLost):
            self._links[slot_id].send(message)


class Host(Protocol):
    """What the listener drives: the object that owns the device."""

    device: str
    weights: str
    detail: str

    def load(self) -> None:
        """Load everything; raises if nothing of it can work."""

    def run(self, work: Work, emit: Emit, is_cancelled: Callable[[], bool]) -> Outcome:
        """Do one request; raises only when the device cannot be trusted any more, which ends the process."""

    def obey(self, action: str, pipeline: str) -> str:
        """Load or unload the models of a pipeline, or of all if it is empty; returns how it went, in words."""

    def report(self) -> SlotReport:
        """What is inside; asked for on another thread than everything else."""


class _Run:
    def __init__(self, work: Work) -> None:
        self.work = work
        self.events: list[Event] = []
        self.followers: set[asyncio.StreamWriter] = set()
        self.cancelled = False

    @property
    def is_finished(self) -> bool:
        return bool(self.events) and self.events[-1].outcome is not None


class SlotListener:
    """The slot's end: one worker thread for everything that touches the device, and this loop for the socket."""

    def __init__(self, run_dir: Path, slot_id: str, host: Host) -> None:
        self._path = socket_path(run_dir, slot_id)
        self._host = host
        self._info = SlotInfo(id=slot_id, state=SlotState.STARTING, pid=os.getpid())
        self._run: _Run | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="worker")
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Listen first, so that the loading is visible, then load, then work until the task is cancelled."""
        self._path.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(self._converse, str(self._path), limit=MAX_LINE_BYTES)
        async with server:
            beat = asyncio.create_task(self._beat())
            try:
                await asyncio.get_running_loop().run_in_executor(self._worker, self._host.load)
                self._become(SlotState.READY)
                log.info("slot_ready", slot_id=self._info.id, device=self._host.device, weights=self._host.weights)
                await beat
            finally:
                beat.cancel()
                self._path.unlink(missing_ok=True)
                await asyncio.gather(*(_hang_up(writer) for writer in self._writers))

    def _become(self, state: SlotState) -> None:
        self._info = replace(
            self._info,
            state=state,
            device=self._host.device,
            weights=self._host.weights,
            detail=self._host.detail,
            token=self._run.work.token if self._run else None,
        )
        self._tell(self._writers, self._introduction())

    def _introduction(self) -> dict[str, Any]:
        report = self._host.report()
        return {"slot": {**vars(self._info), "hot": report.serves, "report": report.to_json()}}

    def _tell(self, writers: set[asyncio.StreamWriter], message: dict[str, Any]) -> None:
        for writer in writers & self._writers:
            writer.write(_line(message))

    async def _beat(self) -> None:
        while True:
            self._tell(self._writers, self._introduction())
            await asyncio.sleep(BEAT_S)

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        writer.write(_line(self._introduction()))
        try:
            while line := await reader.readline():
                self._obey(json.loads(line), writer)
        except (OSError, ValueError) as error:
            log.warning("dispatcher_connection_failed", error=repr(error))
        finally:
            self._writers.discard(writer)
            await _hang_up(writer)

    def _obey(self, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        token, run = message["token"], self._run
        mine = run is not None and run.work.token == token
        match message["op"]:
            case "run" if self._info.state is SlotState.READY:
                self._begin(Work(**message["work"]), writer)
            case "attach" if run is not None and mine:
                for event in run.events:
                    writer.write(_line({"token": token, "event": event.to_json()}))
                run.followers.add(writer)
            case "run" | "attach":
                writer.write(_line({"token": token, "lost": True}))
            case "cancel" if run is not None and mine:
                run.cancelled = True
            case "order":
                self._in_background(self._follow_order(message, writer))
            case "acknowledge" if run is not None and mine and run.is_finished:
                self._run = None
                self._become(SlotState.READY)

    def _begin(self, work: Work, follower: asyncio.StreamWriter) -> None:
        self._run = _Run(work)
        self._run.followers.add(follower)
        self._become(SlotState.BUSY)
        self._in_background(self._work(self._run))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow_order(self, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """Have the worker load or unload, after what it is at."""
        loop = asyncio.get_running_loop()
        try:
            answer = await loop.run_in_executor(self._worker, self._host.obey, message["action"], message["pipeline"])
        except Exception:
            log.exception("slot_broken", slot_id=self._info.id, order_id=message["token"])
            os._exit(71)
        self._tell(self._writers, self._introduction())
        self._tell({writer}, {"token": message["token"], "answer": answer})

    async def _work(self, run: _Run) -> None:
        loop = asyncio.get_running_loop()

        def emit(line: NewLog) -> None:
            loop.call_soon_threadsafe(self._record, run, line, None)

        try:
            self._record(run, None, await loop.run_in_executor(self._worker, self._run_host, run, emit))
        except Exception:
            # The host answers for everything a request can cause; what is left means that the device or this process
            # cannot be trusted any more. A new process and another attempt can.
            log.exception("slot_broken", slot_id=self._info.id, request_id=run.work.request_id)
            os._exit(71)

    def _run_host(self, run: _Run, emit: Emit) -> Outcome:
        """On the worker's thread: every log line from here on carries the request's id."""
        with structlog.contextvars.bound_contextvars(request_id=run.work.request_id):
            return self._host.run(run.work, emit, lambda: run.cancelled)

    def _record(self, run: _Run, line: NewLog | None, outcome: Outcome | None) -> None:
        event = Event(seq=len(run.events) + 1, log=line, outcome=outcome)
        run.events.append(event)
        self._tell(run.followers, {"token": run.work.token, "event": event.to_json()})
