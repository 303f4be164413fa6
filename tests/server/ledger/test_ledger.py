"""What the ledger promises: states, fencing, order, webhooks, retention."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import time
from collections.abc import Callable, Coroutine
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from server.ledger import Blob, Ledger, NewLog, NewRequest, Outcome, SlotRow
from server.ledger.sqlite import LedgerUnavailable, SqliteConnector
from server.settings import Settings

ENDPOINT = "fal-ai/creative-upscaler"
GOOD = Outcome(status=200, body={"seed": 1}, inference_s=0.5)


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a coroutine as a test."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(test(*args, **kwargs))

    return run


def new(request_id: str, **fields: Any) -> NewRequest:
    """A request with an empty job."""
    return NewRequest(id=request_id, endpoint=ENDPOINT, **{"job": {}, **fields})


@in_a_loop
async def test_a_request_passes_through_its_three_states(ledger: Ledger) -> None:
    """Submit, claim and complete leave a row that says what happened."""
    await ledger.submit(new("a", job={"image": "x"}, caller="me"))
    waiting = await ledger.get("a")
    (next_one,) = await ledger.queued(1)
    await ledger.claim("a", "slot-0", "token")
    running = await ledger.get("a")
    await ledger.complete("a", "token", GOOD)
    done = await ledger.get("a")

    assert waiting is not None and running is not None and done is not None
    assert (waiting.state, waiting.queue_position, next_one.job) == ("IN_QUEUE", 0, {"image": "x"})
    assert (running.state, running.queue_position, running.slot, running.attempt) == ("IN_PROGRESS", None, "slot-0", 1)
    assert (done.state, done.outcome_status, done.outcome_body, done.inference_s) == (
        "COMPLETED",
        200,
        {"seed": 1},
        0.5,
    )
    assert done.caller == "me" and done.is_completed


@in_a_loop
async def test_normal_runs_before_low_and_each_in_order_of_arrival(ledger: Ledger) -> None:
    """Positions and the dispatch order agree."""
    for request_id, priority in [("low1", "low"), ("n1", "normal"), ("low2", "low"), ("n2", "normal")]:
        await ledger.submit(new(request_id, priority=priority))

    order = [request.id for request in await ledger.queued(10)]
    positions = {request.id: (await ledger.get(request.id)).queue_position for request in await ledger.queued(10)}

    assert order == ["n1", "n2", "low1", "low2"]
    assert positions == {"n1": 0, "n2": 1, "low1": 2, "low2": 3}
    assert await ledger.num_queued() == 4


@in_a_loop
async def test_positions_in_a_long_queue_agree_with_the_order(settings: Settings, ledger: Ledger) -> None:
    """At once near the head, and after a second everywhere."""
    now = time.time()
    late = Ledger.open(settings, clock=lambda: now)
    await asyncio.gather(*(late.submit(new(f"r{number}", priority="low")) for number in range(700)))
    await late.submit(new("urgent"))
    order = [request.id for request in await late.queued(1000)]

    async def check(places: tuple[int, ...]) -> None:
        for place in places:
            row = await late.get(order[place])
            assert row is not None and row.queue_position == place

    await check((0, 1, 400))
    now += 2
    await check((0, 1, 499, 500, 501, 640, 700, 600))
    late.close()


@in_a_loop
async def test_only_one_claim_succeeds(ledger: Ledger) -> None:
    """Two slots never hold one request."""
    await ledger.submit(new("a"))

    assert await asyncio.gather(*(ledger.claim("a", f"s{i}", f"t{i}") for i in range(5))) == [True] + [False] * 4


@in_a_loop
async def test_a_lost_attempt_can_write_nothing_any_more(ledger: Ledger) -> None:
    """Every write of an attempt is fenced by its token."""
    await ledger.submit(new("a"))
    await ledger.claim("a", "s", "old")
    assert await ledger.requeue("a", "old")
    await ledger.claim("a", "s", "new")

    assert not await ledger.append_logs("a", "old", [NewLog(1.0, "INFO", "late")])
    assert not await ledger.complete("a", "old", GOOD)
    assert not await ledger.requeue("a", "old")
    assert await ledger.complete("a", "new", GOOD)
    assert not await ledger.complete("a", "new", GOOD)
    assert await ledger.logs("a") == []
    assert (await ledger.get("a")).attempt == 2


@in_a_loop
async def test_a_requeued_request_keeps_its_place(ledger: Ledger) -> None:
    """What was first before its slot died is first again, and its start deadline is met already."""
    await ledger.submit(new("first", start_deadline=time.time() + 9))
    await ledger.submit(new("second"))
    await ledger.claim("first", "s", "t")
    await ledger.requeue("first", "t")

    assert [request.id for request in await ledger.queued(10)] == ["first", "second"]
    assert await ledger.expire_start(time.time() + 10) == []


@in_a_loop
async def test_logs_are_numbered_and_events_recorded_once(ledger: Ledger) -> None:
    """A slot that repeats its events after a reconnection does not repeat its log lines."""
    await ledger.submit(new("a", logs=(NewLog(1.0, "WARN", "admission"),)))
    await ledger.claim("a", "s", "t")
    await ledger.append_logs("a", "t", [NewLog(2.0, "INFO", "one", 1), NewLog(2.0, "INFO", "two", 2)])
    await ledger.append_logs("a", "t", [NewLog(2.0, "INFO", "two", 2), NewLog(3.0, "INFO", "three \ud800", 3)])

    lines = await ledger.logs("a")

    assert [(line.seq, line.message) for line in lines] == [(1, "admission"), (2, "one"), (3, "two"), (4, "three ?")]
    assert [line.seq for line in await ledger.logs("a", after_seq=3)] == [4]
    assert (await ledger.get("a")).event_seq == 3


@in_a_loop
async def test_cancel_answers_by_state(ledger: Ledger) -> None:
    """Waiting ends at once, running is asked to stop, the rest says so."""
    await ledger.submit(new("waiting", webhook_url="http://hook"))
    await ledger.submit(new("running"))
    await ledger.claim("running", "s", "t")

    answers = [await ledger.request_cancel(name) for name in ("waiting", "waiting", "running", "none")]

    assert answers == ["OK", "ALREADY_COMPLETED", "CANCELLATION_REQUESTED", "NOT_FOUND"]
    assert [request.id for request in await ledger.cancels()] == ["running"]
    cancelled = await ledger.get("waiting")
    assert (cancelled.state, cancelled.outcome_status, cancelled.error_type) == ("COMPLETED", 499, "client_cancelled")
    assert [hook.request_id for hook in await ledger.outbox_due(time.time(), 10)] == ["waiting"]


@in_a_loop
async def test_a_cancelled_request_whose_slot_died_ends_as_cancelled(ledger: Ledger) -> None:
    """Nobody works on it again."""
    await ledger.submit(new("a"))
    await ledger.claim("a", "s", "t")
    await ledger.request_cancel("a")

    assert await ledger.requeue("a", "t")
    assert ((await ledger.get("a")).state, (await ledger.get("a")).outcome_status) == ("COMPLETED", 499)


@in_a_loop
async def test_a_request_that_waits_past_its_deadline_ends_with_504(ledger: Ledger) -> None:
    """It is neither claimed nor left waiting, and its answer names the user's own timeout."""
    await ledger.submit(new("late", start_deadline=time.time() - 1))
    await ledger.submit(new("patient"))

    assert not await ledger.claim("late", "s", "t")
    assert await ledger.expire_start(time.time()) == ["late"]
    row = await ledger.get("late")
    assert (row.state, row.outcome_status, row.error_type) == ("COMPLETED", 504, "request_timeout")
    assert "X-Fal-Request-Timeout-Type" in row.outcome_headers


