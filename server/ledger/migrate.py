"""Bring the tables of a ledger up to date before anybody uses them."""

from __future__ import annotations

import fcntl
import sqlite3
from contextlib import closing
from pathlib import Path

HEAD = "0002"
MIGRATIONS = Path(__file__).with_name("migrations")


def migrate(path: Path) -> None:
    """Run the missing migrations on the SQLite file at `path`; one process does it, the others wait."""
    if current_revision(path) == HEAD:
        return
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if current_revision(path) != HEAD:
            _upgrade(path)


def current_revision(path: Path) -> str | None:
    """The revision of the file's tables; None for a file without tables."""
    if not path.exists():
        return None
    with closing(sqlite3.connect(path, timeout=15)) as connection:
        try:
            found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        except sqlite3.OperationalError:
            return None
    return str(found[0]) if found else None


def _upgrade(path: Path) -> None:
    # Imported here: a start that has nothing to migrate need not pay a third of a second for it.
    from alembic import command
    from alembic.config import Config
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    engine = create_engine(f"sqlite:///{path}", poolclass=NullPool)
    with engine.begin() as connection:
        config = Config(attributes={"connection": connection})
        config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
        command.upgrade(config, "head")
    engine.dispose()
