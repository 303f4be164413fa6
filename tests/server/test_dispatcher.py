"""The dispatcher brings every request to exactly one end, whatever becomes of slots and of itself."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from server import dispatcher as dispatcher_module
from server.dispatcher import Dispatcher, leadership
from server.engine import Event, SlotInfo, SlotLost, SlotState, Work
from server.engine import local as local_module
from server.ledger import Blob, Ledger, Mode, NewLog, NewRequest, Order, Outcome, SlotRow
from server.settings import Settings
from server.storage import Storage, output_key
from server.wakeup import Bell
from server.webhooks import SigningKey, WebhookSender

DONE = Outcome(status=200, body={"seed": 1}, inference_s=0.5, blobs=("out/a.png",))
READY = SlotInfo(id="0", state=SlotState.READY, device="cpu", weights="pocket", hot=frozenset({"p"}))


@dataclass
class FakeEngine:
    """Slots in memory; the test plays what happens on them."""

    infos: dict[str, SlotInfo] = field(default_factory=lambda: {"0": READY})
    works: list[Work] = field(default_factory=list)
    queues: dict[str, asyncio.Queue[Event | None]] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    killed: list[str] = field(default_factory=list)
    ordered: list[tuple[str, str, str]] = field(default_factory=list)
    let_order_end: asyncio.Event = field(default_factory=asyncio.Event)
    past: list[Event] = field(default_factory=list)

    def slots(self) -> list[SlotInfo]:
        return list(self.infos.values())

    def run(self, slot_id: str, work: Work) -> AsyncIterator[list[Event]]:
        self.works.append(work)
        self.infos[slot_id] = replace(self.infos[slot_id], state=SlotState.BUSY, token=work.token)
        return self._follow(work.token)

    def attach(self, slot_id: str, token: str) -> AsyncIterator[list[Event]]:
        return self._follow(token)

    async def _follow(self, token: str) -> AsyncIterator[list[Event]]:
        queue = self.queues.setdefault(token, asyncio.Queue())
        for event in self.past:
            yield [event]
        while (event := await queue.get()) is not None:
            self.past.append(event)
            yield [event]
            if event.outcome:
                return
        raise SlotLost("it died")

    async def say(self, token: str, *events: Event | None) -> None:
        for event in events:
            self.queues.setdefault(token, asyncio.Queue()).put_nowait(event)
        await asyncio.sleep(0.1)

    async def acknowledge(self, slot_id: str, token: str) -> None:
        if self.infos[slot_id].token == token:
            self.infos[slot_id] = replace(self.infos[slot_id], state=SlotState.READY, token=None)
            self.past.clear()

    async def cancel(self, slot_id: str, token: str) -> None:
        self.cancelled.append(token)

    async def kill(self, slot_id: str) -> None:
        self.killed.append(slot_id)

    async def order(self, slot_id: str, order_id: str, action: str, pipeline: str) -> str:
        if slot_id not in self.infos:
            raise SlotLost("it died")
        self.ordered.append((slot_id, action, pipeline))
        await self.let_order_end.wait()
        return "done"

    async def close(self) -> None:
        """Nothing to let go of."""


@dataclass
class Scene:
    """What a story has at hand; `successor` is a dispatcher that knows nothing yet."""

    settings: Settings
    ledger: Ledger
    engine: FakeEngine
    dispatcher: Dispatcher
    successor: Callable[[], Dispatcher]

    async def submit(self, request_id: str = "r", **fields: object) -> None:
        job = {"pipeline": "p", "params": {}, "image": "u", "warnings": []}
        await self.ledger.submit(NewRequest(id=request_id, endpoint="e", job=job, **fields))  # type: ignore[arg-type]

    async def state(self, request_id: str = "r") -> tuple[str, int | None, str | None]:
        row = await self.ledger.get(request_id)
        assert row is not None
        return row.state, row.outcome_status, row.error_type

    async def lines(self, request_id: str = "r") -> list[str]:
        return [line.message for line in await self.ledger.logs(request_id)]


Story = Callable[[Scene], Awaitable[None]]
Play = Callable[..., None]


@pytest.fixture
def play(settings: Settings, ledger: Ledger) -> Play:
    """Run a story with a dispatcher on a real ledger and a fake engine."""

    def run(story: Story, **knobs: object) -> None:
        async def scene() -> None:
            chosen = settings.model_copy(update=knobs)
            engine = FakeEngine()
            webhooks = WebhookSender(chosen, ledger, await SigningKey.open(ledger))
            with closing(Bell(chosen.run_dir, "dispatcher")) as bell:

                def dispatcher() -> Dispatcher:
                    return Dispatcher(chosen, ledger, engine, Storage.open(chosen), webhooks, bell)

                await story(Scene(chosen, ledger, engine, dispatcher(), dispatcher))
                await webhooks.close()
                for task in asyncio.all_tasks() - {asyncio.current_task()}:
                    task.cancel()

        asyncio.run(scene())

    return run


def said(seq: int, message: str) -> Event:
    return Event(seq=seq, log=NewLog(float(seq), "INFO", message))


def test_a_request_runs_and_its_answer_is_recorded(play: Play) -> None:
    """Claimed, followed, completed with its log, and the slot is free again."""

    async def story(scene: Scene) -> None:
        await scene.submit()
        await scene.dispatcher.step()
        assert await scene.state() == ("IN_PROGRESS", None, None)
        (work,) = scene.engine.works

        await scene.engine.say(work.token, said(1, "denoise 1/2"), said(2, "denoise 2/2"), Event(seq=3, outcome=DONE))

        assert await scene.state() == ("COMPLETED", 200, None)
        assert await scene.lines() == ["denoise 1/2", "denoise 2/2"]
        assert scene.engine.infos["0"].state is SlotState.READY

    play(story)


def test_a_free_slot_takes_one_request(play: Play) -> None:
    """The second request waits until the first one is recorded."""

    async def story(scene: Scene) -> None:
        await scene.submit("first")
        await scene.submit("second")
        await scene.dispatcher.step()
        await scene.dispatcher.step()
        assert [work.request_id for work in scene.engine.works] == ["first"]

        await scene.engine.say(scene.engine.works[0].token, Event(seq=1, outcome=DONE))
        await scene.dispatcher.step()

        assert [work.request_id for work in scene.engine.works] == ["first", "second"]

    play(story)


def test_a_slot_hears_which_models_are_waited_for(play: Play) -> None:
    """With each attempt go the kinds of requests that are queued, so that their models stay."""

    async def story(scene: Scene) -> None:
        await scene.submit("first")
        await scene.submit("second")
        await scene.dispatcher.step()

        assert scene.engine.works[0].queued == ("p",)

    play(story)


def test_a_request_whose_slot_died_runs_again(play: Play) -> None:
    """The request goes back to its place, its log says so, and another attempt ends it."""

    async def story(scene: Scene) -> None:
        await scene.submit()
        await scene.dispatcher.step()
        await scene.engine.say(scene.engine.works[0].token, said(1, "denoise 1/2"), None)
        assert (await scene.state())[0] == "IN_QUEUE"
        scene.engine.infos["0"], _ = READY, scene.engine.past.clear()

        await scene.dispatcher.step()
        await scene.engine.say(scene.engine.works[1].token, said(1, "denoise 1/2"), Event(seq=2, outcome=DONE))

        assert await scene.state() == ("COMPLETED", 200, None)
        assert "The worker was lost in attempt 1 of 3" in (await scene.lines())[1]
        assert len(await scene.lines()) == 3

    play(story)


@pytest.mark.parametrize(("retry", "attempts"), [(True, 3), (False, 1)])
def test_a_request_that_kills_its_slots_is_given_up(play: Play, retry: bool, attempts: int) -> None:
    """After the last attempt the request ends in fal's words, with a status that clients do not repeat."""

    async def story(scene: Scene) -> None:
        await scene.submit(retry=retry)
        for n in range(attempts):
            scene.engine.infos["0"] = READY
            await scene.dispatcher.step()
            await scene.engine.say(scene.engine.works[n].token, None)

        assert await scene.state() == ("COMPLETED", 500, "runner_disconnected")
        await scene.dispatcher.step()
        assert len(scene.engine.works) == attempts

    play(story)