@in_a_loop
async def test_completion_and_webhook_are_one_step(ledger: Ledger) -> None:
    """A webhook waits exactly when its request is over, whether at once, well or late."""
    born_done = Outcome(status=422, body={"detail": []}, error="Invalid status code: 422")
    await ledger.submit(new("refused", job=None, outcome=born_done, webhook_url="http://hook/1"))
    await ledger.submit(new("good", webhook_url="http://hook/2"))
    await ledger.claim("good", "s", "t")
    before = [hook.request_id for hook in await ledger.outbox_due(time.time(), 10)]
    await ledger.complete("good", "t", GOOD)

    after = [(hook.request_id, hook.url, hook.tries) for hook in await ledger.outbox_due(time.time(), 10)]

    assert before == ["refused"]
    assert after == [("refused", "http://hook/1", 0), ("good", "http://hook/2", 0)]


@in_a_loop
async def test_webhooks_are_retried_later_and_delivered_once(ledger: Ledger) -> None:
    """A failed delivery comes back at its time; a delivered or abandoned one does not."""
    for name in "abc":
        await ledger.submit(new(name, outcome=GOOD, webhook_url="http://hook"))
    now = time.time()
    await ledger.outbox_delivered("a", 200)
    await ledger.outbox_failed("b", now + 60, 500)
    await ledger.outbox_failed("c", None, 301)

    assert await ledger.outbox_due(now, 10) == []
    later = await ledger.outbox_due(now + 61, 10)
    assert [(hook.request_id, hook.tries, hook.last_status) for hook in later] == [("b", 1, 500)]


