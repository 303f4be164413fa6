"""The tables, in the types that SQLite and PostgreSQL share."""

from __future__ import annotations

from sqlalchemy import Boolean, Column, Double, Index, Integer, MetaData, PrimaryKeyConstraint, Table, Text, text

metadata = MetaData()

requests = Table(
    "requests",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True, comment="order of arrival; kept when requeued"),
    Column("id", Text, nullable=False, unique=True),
    Column("endpoint", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("priority", Text, nullable=False, comment="'normal' or 'low'"),
    Column("created", Double, nullable=False),
    Column("started", Double, comment="of the latest attempt"),
    Column("finished", Double),
    Column("start_deadline", Double),
    Column("job", Text, comment="JSON; what a slot is to do"),
    Column("caller", Text, nullable=False),
    Column("store_io", Boolean, nullable=False),
    Column("base_url", Text, nullable=False),
    Column("expires_s", Double, comment="life of its files after completion"),
    Column("retry", Boolean, nullable=False),
    Column("webhook_url", Text),
    Column("attempt", Integer, nullable=False),
    Column("slot", Text),
    Column("token", Text, comment="fences every write of an attempt"),
    Column("event_seq", Integer, nullable=False, comment="latest event of the slot that is recorded"),
    Column("cancel_requested", Boolean, nullable=False),
    Column("outcome_status", Integer),
    Column("outcome", Text, comment="JSON body of the answer"),
    Column("outcome_headers", Text, comment="JSON"),
    Column("error", Text),
    Column("error_type", Text),
    Column("inference_s", Double),
    Column("retain_until", Double, comment="set at completion"),
)
queued_only = requests.c.state == text("'IN_QUEUE'")
running_only = requests.c.state == text("'IN_PROGRESS'")
# 'normal' sorts after 'low', hence descending: the dispatch order is priority DESC, seq.
Index(
    "requests_queued",
    requests.c.priority.desc(),
    requests.c.seq,
    sqlite_where=queued_only,
    postgresql_where=queued_only,
)
Index("requests_running", requests.c.seq, sqlite_where=running_only, postgresql_where=running_only)
Index(
    "requests_deadline",
    requests.c.start_deadline,
    sqlite_where=text("state = 'IN_QUEUE' AND start_deadline IS NOT NULL"),
    postgresql_where=text("state = 'IN_QUEUE' AND start_deadline IS NOT NULL"),
)
Index(
    "requests_retained",
    requests.c.retain_until,
    sqlite_where=text("retain_until IS NOT NULL"),
    postgresql_where=text("retain_until IS NOT NULL"),
)

logs = Table(
    "logs",
    metadata,
    Column("request_id", Text, nullable=False),
    Column("seq", Integer, nullable=False),
    Column("timestamp", Double, nullable=False),
    Column("level", Text, nullable=False),
    Column("message", Text, nullable=False),
    PrimaryKeyConstraint("request_id", "seq"),
)

outbox = Table(
    "outbox",
    metadata,
    Column("request_id", Text, primary_key=True),
    Column("url", Text, nullable=False),
    Column("created", Double, nullable=False),
    Column("tries", Integer, nullable=False),
    Column("next_try", Double, comment="NULL: delivered or given up"),
    Column("last_status", Integer),
    Column("delivered", Double),
)
Index("outbox_due", outbox.c.next_try, sqlite_where=text("next_try IS NOT NULL"))

blobs = Table(
    "blobs",
    metadata,
    Column("key", Text, nullable=False),
    Column("holder", Text, nullable=False, comment="a request's id, or 'upload'"),
    Column("expires", Double, comment="NULL: until its holder goes"),
    PrimaryKeyConstraint("key", "holder"),
)
Index("blobs_expiring", blobs.c.expires, sqlite_where=text("expires IS NOT NULL"))
Index("blobs_held", blobs.c.holder)

slots = Table(
    "slots",
    metadata,
    Column("id", Text, primary_key=True),
    Column("state", Text, nullable=False),
    Column("device", Text, nullable=False),
    Column("weights", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("heartbeat", Double, nullable=False),
    Column("report", Text, nullable=False, server_default="{}", comment="JSON; what is inside"),
)

orders = Table(
    "orders",
    metadata,
    Column("id", Text, primary_key=True),
    Column("action", Text, nullable=False, comment="'preload' or 'unload'"),
    Column("pipeline", Text, nullable=False, comment="empty: all"),
    Column("slot", Text, nullable=False, comment="empty: all"),
    Column("created", Double, nullable=False),
    Column("answers", Text, comment="JSON, by slot; NULL until it is done"),
)

kv = Table(
    "kv",
    metadata,
    Column("key", Text, primary_key=True),
    Column("value", Text, nullable=False),
)