def test_a_new_dispatcher_follows_what_runs(play: Play) -> None:
    """The successor reads the run from its first event and writes down only what is new."""

    async def story(scene: Scene) -> None:
        await scene.submit()
        await scene.dispatcher.step()
        token = scene.engine.works[0].token
        await scene.engine.say(token, said(1, "denoise 1/2"))
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0.05)

        await scene.successor().step()
        await scene.engine.say(token, said(2, "denoise 2/2"), Event(seq=3, outcome=DONE))

        assert await scene.state() == ("COMPLETED", 200, None)
        assert await scene.lines() == ["denoise 1/2", "denoise 2/2"]
        assert len(scene.engine.works) == 1

    play(story)


@pytest.mark.parametrize("slot", [READY, None])
def test_a_new_dispatcher_takes_back_what_nobody_runs(play: Play, slot: SlotInfo | None) -> None:
    """A run whose slot was restarted, or is not part of the fleet any more, starts again."""

    async def story(scene: Scene) -> None:
        await scene.submit()
        await scene.ledger.claim("r", "gone" if slot is None else "0", "old token")

        await scene.successor().step()

        assert [work.request_id for work in scene.engine.works] == ["r"]
        assert scene.engine.works[0].token != "old token"

    play(story)


def test_a_slot_that_is_down_for_a_moment_keeps_its_run(play: Play) -> None:
    """A dispatcher that starts before its connections are up does not tear a run away from a live slot."""

    async def story(scene: Scene) -> None:
        await scene.submit()
        await scene.ledger.claim("r", "0", "token")
        scene.engine.infos["0"] = SlotInfo(id="0", state=SlotState.DOWN)
        dispatcher = scene.successor()
        await dispatcher.step()
        assert (await scene.state())[0] == "IN_PROGRESS"

        scene.engine.infos["0"] = replace(READY, state=SlotState.BUSY, token="token")
        await dispatcher.step()
        await scene.engine.say("token", Event(seq=1, outcome=DONE))

        assert await scene.state() == ("COMPLETED", 200, None)

    play(story)