@in_a_loop
async def test_sweep_forgets_requests_and_names_their_files(ledger: Ledger) -> None:
    """After its retention a request is gone, with the files that nobody else holds."""
    await ledger.submit(new("a", blobs=("in/mine", "in/shared")))
    await ledger.submit(new("b", blobs=("in/shared",)))
    await ledger.claim("a", "s", "t")
    await ledger.complete("a", "t", Outcome(status=200, body={}, blobs=("out/a",)))
    await ledger.hold_blob(Blob("up/x", "upload", time.time() + 10))

    kept = await ledger.sweep(time.time() + 1)
    dropped = await ledger.sweep(time.time() + 86400 * 2)

    assert kept == []
    assert sorted(dropped) == ["in/mine", "out/a", "up/x"]
    assert await ledger.get("a") is None and await ledger.get("b") is not None


@in_a_loop
async def test_files_with_a_life_of_their_own_go_at_their_time(ledger: Ledger) -> None:
    """An output's lifecycle is counted from completion and may be shorter than its request's."""
    await ledger.submit(new("a", expires_s=60.0))
    await ledger.claim("a", "s", "t")
    await ledger.complete("a", "t", Outcome(status=200, body={}, blobs=("out/a",)))

    assert await ledger.sweep(time.time() + 30) == []
    assert await ledger.sweep(time.time() + 90) == ["out/a"]
    assert await ledger.get("a") is not None


@in_a_loop
async def test_nobody_can_hold_a_file_that_is_being_deleted(ledger: Ledger) -> None:
    """From the moment a sweep names it until it is gone; a sweep that was cut short names it again."""
    await ledger.hold_blob(Blob("in/a", "admission", 1.0))
    assert await ledger.sweep(2.0) == ["in/a"]

    assert not await ledger.hold_blob(Blob("in/a", "admission", 99.0))
    assert await ledger.sweep(3.0) == ["in/a"]
    await ledger.deleted(["in/a"])
    assert await ledger.hold_blob(Blob("in/a", "admission", 99.0))
    assert await ledger.sweep(4.0) == []


@in_a_loop
async def test_an_upload_that_a_request_needs_stays_until_it_is_over(ledger: Ledger) -> None:
    """Its own time may be up before the request has its turn; after that nothing else keeps it."""
    await ledger.hold_blob(Blob("up/x", "upload", time.time() + 10))
    await ledger.submit(new("a", blobs=("up/x",)))

    while_waiting = await ledger.sweep(time.time() + 3600)
    await ledger.claim("a", "s", "t")
    while_running = await ledger.sweep(time.time() + 3600)
    await ledger.complete("a", "t", GOOD)

    assert while_waiting == while_running == []
    assert await ledger.sweep(time.time() + 1) == ["up/x"]


@in_a_loop
async def test_a_pending_webhook_keeps_its_request(ledger: Ledger) -> None:
    """What is still to be delivered is not forgotten."""
    await ledger.submit(new("a", outcome=GOOD, webhook_url="http://hook"))
    await ledger.sweep(time.time() + 1e6)
    assert await ledger.get("a") is not None

    await ledger.outbox_delivered("a")
    await ledger.sweep(time.time() + 1e6)
    assert await ledger.get("a") is None


@in_a_loop
async def test_requests_that_must_not_be_stored_lose_their_input(settings: Settings, ledger: Ledger) -> None:
    """With X-Fal-Store-IO: 0 job and input are gone at completion and the rest within the hour."""
    for name, store_io in (("a", False), ("b", True)):
        await ledger.submit(new(name, job={"secret": 1}, store_io=store_io, blobs=(f"in/{name}",)))
        await ledger.claim(name, "s", "t")
        await ledger.complete(name, "t", GOOD)
    await ledger.submit(new("c", job={"secret": 1}, store_io=False))
    await ledger.request_cancel("c")
    with contextlib.closing(sqlite3.connect(settings.ledger_path)) as rows:
        assert rows.execute("SELECT id, job FROM requests").fetchall() == [
            ("a", None),
            ("b", '{"secret":1}'),
            ("c", None),
        ]
    assert await ledger.sweep(time.time()) == ["in/a"]

    await ledger.sweep(time.time() + 3700)
    assert await ledger.get("a") is None


