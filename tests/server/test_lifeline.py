"""A child ends when its supervisor's end of the pipe closes."""

from __future__ import annotations

import os
import subprocess
import sys

from server import lifeline

CHILD = "import sys, time\nfrom server import lifeline\nlifeline.exit_when_cut(int(sys.argv[1]))\ntime.sleep(60)"


def test_a_child_exits_when_the_line_is_cut() -> None:
    """Closing the supervisor's end ends the child within a second, although it is busy."""
    line = lifeline.create()
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(line.read_fd)], pass_fds=(line.read_fd,))
    os.close(line.read_fd)
    assert child.poll() is None

    os.close(line.write_fd)

    assert child.wait(timeout=5.0) == 70


def test_the_ends_are_not_inherited_by_accident() -> None:
    """A process that was not handed the pipe cannot keep it open."""
    line = lifeline.create()

    assert [os.get_inheritable(fd) for fd in line] == [False, False]
    os.close(line.read_fd)
    os.close(line.write_fd)
