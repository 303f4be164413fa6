"""The two ends of a slot's socket: runs are followed, survive their follower, and are never mixed up."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from server.engine import Emit, Event, SlotInfo, SlotLost, SlotState, Work
from server.engine.local import LocalEngine, SlotListener, socket_path
from server.ledger.states import NewLog, Outcome, SlotReport


class StepwiseHost:
    """A host whose run logs two lines, waits to be let go, and says how it ended."""

    device, weights, detail = "cpu", "pocket", "a pretended device"

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.serves: tuple[str, ...] = ()

    def load(self) -> None:
        self.serves = ("echo",)

    def obey(self, action: str, pipeline: str) -> str:
        return f"{action} {pipeline}: done"

    def report(self) -> SlotReport:
        return SlotReport(serves=self.serves, memory={"free": 1})

    def run(self, work: Work, emit: Emit, is_cancelled: Callable[[], bool]) -> Outcome:
        for step in (1, 2):
            emit(NewLog(float(step), "INFO", f"denoise {step}/2"))
        while not self.go_on.wait(0.01):
            if is_cancelled():
                return Outcome(status=499, body={}, error="cancelled", error_type="client_cancelled")
        return Outcome(status=200, body={"echo": work.job})


Story = Callable[[LocalEngine, StepwiseHost], Awaitable[None]]


async def until_state(engine: LocalEngine, state: SlotState) -> SlotInfo:
    for _ in range(2000):
        (info,) = engine.slots()
        if info.state is state:
            return info
        await asyncio.sleep(0.01)
    raise AssertionError(f"still {info.state}, expected {state}")


async def collect(batches: AsyncIterator[list[Event]]) -> list[Event]:
    return [event async for batch in batches for event in batch]


def play(run_dir: Path, story: Story) -> None:
    """Run a story against one slot and one engine, both in this process."""

    async def scene() -> None:
        host = StepwiseHost()
        listening = asyncio.create_task(SlotListener(run_dir, "0", host).serve())
        engine = LocalEngine(run_dir, ["0"], lambda: None)
        try:
            await asyncio.wait_for(story(engine, host), 10.0)
        finally:
            host.go_on.set()
            await engine.close()
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    asyncio.run(scene())


WORK = Work(request_id="r", endpoint="e", token="t", job={"pipeline": "echo"})


def test_a_run_reports_its_lines_and_its_outcome(tmp_path: Path) -> None:
    """Whoever starts a run sees every event once, numbered, the outcome last."""

    async def story(engine: LocalEngine, host: StepwiseHost) -> None:
        info = await until_state(engine, SlotState.READY)
        assert (info.hot, info.device, info.weights) == (frozenset({"echo"}), "cpu", "pocket")
        host.go_on.set()

        events = await collect(engine.run("0", WORK))

        assert [event.seq for event in events] == [1, 2, 3]
        assert [event.log.message for event in events if event.log] == ["denoise 1/2", "denoise 2/2"]
        assert events[-1].outcome == Outcome(status=200, body={"echo": {"pipeline": "echo"}})

    play(tmp_path, story)


def test_a_slot_stays_busy_until_its_outcome_is_acknowledged(tmp_path: Path) -> None:
    """An outcome nobody recorded is not thrown away for the next run."""

    async def story(engine: LocalEngine, host: StepwiseHost) -> None:
        await until_state(engine, SlotState.READY)
        host.go_on.set()
        await collect(engine.run("0", WORK))
        assert (await until_state(engine, SlotState.BUSY)).token == "t"

        await engine.acknowledge("0", "another token")
        await asyncio.sleep(0.05)
        assert (await until_state(engine, SlotState.BUSY)).token == "t"
        await engine.acknowledge("0", "t")

        assert (await until_state(engine, SlotState.READY)).token is None

    play(tmp_path, story)


def test_a_new_dispatcher_attaches_to_what_runs(tmp_path: Path) -> None:
    """A run outlives the engine that started it; the next engine sees all of its events, each once."""

    async def story(engine: LocalEngine, host: StepwiseHost) -> None:
        await until_state(engine, SlotState.READY)
        started = engine.run("0", WORK)
        await anext(started)
        await engine.close()

        successor = LocalEngine(tmp_path, ["0"], lambda: None)
        assert (await until_state(successor, SlotState.BUSY)).token == "t"
        following = asyncio.create_task(collect(successor.attach("0", "t")))
        await asyncio.sleep(0.05)
        host.go_on.set()
        events = await following
        await successor.close()

        assert [event.seq for event in events] == [1, 2, 3]
        assert events[-1].outcome is not None

    play(tmp_path, story)


def test_a_cancelled_run_ends(tmp_path: Path) -> None:
    """The flag reaches the run while it computes."""

    async def story(engine: LocalEngine, host: StepwiseHost) -> None:
        await until_state(engine, SlotState.READY)
        running = asyncio.create_task(collect(engine.run("0", WORK)))
        await until_state(engine, SlotState.BUSY)

        await engine.cancel("0", "t")

        outcome = (await running)[-1].outcome
        assert outcome is not None and outcome.error_type == "client_cancelled"

    play(tmp_path, story)


def test_a_busy_slot_refuses_a_second_run(tmp_path: Path) -> None:
    """Two runs never share a device, whatever a confused dispatcher asks."""

    async def story(engine: LocalEngine, host: StepwiseHost) -> None:
        await until_state(engine, SlotState.READY)
        first = engine.run("0", WORK)
        await anext(first)

        lost = False
        try:
            await collect(engine.run("0", Work(request_id="s", endpoint="e", token="u", job={})))
        except SlotLost:
            lost = True

        assert lost

    play(tmp_path, story)


def test_an_unknown_token_cannot_be_attached_to(tmp_path: Path) -> None:
    """A slot that restarted says that it knows nothing of the run."""

    async def story(engine: LocalEngine, host: StepwiseHost) -> None:
        await until_state(engine, SlotState.READY)

        lost = False
        try:
            await collect(engine.attach("0", "forgotten"))
        except SlotLost:
            lost = True

        assert lost

    play(tmp_path, story)


def test_a_dead_slot_ends_the_following(tmp_path: Path) -> None:
    """When the slot's process goes away its follower learns it at once and the slot counts as down."""

    async def scene() -> None:
        host = StepwiseHost()
        listening = asyncio.create_task(SlotListener(tmp_path, "0", host).serve())
        engine = LocalEngine(tmp_path, ["0"], lambda: None)
        await until_state(engine, SlotState.READY)
        running = asyncio.create_task(collect(engine.run("0", WORK)))
        await until_state(engine, SlotState.BUSY)

        listening.cancel()
        (result,) = await asyncio.gather(running, return_exceptions=True)

        assert isinstance(result, SlotLost)
        assert engine.slots()[0].state is SlotState.DOWN
        host.go_on.set()
        await engine.close()

    asyncio.run(scene())


