"""Ports that are a test's own: no other worker of this run, and no client's connection, can come to have them."""

from __future__ import annotations

import fcntl
import random
import socket
import tempfile
from pathlib import Path
from typing import TextIO

FIRST, LAST = 15_000, 30_000
"""Below the ports that systems give to outgoing connections (from 32,768 on Linux)."""

_HELD: list[TextIO] = []
"""Open files whose locks keep the ports, until this process ends."""


def reserved_ports(count: int) -> list[int]:
    """Ports of this machine on which nothing listens, held against other processes that ask here."""
    folder = Path(tempfile.gettempdir()) / "upscaler-test-ports"
    folder.mkdir(exist_ok=True)
    found: list[int] = []
    for port in random.sample(range(FIRST, LAST), LAST - FIRST):
        if len(found) == count:
            return found
        lock = (folder / str(port)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with socket.socket() as trial:
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind(("127.0.0.1", port))
        except OSError:
            lock.close()
            continue
        _HELD.append(lock)
        found.append(port)
    raise AssertionError("no free ports")