def test_an_outcome_that_was_recorded_before_frees_its_slot(play: Play) -> None:
    """A dispatcher that died between recording and acknowledging leaves a busy slot to its successor."""

    async def story(scene: Scene) -> None:
        scene.engine.infos["0"] = replace(READY, state=SlotState.BUSY, token="recorded already")

        await scene.successor().step()

        assert scene.engine.infos["0"].state is SlotState.READY

    play(story)


def test_the_picture_of_an_attempt_that_lost_its_hold_is_deleted(play: Play) -> None:
    """An attempt that was given up still ends somewhere; its file does not stay, the recorded one does."""

    async def story(scene: Scene) -> None:
        storage = Storage.open(scene.settings)
        for name in ("late", "good"):
            await storage.put_bytes(f"out/{name}.png", b"picture")
        await scene.submit()
        await scene.dispatcher.step()
        late = scene.engine.works[0].token
        await scene.ledger.requeue("r", late)
        await scene.ledger.claim("r", "1", "other")
        await scene.ledger.complete("r", "other", replace(DONE, body={"url": "blob:out/good.png"}))

        await scene.engine.say(late, Event(seq=1, outcome=replace(DONE, blobs=("out/late.png", "out/good.png"))))

        assert await storage.head("out/late.png") is None
        assert await storage.head("out/good.png") is not None

    play(story)


def test_the_picture_of_an_attempt_that_died_unheard_is_deleted(play: Play) -> None:
    """A slot that is lost between storing its picture and saying so leaves no file behind."""

    async def story(scene: Scene) -> None:
        storage = Storage.open(scene.settings)
        await scene.submit()
        await scene.dispatcher.step()
        token = scene.engine.works[0].token
        await storage.put_bytes(output_key("r", token), b"picture")

        await scene.engine.say(token, None)

        assert await scene.state() == ("IN_QUEUE", None, None)
        assert await storage.head(output_key("r", token)) is None

    play(story)


@pytest.mark.parametrize("is_done_in_time", [True, False])
def test_a_server_that_stops_waits_for_what_runs(play: Play, is_done_in_time: bool) -> None:
    """Nothing new starts, readiness ends at once, what runs may end; what does not is queued again and not counted."""

    async def story(scene: Scene) -> None:
        serving = asyncio.create_task(scene.dispatcher.serve())
        await scene.submit()
        await until(lambda: bool(scene.engine.works))
        await scene.submit("later")
        token = scene.engine.works[0].token

        serving.cancel()
        await asyncio.sleep(0.2)
        rows = await scene.ledger.slots()
        if is_done_in_time:
            await scene.engine.say(token, Event(seq=1, outcome=DONE))
        await asyncio.gather(serving, return_exceptions=True)

        assert [(row.state, row.detail) for row in rows] == [("down", "the server is stopping")]
        assert len(scene.engine.works) == 1 and await scene.state("later") == ("IN_QUEUE", None, None)
        row = await scene.ledger.get("r")
        assert row is not None
        if is_done_in_time:
            assert await scene.state() == ("COMPLETED", 200, None)
        else:
            assert (row.state, row.attempt, row.token) == ("IN_QUEUE", 0, None)
            assert "queued again" in (await scene.lines())[-1]

    play(story, drain_s=30.0 if is_done_in_time else 1.0)


