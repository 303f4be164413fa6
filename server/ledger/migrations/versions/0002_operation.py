"""What is inside slots, and what the operator wants of them."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the slots' reports and the operator's orders."""
    op.add_column("slots", sa.Column("report", sa.Text, nullable=False, server_default="{}"))
    op.create_table(
        "orders",
        sa.Column("id", sa.Text, primary_key=True),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("pipeline", sa.Text, nullable=False),
        sa.Column("slot", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("answers", sa.Text),
    )
