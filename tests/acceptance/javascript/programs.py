"""A Node program that performs verbs of fal's client, and the set-up that it needs."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import queue
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance import debian

SOURCES = Path(__file__).parent
INSTALLED = Path(__file__).parents[3] / "build" / "javascript"
CHROMIUM = Path("/usr/bin/chromium")
MIN_MAJOR = 20
INSTALL_S = 600.0
ANSWER_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a verb.

    Attributes:
        value: What the client returned; None after an error.
        error: What the client threw, as its catcher sees it; None if nothing.
        notes: What its callbacks were told.
        calls: Its requests, in order: `method`, `url`, `target` of a proxied one, `body`, `status`.
        seconds: How long it took.
    """

    value: Any = None
    error: dict[str, Any] | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    calls: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


class Program:
    """A running `driver.mjs`."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self._next_line()

    def perform(self, verb: str, *, client: str, base: str, credentials: str | None = None, **options: Any) -> Answer:
        """Do `verb` with a new client that is pointed at `base` in the way that `client` names."""
        message = {"verb": verb, "client": client, "base": base, "credentials": credentials, "options": options}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(message) + "\n")
        self._process.stdin.flush()
        return Answer(**json.loads(self._next_line()))

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _next_line(self) -> str:
        line = self._lines.get(timeout=ANSWER_S)
        assert line, f"the program ended: {self._log.read_text()[-3000:]}"
        return line


@contextmanager
def running(log: Path, *arguments: str) -> Iterator[Program]:
    """`driver.mjs` while it is needed; its standard error goes to `log`."""
    node = installed()
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [node, "driver.mjs", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            cwd=INSTALLED,
            env={name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        ) as process,
    ):
        try:
            yield Program(process, log)
            assert process.stdin is not None
            process.stdin.close()
            process.wait(20.0)
        finally:
            process.kill()


def installed() -> str:
    """The path of node, with our programs and their packages in place; skips where that cannot be."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        pytest.skip("needs node and npm")
    version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True).stdout.strip()
    if int((re.findall(r"\d+", version) or [0])[0]) < MIN_MAJOR:
        pytest.skip(f"needs node {MIN_MAJOR} or newer, found {version}")
    with sole_installer():
        install(npm)
    return node


def install(npm: str) -> None:
    """Copy our programs beside the packages that they import, and have npm install those if they changed."""
    wanted, stamp = (SOURCES / "package.json").read_text(), INSTALLED / ".installed"
    for source in SOURCES.iterdir():
        copy = INSTALLED / source.name
        if source.suffix in (".mjs", ".js", ".html", ".json") and not (
            copy.exists() and copy.read_bytes() == source.read_bytes()  # another test process may be reading it
        ):
            shutil.copy(source, copy)
    if not stamp.exists() or stamp.read_text() != wanted:
        command = [npm, "install", "--no-audit", "--no-fund", "--no-package-lock"]
        done = subprocess.run(command, cwd=INSTALLED, capture_output=True, text=True, timeout=INSTALL_S)
        if done.returncode != 0:
            pytest.skip(f"npm install failed: {done.stderr[-500:]}")
        stamp.write_text(wanted)


@contextmanager
def sole_installer() -> Iterator[None]:
    """Wait until no other test process installs anything."""
    INSTALLED.mkdir(parents=True, exist_ok=True)
    with (INSTALLED / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def chromium() -> str:
    """The path of Chromium, installed where that is ours to do; skips elsewhere."""
    return str(debian.installed(CHROMIUM, "chromium"))


def file(data: bytes | int, *, name: str | None = None, type: str = "") -> dict[str, Any]:
    """A File (a Blob without `name`) for a verb's options: of these bytes, or of so many."""
    content = {"size": data} if isinstance(data, int) else {"base64": base64.b64encode(data).decode()}
    return {"$file": content | ({"name": name} if name else {}) | {"type": type}}
