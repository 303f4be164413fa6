"""Bells between the roles: one datagram says "look at the ledger now".

A bell carries no news of its own, so losing one only delays what the slow poll behind it would find anyway.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from pathlib import Path


def bell_path(run_dir: Path, name: str) -> Path:
    """Where the bell of this name listens."""
    return run_dir / f"{name}.bell"


def ring(run_dir: Path, name: str) -> None:
    """Wake whoever waits on the bell `name`; never blocks and never fails, also when nobody listens."""
    with contextlib.suppress(OSError), contextlib.closing(Ringer(run_dir, name)) as ringer:
        ringer.ring()


class Ringer:
    """The other end of a bell for who rings often: opening a socket takes longer than using it."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self._path = str(bell_path(run_dir, name))
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def ring(self) -> None:
        """Wake whoever waits on the bell; never blocks and never fails, also when nobody listens."""
        with contextlib.suppress(OSError):
            self._socket.sendto(b"!", self._path)

    def close(self) -> None:
        """Let go of the socket."""
        self._socket.close()


class Bell:
    """The listening end; one process per name, any number of waiting tasks on one event loop."""

    def __init__(self, run_dir: Path, name: str) -> None:
        """Take over the name, also from a process that died without letting go of it."""
        self._path = bell_path(run_dir, name)
        self._path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind(str(self._path))
        self._waiting: set[asyncio.Future[None]] = set()
        self._rung = False
        self._loop: asyncio.AbstractEventLoop | None = None

    async def wait(self, timeout_s: float) -> bool:
        """Wait for the next ring, at most `timeout_s` seconds; returns whether it rang.

        A ring that came while nobody waited counts for the next one who does.
        """
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._socket, self._heard)
        if self._rung:
            self._rung = False
            return True
        future: asyncio.Future[None] = self._loop.create_future()
        self._waiting.add(future)
        try:
            await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            return False
        finally:
            self._waiting.discard(future)
        return True

    def close(self) -> None:
        """Stop listening and remove the socket's file."""
        if self._loop is not None:
            self._loop.remove_reader(self._socket)
        self._socket.close()
        self._path.unlink(missing_ok=True)

    def _heard(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while self._socket.recv(16):
                pass
        self._rung = not self._waiting
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