def message(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def test_a_message_that_is_not_understood_costs_its_run_only(tmp_path: Path) -> None:
    """The connection outlives any message; a run that misses an event of its own is lost rather than without end."""

    async def scene() -> None:
        facts = {**vars(SlotInfo(id="0", state=SlotState.READY)), "hot": [], "report": {}}

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b'{"slot": {"unheard": "of"}}\n' + b"[]\n{}\n" + message(slot=facts))
            await reader.readline()
            writer.write(message(token="t", event={"seq": 1}) + message(slot=facts | {"detail": "still here"}))
            await reader.read()
            writer.close()

        async with await asyncio.start_unix_server(talk, str(socket_path(tmp_path, "0"))):
            engine = LocalEngine(tmp_path, ["0"], lambda: None)
            await until_state(engine, SlotState.READY)

            (result,) = await asyncio.gather(collect(engine.run("0", WORK)), return_exceptions=True)

            assert isinstance(result, SlotLost)
            await asyncio.sleep(0.05)
            assert (await until_state(engine, SlotState.READY)).detail == "still here"
            await engine.close()

    asyncio.run(asyncio.wait_for(scene(), 10.0))


FROZEN = """
import asyncio, sys, time
from pathlib import Path
from server.engine.local import SlotListener
from server.ledger.states import SlotReport
class Host:
    device = weights = detail = ""
    def load(self): pass
    def report(self): return SlotReport(serves=("echo",))
    def run(self, work, emit, is_cancelled): time.sleep(300)
asyncio.run(SlotListener(Path(sys.argv[1]), "0", Host()).serve())
"""


def test_a_frozen_slot_holds_nobody_up_and_can_be_killed(tmp_path: Path) -> None:
    """Telling a stopped process any amount never waits; killing it ends the following of its run."""

    async def scene() -> None:
        process = subprocess.Popen([sys.executable, "-c", FROZEN, str(tmp_path)])
        engine = LocalEngine(tmp_path, ["0"], lambda: None)
        await until_state(engine, SlotState.READY)
        following = asyncio.create_task(collect(engine.run("0", WORK)))
        await until_state(engine, SlotState.BUSY)
        process.send_signal(signal.SIGSTOP)

        for _ in range(1000):
            await engine.cancel("0", "x" * 1000)
        await engine.kill("0")
        (result,) = await asyncio.gather(following, return_exceptions=True)

        assert isinstance(result, SlotLost)
        assert process.wait() == -signal.SIGKILL
        await engine.close()

    asyncio.run(asyncio.wait_for(scene(), 30.0))


def test_an_order_is_done_after_the_run_and_answered(tmp_path: Path) -> None:
    """What the operator wants of a busy slot waits for its run, and its answer comes back."""

    async def story(engine: LocalEngine, host: StepwiseHost) -> None:
        await until_state(engine, SlotState.READY)
        running = asyncio.create_task(collect(engine.run("0", WORK)))
        await until_state(engine, SlotState.BUSY)
        ordering = asyncio.create_task(engine.order("0", "o", "unload", "echo"))
        await asyncio.sleep(0.05)
        was_done_before = ordering.done()
        host.go_on.set()

        assert await ordering == "unload echo: done"
        assert not was_done_before and (await running)[-1].outcome is not None

    play(tmp_path, story)


def test_an_order_to_a_slot_that_is_gone_is_lost(tmp_path: Path) -> None:
    """Nobody waits for the answer of a slot that is not there, or goes."""

    async def scene() -> None:
        async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(message(slot={**vars(SlotInfo(id="0", state=SlotState.READY)), "hot": [], "report": {}}))
            await reader.readline()
            writer.close()

        engine = LocalEngine(tmp_path, ["0"], lambda: None)
        with pytest.raises(SlotLost):
            await engine.order("0", "o", "preload", "echo")
        async with await asyncio.start_unix_server(hang_up, str(socket_path(tmp_path, "0"))):
            await until_state(engine, SlotState.READY)
            with pytest.raises(SlotLost):
                await engine.order("0", "o", "preload", "echo")
            await engine.close()

    asyncio.run(asyncio.wait_for(scene(), 10.0))
