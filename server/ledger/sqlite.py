"""SQLite: one thread that writes, in transactions that many callers share; readers of their own.

`synchronous=FULL` makes an accepted request survive a power cut, at the price of a disk flush per transaction. All
writes that arrive while the disk is busy go into the next transaction together, each in a savepoint of its own, so that
one flush serves many and a failing write takes nobody else with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.dialects import sqlite

from server.ledger.statements import Statement, compile_statements

T = TypeVar("T")
MAX_GROUP = 256
BUSY_TIMEOUT_S = 15.0


class LedgerUnavailable(Exception):
    """The ledger cannot be written or read at the moment."""


class Writer:
    """What a write sees of the database: named statements, inside its savepoint."""

    def __init__(self, connection: sqlite3.Connection, statements: dict[str, Statement]) -> None:
        self._connection, self._statements = connection, statements

    def run(self, name: str, **parameters: Any) -> int:
        """Execute a statement; returns the number of rows it changed."""
        statement = self._statements[name]
        return self._connection.execute(statement.text, statement.bind(**parameters)).rowcount

    def rows(self, name: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """Execute a statement and fetch all that it returns."""
        statement = self._statements[name]
        return self._connection.execute(statement.text, statement.bind(**parameters)).fetchall()


Write = Callable[[Writer], T]


class _Pending:
    __slots__ = ("error", "future", "loop", "result", "write")

    def __init__(self, write: Write[Any], loop: asyncio.AbstractEventLoop) -> None:
        self.write, self.loop, self.future = write, loop, loop.create_future()
        self.result: Any = None
        self.error: BaseException | None = None

    def settle(self) -> None:
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)


class SqliteConnector:
    """The ledger's database in one file, shared with other processes on this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._statements = compile_statements(sqlite.dialect(paramstyle="named"))
        self._queue: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._reader = self._connect()
        self._scan_lock = threading.Lock()
        self._scanner = self._connect()
        self._thread = threading.Thread(target=self._write_groups, name="ledger-writer", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Finish what is queued and let go of the file."""
        self._queue.put(None)
        self._thread.join()
        with self._scan_lock:
            self._scanner.close()
        self._reader.close()

    async def write(self, write: Write[T]) -> T:
        """Run `write` in the next transaction; returns when it is on the disk.

        Raises:
            LedgerUnavailable: The disk is full, the file locked or the ledger closed; nothing of this write happened.
        """
        if not self._thread.is_alive():
            raise LedgerUnavailable("the ledger is closed")
        pending = _Pending(write, asyncio.get_running_loop())
        self._queue.put(pending)
        return await pending.future

    def read(self, name: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """A look-up by key on the calling thread: some 10 µs, less than handing it to another thread would cost."""
        statement = self._statements[name]
        try:
            return self._reader.execute(statement.text, statement.bind(**parameters)).fetchall()
        except sqlite3.OperationalError as error:
            raise LedgerUnavailable(str(error)) from error

    async def scan(self, name: str, **parameters: Any) -> list[tuple[Any, ...]]:
        """A query that may touch many rows, off the event loop."""
        return await asyncio.to_thread(self._scan, name, parameters)

    def _scan(self, name: str, parameters: dict[str, Any]) -> list[tuple[Any, ...]]:
        statement = self._statements[name]
        with self._scan_lock:
            try:
                return self._scanner.execute(statement.text, statement.bind(**parameters)).fetchall()
            except sqlite3.OperationalError as error:
                raise LedgerUnavailable(str(error)) from error

    def _connect(self) -> sqlite3.Connection:
        # Autocommit mode: transactions are ours to begin, with the kind of lock we choose.
        connection = sqlite3.connect(
            self._path, isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT_S, cached_statements=256
        )
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA temp_store=MEMORY")
        except sqlite3.Error:
            connection.close()
            raise
        return connection

    def _write_groups(self) -> None:
        connection: sqlite3.Connection | None = None
        last = False
        while not last:
            group = [self._queue.get()]
            while len(group) < MAX_GROUP and not self._queue.empty():
                group.append(self._queue.get())
            last = None in group
            waiting = [pending for pending in group if pending is not None]
            if not waiting:
                continue
            try:
                connection = connection or self._connect()
                _commit_group(connection, Writer(connection, self._statements), waiting)
            except Exception as error:
                for pending in waiting:
                    pending.error = LedgerUnavailable(str(error))
                # Closing takes back what was begun; a rollback could fail as the commit did, and the file may be new.
                _close(connection)
                connection = None
            _settle(waiting)
        _close(connection)


def _close(connection: sqlite3.Connection | None) -> None:
    if connection is not None:
        with contextlib.suppress(sqlite3.Error):
            connection.close()


def _commit_group(connection: sqlite3.Connection, writer: Writer, group: list[_Pending]) -> None:
    # The write lock at once: a lock upgraded in the middle could not wait for another process.
    connection.execute("BEGIN IMMEDIATE")
    for pending in group:
        _run_in_savepoint(connection, writer, pending)
    connection.execute("COMMIT")


def _run_in_savepoint(connection: sqlite3.Connection, writer: Writer, pending: _Pending) -> None:
    connection.execute("SAVEPOINT one")
    try:
        pending.result = pending.write(writer)
    except sqlite3.OperationalError:
        raise  # the disk, not this write: the whole group fails
    except Exception as error:
        pending.error = error
        connection.execute("ROLLBACK TO one")
    connection.execute("RELEASE one")


def _settle(group: list[_Pending]) -> None:
    by_loop: dict[asyncio.AbstractEventLoop, list[_Pending]] = {}
    for pending in group:
        by_loop.setdefault(pending.loop, []).append(pending)
    for loop, members in by_loop.items():
        # A loop that was closed in the meantime has nobody who waits.
        with contextlib.suppress(RuntimeError):
            # One wake-up per group, not one per write.
            loop.call_soon_threadsafe(_settle_all, members)


def _settle_all(members: list[_Pending]) -> None:
    for pending in members:
        pending.settle()
