"""A pipe that ties the life of a child process to its supervisor's, however the supervisor ends.

The supervisor holds the writing end and never writes. When it is gone, even by SIGKILL, the kernel closes that end and
every child reads end-of-file: unlike a parent-death signal this also holds when the starting thread ends first.
"""

from __future__ import annotations

import os
import threading
from typing import NamedTuple


class Lifeline(NamedTuple):
    """Both ends; `read_fd` is for `pass_fds` of the children, `write_fd` stays with the supervisor."""

    read_fd: int
    write_fd: int


def create() -> Lifeline:
    """Open the pipe; neither end is inherited unless it is passed on by name."""
    return Lifeline(*os.pipe())


def exit_when_cut(read_fd: int) -> None:
    """End this process at once, without clean-up, when the other end of the pipe is closed."""

    def watch() -> None:
        # The supervisor never writes: any return from read means that it is gone.
        os.read(read_fd, 1)
        os._exit(70)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()