@in_a_loop
async def test_only_dispatching_reads_jobs(ledger: Ledger) -> None:
    """A job may be large; polls and the dispatcher's rounds would read it ten times a second."""
    await ledger.submit(new("a", job={"image": "x"}))
    await ledger.claim("a", "s", "t")
    await ledger.request_cancel("a")
    await ledger.submit(new("b", job={"image": "x"}))

    rows = [await ledger.get("a"), *await ledger.running(), *await ledger.cancels(), await ledger.get("b")]
    assert [row.job_json for row in rows] == [None] * 4
    assert [row.job for row in await ledger.queued(10)] == [{"image": "x"}]


@in_a_loop
async def test_ready_means_a_slot_that_was_heard_of_lately(ledger: Ledger) -> None:
    """Starting, silent and dead slots do not count."""
    states = []
    for slot in (
        SlotRow("s", "starting", "cpu", "pocket"),
        SlotRow("s", "ready", "cpu", "pocket", heartbeat=time.time() - 60),
        SlotRow("s", "down", "cpu", "pocket"),
        SlotRow("s", "busy", "cpu", "pocket"),
    ):
        await ledger.put_slot(slot)
        states.append(await ledger.is_ready())

    assert states == [False, False, False, True]


@in_a_loop
async def test_the_first_of_two_makers_of_a_fact_wins(ledger: Ledger) -> None:
    """kv_add returns what is known, whoever made it."""
    assert await ledger.kv_get("key") is None
    assert [await ledger.kv_add("key", "one"), await ledger.kv_add("key", "two")] == ["one", "one"]
    await ledger.kv_set("key", "three")
    assert await ledger.kv_get("key") == "three"


@in_a_loop
async def test_a_failing_write_takes_nobody_else_with_it(ledger: Ledger) -> None:
    """Writes share a transaction and yet fail alone."""
    await ledger.submit(new("a"))

    results = await asyncio.gather(
        ledger.submit(new("b")), ledger.submit(new("a")), ledger.submit(new("c")), return_exceptions=True
    )

    assert isinstance(results[1], sqlite3.IntegrityError)
    assert [request.id for request in await ledger.queued(10)] == ["a", "b", "c"]


@in_a_loop
async def test_the_writer_survives_a_database_that_fails_it(
    settings: Settings, migrated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever breaks, connecting and taking back included, those who wait are told and the next write is tried."""
    settings.make_folders()
    shutil.copy(migrated, settings.ledger_path)
    ledger = Ledger.open(settings)
    connect, broken = SqliteConnector._connect, ["connect", "ROLLBACK", ""]

    class Broken(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            if sql in ("COMMIT", "ROLLBACK"):
                raise sqlite3.OperationalError("disk I/O error")
            return super().execute(sql, *parameters)

    def connect_badly(connector: SqliteConnector) -> sqlite3.Connection:
        fault = broken.pop(0)
        if fault == "connect":
            raise sqlite3.OperationalError("unable to open database file")
        if fault == "ROLLBACK":
            return sqlite3.connect(settings.ledger_path, isolation_level=None, check_same_thread=False, factory=Broken)
        return connect(connector)

    monkeypatch.setattr(SqliteConnector, "_connect", connect_badly)
    answers = [
        await asyncio.wait_for(asyncio.gather(ledger.submit(new(name)), return_exceptions=True), 5) for name in "abc"
    ]

    assert [type(answer) for (answer,) in answers] == [LedgerUnavailable, LedgerUnavailable, int]
    assert [request.id for request in await ledger.queued(10)] == ["c"]
    ledger.close()
    with pytest.raises(LedgerUnavailable, match="closed"):
        await asyncio.wait_for(ledger.submit(new("d")), 5)


@in_a_loop
async def test_what_was_accepted_survives_another_process(settings: Settings, ledger: Ledger) -> None:
    """A second ledger on the same folder sees, and may continue, what the first wrote."""
    await ledger.submit(new("a"))
    other = Ledger.open(settings)

    assert await other.claim("a", "s", "t")
    assert (await ledger.get("a")).state == "IN_PROGRESS"
    other.close()


@pytest.mark.parametrize("size", [1, 400])
def test_closing_writes_what_is_pending(settings: Settings, size: int) -> None:
    """Nothing that was handed over is lost at shutdown."""
    ledger = Ledger.open(settings)

    async def submit_all() -> None:
        await asyncio.gather(*(ledger.submit(new(f"r{number}")) for number in range(size)))

    asyncio.run(submit_all())
    ledger.close()

    rows = sqlite3.connect(settings.ledger_path)
    assert rows.execute("SELECT count(*) FROM requests").fetchone() == (size,)
    rows.close()
