"""The migrations make the tables that the statements expect."""

from __future__ import annotations

import threading
from pathlib import Path

import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.dialects import postgresql

from server.ledger.migrate import HEAD, MIGRATIONS, current_revision, migrate
from server.ledger.statements import compile_statements
from server.ledger.tables import metadata


def test_migrated_tables_equal_the_described_ones(tmp_path: Path) -> None:
    """From an empty file, all migrations together give the tables in `tables.py`."""
    migrate(tmp_path / "ledger.sqlite3")

    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'ledger.sqlite3'}", poolclass=sqlalchemy.NullPool)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []


def test_the_newest_migration_is_the_one_that_is_asked_for() -> None:
    """HEAD is compared without loading Alembic, so it must not lag."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))

    assert ScriptDirectory.from_config(config).get_current_head() == HEAD


def test_processes_that_start_together_migrate_once(tmp_path: Path) -> None:
    """The second one waits and finds the work done."""
    path = tmp_path / "ledger.sqlite3"
    threads = [threading.Thread(target=migrate, args=(path,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert current_revision(path) == HEAD


def test_every_statement_can_be_said_to_postgresql() -> None:
    """The statements compile in PostgreSQL's words, too."""
    statements = compile_statements(postgresql.dialect(paramstyle="pyformat"))

    assert "%(id)s" in statements["get"].text