async def until(condition: Callable[[], bool]) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def test_cancelling_asks_the_slot_first_and_kills_it_late(play: Play) -> None:
    """A run that does not stop within its grace costs the slot; the request ends as cancelled, not queued again."""

    async def story(scene: Scene) -> None:
        await scene.submit()
        await scene.dispatcher.step()
        token = scene.engine.works[0].token
        await scene.ledger.request_cancel("r")
        await scene.dispatcher.step()
        assert (scene.engine.cancelled, scene.engine.killed) == ([token], [])

        await asyncio.sleep(0.06)
        await scene.dispatcher.step()
        assert scene.engine.killed == ["0"]
        await scene.engine.say(token, None)

        assert await scene.state() == ("COMPLETED", 499, "client_cancelled")

    play(story, cancel_grace_s=0.05)


FROZEN = replace(READY, state=SlotState.DOWN, pid=4711)


@pytest.mark.parametrize(
    ("slot", "is_killed"),
    [
        (FROZEN, True),
        (replace(FROZEN, hot=frozenset()), False),
        (replace(FROZEN, pid=None), False),
        (replace(FROZEN, state=SlotState.READY), False),
    ],
    ids=["frozen", "loading", "gone", "up"],
)
def test_a_slot_without_heartbeat_is_killed(
    play: Play, monkeypatch: pytest.MonkeyPatch, slot: SlotInfo, is_killed: bool
) -> None:
    """What is there and has not answered for long is ended; not what still loads, and never at once."""
    monkeypatch.setattr(dispatcher_module, "LOST_S", 0.4)

    async def story(scene: Scene) -> None:
        scene.engine.infos["0"] = slot
        await scene.dispatcher.step()
        assert scene.engine.killed == []
        await asyncio.sleep(0.45)

        await scene.dispatcher.step()

        assert scene.engine.killed == (["0"] if is_killed else [])

    play(story)


