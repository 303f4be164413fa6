"""Requests with their logs and webhooks, files, slots, small facts."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Create the first tables."""
    _create_requests()
    op.create_table(
        "logs",
        sa.Column("request_id", sa.Text, nullable=False),
        sa.Column("seq", sa.Integer, nullable=False),
        sa.Column("timestamp", sa.Double, nullable=False),
        sa.Column("level", sa.Text, nullable=False),
        sa.Column("message", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("request_id", "seq"),
    )
    op.create_table(
        "outbox",
        sa.Column("request_id", sa.Text, primary_key=True),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("tries", sa.Integer, nullable=False),
        sa.Column("next_try", sa.Double),
        sa.Column("last_status", sa.Integer),
        sa.Column("delivered", sa.Double),
    )
    _index("outbox_due", "outbox", ["next_try"], "next_try IS NOT NULL")
    op.create_table(
        "blobs",
        sa.Column("key", sa.Text, nullable=False),
        sa.Column("holder", sa.Text, nullable=False),
        sa.Column("expires", sa.Double),
        sa.PrimaryKeyConstraint("key", "holder"),
    )
    _index("blobs_expiring", "blobs", ["expires"], "expires IS NOT NULL")
    op.create_index("blobs_held", "blobs", ["holder"])
    op.create_table(
        "slots",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("weights", sa.Text, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Column("heartbeat", sa.Double, nullable=False),
    )
    op.create_table(
        "kv",
        sa.Column("key", sa.Text, primary_key=True),
        sa.Column("value", sa.Text, nullable=False),
    )


def _create_requests() -> None:
    op.create_table(
        "requests",
        sa.Column("seq", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("id", sa.Text, nullable=False, unique=True),
        sa.Column("endpoint", sa.Text, nullable=False),
        sa.Column("state", sa.Text, nullable=False),
        sa.Column("priority", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("started", sa.Double),
        sa.Column("finished", sa.Double),
        sa.Column("start_deadline", sa.Double),
        sa.Column("job", sa.Text),
        sa.Column("caller", sa.Text, nullable=False),
        sa.Column("store_io", sa.Boolean, nullable=False),
        sa.Column("base_url", sa.Text, nullable=False),
        sa.Column("expires_s", sa.Double),
        sa.Column("retry", sa.Boolean, nullable=False),
        sa.Column("webhook_url", sa.Text),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("slot", sa.Text),
        sa.Column("token", sa.Text),
        sa.Column("event_seq", sa.Integer, nullable=False),
        sa.Column("cancel_requested", sa.Boolean, nullable=False),
        sa.Column("outcome_status", sa.Integer),
        sa.Column("outcome", sa.Text),
        sa.Column("outcome_headers", sa.Text),
        sa.Column("error", sa.Text),
        sa.Column("error_type", sa.Text),
        sa.Column("inference_s", sa.Double),
        sa.Column("retain_until", sa.Double),
    )
    _index("requests_queued", "requests", [sa.text("priority DESC"), "seq"], "state = 'IN_QUEUE'")
    _index("requests_running", "requests", ["seq"], "state = 'IN_PROGRESS'")
    _index("requests_deadline", "requests", ["start_deadline"], "state = 'IN_QUEUE' AND start_deadline IS NOT NULL")
    _index("requests_retained", "requests", ["retain_until"], "retain_until IS NOT NULL")


def _index(name: str, table: str, columns: list[str | sa.TextClause], where: str) -> None:
    op.create_index(name, table, columns, sqlite_where=sa.text(where), postgresql_where=sa.text(where))
