"""Every statement of the ledger, by name, written once in SQLAlchemy Core and compiled once to text.

Building and compiling a statement costs more than running it, and status polling is most of what a gateway does; so the
text is made when a connector opens and the driver gets nothing but text and parameters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ClauseElement,
    Dialect,
    Table,
    and_,
    bindparam,
    case,
    delete,
    exists,
    func,
    insert,
    literal,
    not_,
    null,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from server.ledger.states import State
from server.ledger.tables import blobs, kv, logs, orders, outbox, queued_only, requests, running_only, slots

r = requests.c
# Without the job, which is large and read by nobody but the dispatcher when it starts one.
row = (
    r.seq,
    r.id,
    r.endpoint,
    r.state,
    r.priority,
    r.created,
    r.started,
    r.finished,
    r.start_deadline,
    r.caller,
    r.store_io,
    r.base_url,
    r.retry,
    r.webhook_url,
    r.attempt,
    r.slot,
    r.token,
    r.event_seq,
    r.cancel_requested,
    r.outcome_status,
    r.outcome,
    r.outcome_headers,
    r.error,
    r.error_type,
    r.inference_s,
)
dispatch_order = (r.priority.desc(), r.seq)
this = r.id == bindparam("id")
# Fencing: only the attempt that holds the request may write to it.
held = and_(this, r.token == bindparam("token_"), r.state == State.IN_PROGRESS.value)
ended: dict[str, Any] = {
    name: bindparam(name)
    for name in ("finished", "outcome_status", "outcome", "outcome_headers", "error", "error_type", "inference_s")
}
# What may not be stored goes when it is no longer needed.
kept_job = case((r.store_io, r.job), else_=null())


@dataclass(frozen=True)
class Upsert:
    """Insert a row, or change the one with these keys; the databases spell it alike, SQLAlchemy has one for each."""

    table: Table
    keys: tuple[str, ...]
    changed: tuple[str, ...]

    def of(self, dialect: str) -> ClauseElement:
        """The statement for a dialect; with nothing to change, the row that is there stays."""
        insert_or = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}[dialect]
        statement: Any = insert_or(self.table).values({name: bindparam(name) for name in (*self.keys, *self.changed)})
        if not self.changed:
            return statement.on_conflict_do_nothing()
        return statement.on_conflict_do_update(
            index_elements=list(self.keys), set_={name: statement.excluded[name] for name in self.changed}
        )


STATEMENTS: dict[str, ClauseElement | Upsert] = {
    # -- requests: birth and reading
    "submit": insert(requests)
    .values(
        {
            column.name: bindparam(column.name)
            for column in requests.columns
            if column.name not in ("seq", "started", "slot", "token")
        }
    )
    .returning(r.seq),
    "get": select(*row).where(this),
    "queued": select(*row, null(), r.job).where(queued_only).order_by(*dispatch_order).limit(bindparam("limit")),
    "running": select(*row).where(running_only).order_by(r.seq),
    "cancels": select(*row).where(running_only, r.cancel_requested).order_by(r.seq),
    "count_queued": select(func.count()).select_from(requests).where(queued_only),
    "open_requests": union_all(
        *(
            select(r.endpoint, r.state, r.priority, func.count(), func.min(r.created))
            .where(kind)
            .group_by(r.endpoint, r.state, r.priority)
            for kind in (queued_only, running_only)
        )
    ),
    "count_ahead": select(
        select(func.count())
        .select_from(requests)
        .where(queued_only, r.priority > bindparam("priority"))
        .scalar_subquery()
        + select(func.count())
        .select_from(requests)
        .where(queued_only, r.priority == bindparam("priority"), r.seq < bindparam("seq"))
        .scalar_subquery()
    ),
    "queued_order": select(r.priority, r.seq).where(queued_only).order_by(*dispatch_order),
    # -- transitions
    # IN_QUEUE -> IN_PROGRESS; not when cancelled, expired or claimed in between.
    "claim": update(requests)
    .where(
        this,
        r.state == State.IN_QUEUE.value,
        or_(r.start_deadline.is_(None), r.start_deadline > bindparam("now")),
    )
    .values(
        state=State.IN_PROGRESS.value,
        slot=bindparam("slot"),
        token=bindparam("token_"),
        attempt=r.attempt + 1,
        started=bindparam("now"),
        event_seq=0,
    ),
    # IN_PROGRESS -> IN_QUEUE, at its old place since seq stays; it did start in time, so the deadline goes.
    "requeue": update(requests)
    .where(held, not_(r.cancel_requested))
    .values(
        state=State.IN_QUEUE.value,
        slot=null(),
        token=null(),
        start_deadline=null(),
        attempt=r.attempt - bindparam("uncounted"),
    ),
    # IN_PROGRESS -> COMPLETED, by the attempt that holds it.
    "complete": update(requests)
    .where(held)
    .values(
        state=State.COMPLETED.value,
        token=null(),
        retain_until=bindparam("retain_until"),
        job=kept_job,
        **ended,
    ),
    # IN_QUEUE -> COMPLETED, without an attempt: cancelled or too late.
    "end_queued": update(requests)
    .where(this, r.state == State.IN_QUEUE.value)
    .values(state=State.COMPLETED.value, retain_until=bindparam("retain_until"), job=kept_job, **ended),
    # IN_PROGRESS stays; the dispatcher tells the slot.
    "request_cancel": update(requests).where(this, r.state == State.IN_PROGRESS.value).values(cancel_requested=True),
    "late_starters": select(*row)
    .where(queued_only, r.start_deadline.is_not(None), r.start_deadline <= bindparam("now"))
    .order_by(r.start_deadline)
    .limit(bindparam("limit")),
    # -- logs
    "first_log": insert(logs).inline().values({column.name: bindparam(column.name) for column in logs.columns}),
    "log": insert(logs)
    .inline()
    .values(
        request_id=bindparam("request_id"),
        seq=select(func.coalesce(func.max(logs.c.seq), 0) + 1)
        .where(logs.c.request_id == bindparam("request_id"))
        .scalar_subquery(),
        timestamp=bindparam("timestamp"),
        level=bindparam("level"),
        message=bindparam("message"),
    ),
    "record_event": update(requests).where(held).values(event_seq=bindparam("event_seq")),
    "logs": select(logs.c.seq, logs.c.timestamp, logs.c.level, logs.c.message)
    .where(logs.c.request_id == bindparam("id"), logs.c.seq > bindparam("after_seq"))
    .order_by(logs.c.seq),
    # -- webhooks
    "outbox_add": insert(outbox)
    .inline()
    .values(
        request_id=bindparam("id"), url=bindparam("url"), created=bindparam("now"), tries=0, next_try=bindparam("now")
    ),
    "outbox_due": select(
        outbox.c.request_id, outbox.c.url, outbox.c.tries, outbox.c.created, outbox.c.next_try, outbox.c.last_status
    )
    .where(outbox.c.next_try <= bindparam("now"))
    .order_by(outbox.c.next_try)
    .limit(bindparam("limit")),
    "outbox_backlog": select(func.count(), func.min(outbox.c.created)).where(outbox.c.next_try.is_not(None)),
    "outbox_delivered": update(outbox)
    .where(outbox.c.request_id == bindparam("id"))
    .values(next_try=null(), tries=outbox.c.tries + 1, last_status=bindparam("status"), delivered=bindparam("now")),
    "outbox_failed": update(outbox)
    .where(outbox.c.request_id == bindparam("id"))
    .values(next_try=bindparam("next_try"), tries=outbox.c.tries + 1, last_status=bindparam("status")),
    # -- files and retention
    "hold_blob": Upsert(blobs, ("key", "holder"), ("expires",)),
    # A webhook that is still on its way keeps its request.
    "outdated": select(r.id)
    .where(
        r.retain_until.is_not(None),
        r.retain_until <= bindparam("now"),
        not_(exists().where(outbox.c.request_id == r.id, outbox.c.next_try.is_not(None))),
    )
    .limit(bindparam("limit")),
    "forget_request": delete(requests).where(this),
    "forget_logs": delete(logs).where(logs.c.request_id == bindparam("id")),
    "forget_outbox": delete(outbox).where(outbox.c.request_id == bindparam("id")),
    "release_blobs": delete(blobs)
    .where(blobs.c.holder == bindparam("id"), blobs.c.expires.is_(None))
    .returning(blobs.c.key),
    "expire_blobs": delete(blobs)
    .where(blobs.c.expires.is_not(None), blobs.c.expires <= bindparam("now"))
    .returning(blobs.c.key),
    # What a request was given by name goes at its own time, once the request needs it no longer.
    "let_go_inputs": update(blobs)
    .where(blobs.c.holder == bindparam("id"), blobs.c.expires.is_(None), not_(blobs.c.key.startswith("in/")))
    .values(expires=bindparam("now")),
    # Of a request that may not be stored, everything.
    "let_go_all_inputs": update(blobs)
    .where(blobs.c.holder == bindparam("id"), blobs.c.expires.is_(None))
    .values(expires=bindparam("now")),
    # A file that nobody holds is doomed: marked in the transaction that finds so, and from then on held by nobody.
    "is_doomed": select(
        exists(select(literal(1)).where(blobs.c.key == bindparam("key"), blobs.c.holder == bindparam("holder")))
    ),
    "doomed": select(blobs.c.key).where(blobs.c.holder == bindparam("holder")).limit(bindparam("limit")),
    "forget_blob": delete(blobs).where(blobs.c.key == bindparam("key"), blobs.c.holder == bindparam("holder")),
    "expires_s": select(r.expires_s).where(this),
    "is_held": select(exists(select(literal(1)).where(blobs.c.key == bindparam("key")))),
    # -- slots
    "put_slot": Upsert(slots, ("id",), ("state", "device", "weights", "detail", "heartbeat", "report")),
    "slots": select(
        slots.c.id, slots.c.state, slots.c.device, slots.c.weights, slots.c.detail, slots.c.heartbeat, slots.c.report
    ).order_by(slots.c.id),
    # -- the operator's orders
    "order_add": insert(orders).inline().values({column.name: bindparam(column.name) for column in orders.columns}),
    "order_get": select(*orders.columns).where(orders.c.id == bindparam("id")),
    "orders_open": select(*orders.columns).where(orders.c.answers.is_(None)).order_by(orders.c.created),
    "order_done": update(orders).where(orders.c.id == bindparam("id")).values(answers=bindparam("answers")),
    "orders_forget": delete(orders).where(orders.c.answers.is_not(None), orders.c.created < bindparam("before")),
    # -- small facts
    "kv_get": select(kv.c.value).where(kv.c.key == bindparam("key")),
    "kv_set": Upsert(kv, ("key",), ("value",)),
    # The first of several processes that make the same thing wins.
    "kv_add": Upsert(kv, ("key", "value"), ()),
}


@dataclass(frozen=True)
class Statement:
    """A statement as text, and the parameters that are the same every time."""

    text: str
    constants: Mapping[str, Any]

    def bind(self, **parameters: Any) -> dict[str, Any]:
        """The parameters for one execution."""
        return {**self.constants, **parameters}


def compile_statements(dialect: Dialect) -> dict[str, Statement]:
    """The statements in a database's own words, with parameters by name."""
    compiled = {
        name: (statement.of(dialect.name) if isinstance(statement, Upsert) else statement).compile(dialect=dialect)
        for name, statement in STATEMENTS.items()
    }
    return {
        name: Statement(str(statement), {key: value for key, value in statement.params.items() if value is not None})
        for name, statement in compiled.items()
    }