def test_a_slot_that_came_back_has_its_full_time_again(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds without heartbeat count only while they follow each other."""
    monkeypatch.setattr(dispatcher_module, "LOST_S", 1.0)

    async def story(scene: Scene) -> None:
        for info in (FROZEN, READY, FROZEN):
            scene.engine.infos["0"] = info
            await scene.dispatcher.step()
            await asyncio.sleep(0.55)

        await scene.dispatcher.step()

        assert scene.engine.killed == []

    play(story)


def test_a_run_that_gives_no_sign_costs_its_slot(play: Play) -> None:
    """A stuck call in a slot that still beats does not hold its request for ever; each event gives it more time."""

    async def story(scene: Scene) -> None:
        await scene.submit()
        await scene.dispatcher.step()
        token = scene.engine.works[0].token
        await asyncio.sleep(0.6)
        await scene.engine.say(token, said(1, "denoise 1/2"))
        await asyncio.sleep(0.4)
        await scene.dispatcher.step()
        assert scene.engine.killed == []
        await asyncio.sleep(0.6)

        await scene.dispatcher.step()
        assert scene.engine.killed == ["0"]
        await scene.engine.say(token, None)

        assert (await scene.state())[0] == "IN_QUEUE"

    play(story, run_silence_s=1.0)


FREEZING = """
import asyncio, sys, time
from pathlib import Path
from server.engine.local import SlotListener
from server.ledger.states import SlotReport
class Host:
    device = weights = detail = ""
    def load(self): pass
    def report(self): return SlotReport(serves=("p",))
    def run(self, work, emit, is_cancelled): time.sleep(300)
asyncio.run(SlotListener(Path(sys.argv[1]), "0", Host()).serve())
"""


def test_the_request_of_a_frozen_process_is_queued_again(
    settings: Settings, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP in the middle of a run: the dispatcher ends the process and gives the request to the next one."""
    monkeypatch.setattr(dispatcher_module, "LOST_S", 0.2)
    monkeypatch.setattr(local_module, "SILENCE_S", 5.0)

    async def until(state: str, dispatcher: Dispatcher) -> None:
        row = await ledger.get("r")
        while row is None or row.state != state:
            await dispatcher.step()
            await asyncio.sleep(0.05)
            row = await ledger.get("r")

    async def scene(process: subprocess.Popen[bytes]) -> None:
        engine = local_module.LocalEngine(settings.run_dir, ["0"], lambda: None)
        webhooks = WebhookSender(settings, ledger, await SigningKey.open(ledger))
        with closing(Bell(settings.run_dir, "dispatcher")) as bell:
            dispatcher = Dispatcher(settings, ledger, engine, Storage.open(settings), webhooks, bell)
            await ledger.submit(NewRequest(id="r", endpoint="e", job={"pipeline": "p"}))
            await until("IN_PROGRESS", dispatcher)
            process.send_signal(signal.SIGSTOP)

            await until("IN_QUEUE", dispatcher)

            await webhooks.close()
        await engine.close()

    with subprocess.Popen([sys.executable, "-c", FREEZING, str(settings.run_dir)]) as process:
        asyncio.run(asyncio.wait_for(scene(process), 60.0))
        assert process.wait() == -signal.SIGKILL


def test_a_part_that_fails_does_not_stop_the_others(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """With webhooks, sweep and deadlines broken, requests still start, cancels arrive and slots are written down."""

    async def fail(*_: object) -> None:
        raise RuntimeError("nobody thought of this")

    async def story(scene: Scene) -> None:
        await scene.submit()
        monkeypatch.setattr(scene.ledger, "expire_start", fail)
        monkeypatch.setattr(WebhookSender, "send_due", fail)
        monkeypatch.setattr(scene.ledger, "sweep", fail)
        await scene.dispatcher.step()
        token = scene.engine.works[0].token
        await scene.ledger.request_cancel("r")

        await scene.dispatcher.step()

        assert scene.engine.cancelled == [token]
        assert await scene.ledger.is_ready()

    play(story)


def test_a_request_that_waited_too_long_ends(play: Play) -> None:
    """A start deadline that passed in the queue ends the request; nothing runs."""

    async def story(scene: Scene) -> None:
        await scene.submit(start_deadline=time.time() - 1.0)

        await scene.dispatcher.step()

        assert await scene.state() == ("COMPLETED", 504, "request_timeout")
        assert scene.engine.works == []

    play(story)


def test_slots_are_written_down_for_readiness(play: Play) -> None:
    """What the gateway reads about slots is what the engine knows, at once when it changes."""

    async def story(scene: Scene) -> None:
        await scene.dispatcher.step()
        assert await scene.ledger.is_ready()

        scene.engine.infos["0"] = SlotInfo(id="0", state=SlotState.DOWN)
        await scene.dispatcher.step()

        assert not await scene.ledger.is_ready()

    play(story)


def test_a_dispatcher_starts_without_slots(play: Play) -> None:
    """What an earlier server wrote down about its slots, also those of a larger fleet, makes nobody ready."""

    async def story(scene: Scene) -> None:
        await scene.ledger.put_slot(SlotRow("7", "ready", "cpu", "pocket", "of old", time.time()))
        scene.engine.infos.clear()

        serving = asyncio.create_task(scene.dispatcher.serve())
        deadline = time.monotonic() + 5.0
        while (await scene.ledger.slots())[0].state != "down" and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        serving.cancel()

        assert not await scene.ledger.is_ready()

    play(story)


def test_what_is_past_its_retention_is_forgotten_with_its_files(play: Play, settings: Settings) -> None:
    """The sweep removes the request and the picture that only it held."""

    async def story(scene: Scene) -> None:
        storage = Storage.open(scene.settings)
        await storage.put_bytes("out/a.png", b"picture")
        scene.ledger._retention_s = 0.0
        await scene.submit()
        await scene.dispatcher.step()
        await scene.engine.say(scene.engine.works[0].token, Event(seq=1, outcome=DONE))

        await sweep(scene.successor())

        assert await scene.ledger.get("r") is None
        assert await storage.head("out/a.png") is None

    play(story)


def test_a_file_that_cannot_be_deleted_is_left_to_the_next_sweep(play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no other file with it, and it is not forgotten."""

    async def story(scene: Scene) -> None:
        storage, delete = Storage.open(scene.settings), Storage.delete
        for key in ("up/a", "up/b", "up/c"):
            await storage.put_bytes(key, b"file")
            await scene.ledger.hold_blob(Blob(key, "upload", 1.0))

        async def delete_badly(self: Storage, key: str) -> None:
            if key == "up/b":
                raise PermissionError(key)
            await delete(self, key)

        with monkeypatch.context() as patch:
            patch.setattr(Storage, "delete", delete_badly)
            await sweep(scene.dispatcher)
        left = [key for key in ("up/a", "up/b", "up/c") if await storage.head(key)]
        await sweep(scene.successor())

        assert left == ["up/b"] and await storage.head("up/b") is None
        assert await scene.ledger.sweep(2.0) == []

    play(story)


async def sweep(dispatcher: Dispatcher) -> None:
    """One round and the sweep that it begins."""
    await dispatcher.step()
    await asyncio.gather(*dispatcher._tasks)


def test_there_is_one_leader(tmp_path: Path) -> None:
    """A second dispatcher waits until the first one is gone."""
    path = tmp_path / "lock"
    order: list[str] = []

    def second() -> None:
        with leadership(path):
            order.append("second")

    async def scene() -> None:
        with leadership(path):
            waiting = asyncio.create_task(asyncio.to_thread(second))
            await asyncio.sleep(0.1)
            order.append("first")
        await waiting

    asyncio.run(scene())

    assert order == ["first", "second"]


def test_a_paused_server_starts_nothing_until_it_is_resumed(play: Play) -> None:
    """What waits keeps its place; a new dispatcher pauses as well."""

    async def story(scene: Scene) -> None:
        await scene.ledger.set_mode(Mode.PAUSED)
        await scene.submit()
        await scene.dispatcher.step()
        await scene.successor().step()
        paused = await scene.state()

        await scene.ledger.set_mode(Mode.RUNNING)
        await scene.dispatcher.step()

        assert paused == ("IN_QUEUE", None, None)
        assert (await scene.state())[0] == "IN_PROGRESS"

    play(story)


def test_a_draining_server_does_what_it_has(play: Play) -> None:
    """What waits is started."""

    async def story(scene: Scene) -> None:
        await scene.submit()
        await scene.ledger.set_mode(Mode.DRAINING)

        await scene.dispatcher.step()

        assert (await scene.state())[0] == "IN_PROGRESS"

    play(story)


def test_orders_go_to_slots_and_their_answers_to_the_ledger(play: Play) -> None:
    """Each slot is asked once; while it loads it gets no request; slots that are not there are said to be so."""

    async def story(scene: Scene) -> None:
        everywhere = Order("o", "preload", "p", "", time.time())
        await scene.ledger.add_order(everywhere)
        await scene.ledger.add_order(Order("lost", "unload", "", "9", time.time()))
        await scene.submit()
        for _ in range(2):
            await scene.dispatcher.step()
            await asyncio.sleep(0.05)
        while_loading = await scene.state()
        scene.engine.let_order_end.set()
        while (found := await scene.ledger.order("o")) is None or found.answers is None:
            await asyncio.sleep(0.01)
        await scene.dispatcher.step()

        lost = await scene.ledger.order("lost")
        assert scene.engine.ordered == [("0", "preload", "p")]
        assert found.answers == {"0": "done"}
        assert lost is not None and lost.answers == {"9": "failed: it died"}
        assert while_loading[0] == "IN_QUEUE" and (await scene.state())[0] == "IN_PROGRESS"
        assert await scene.ledger.open_orders() == []

    play(story)


def test_an_order_outlives_its_dispatcher(play: Play) -> None:
    """The next one gives it again: loading what is loaded does no harm."""

    async def story(scene: Scene) -> None:
        await scene.ledger.add_order(Order("o", "preload", "p", "", time.time()))
        await scene.dispatcher.step()
        await asyncio.sleep(0.05)

        await scene.successor().step()
        await asyncio.sleep(0.05)
        scene.engine.let_order_end.set()

        assert scene.engine.ordered == [("0", "preload", "p")] * 2

    play(story)
