"""A folder of files kept by content within a disk budget, with notes about them; for several threads and processes.

```
<folder>/blobs/ab/abcd….safetensors   files by the SHA-256 of their bytes; locked by whoever is using one
<folder>/index/<key>                  what is noted under a key, as JSON
<folder>/partial/<key>                files that are not complete
<folder>/locks/<key>                  there while somebody is busy with the key
```

All locks are the operating system's (`flock`): they end with the process that holds them.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from weights.header import UnsuitableFile

PARTIAL_S = 86400.0
"""Seconds after which a file that was not completed is forgotten."""
MAX_NOTES = 2000
"""Keys about which something is noted; the oldest are forgotten."""
LOCK_POLL_S = 0.2
SPARE_BYTES = 2**30
"""Disk space that is left to others."""


class Shelf:
    """Files, and who uses them; made on disk if it is not there.

    Args:
        folder: Where everything lies.
        budget_bytes: Bytes of all files together; those not used for longest go first, but none that is in use.
    """

    def __init__(self, folder: Path, budget_bytes: int) -> None:
        self._folder, self._budget_bytes = folder, budget_bytes
        self._holds = threading.local()
        for name in ("blobs", "index", "partial", "locks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        self.tidy()

    def partial(self, key: str) -> Path:
        """Where a file is put together."""
        return self._folder / "partial" / key

    def blob(self, sha256: str) -> Path:
        """Where a file with these bytes is kept."""
        return self._folder / "blobs" / sha256[:2] / f"{sha256}.safetensors"

    @contextmanager
    def only_one(self, key: str, poll: Callable[[], None]) -> Iterator[None]:
        """Wait until nobody else is busy with a key; `poll` is called meanwhile and may raise to stop."""
        path = self._folder / "locks" / key
        while True:
            with path.open("w") as lock:
                if _locks(lock, path, fcntl.LOCK_EX):
                    try:
                        yield
                    finally:
                        path.unlink(missing_ok=True)
                    return
            poll()
            time.sleep(LOCK_POLL_S)

    @contextmanager
    def holding(self) -> Iterator[None]:
        """Until the end of the block, no file that this thread has asked to `hold` is deleted."""
        with ExitStack() as stack:
            self._holds.stack = stack
            try:
                yield
            finally:
                self._holds.stack = None

    def hold(self, sha256: str) -> Path | None:
        """A file that is kept, as used just now; None if there is none. It stays for the block of `holding`."""
        path = self.blob(sha256)
        with ExitStack() as stack:
            try:
                file = stack.enter_context(path.open("rb"))
            except FileNotFoundError:
                return None
            if not _locks(file, path, fcntl.LOCK_SH):
                return None
            os.utime(path)  # the time of its last use decides what goes first
            block: ExitStack | None = getattr(self._holds, "stack", None)
            if block is not None:
                block.push(stack.pop_all())
        return path

    def add(self, partial: Path, sha256: str) -> None:
        """Move a complete file to where it is kept; deletes others for it."""
        blob = self.blob(sha256)
        blob.parent.mkdir(exist_ok=True)
        if not blob.is_file():  # another file under this name may be in use
            partial.replace(blob)
        with suppress(FileNotFoundError):
            os.utime(blob)
        self.make_room(0, keep=blob)

    def note(self, key: str) -> dict[str, Any]:
        """What was noted under a key; empty if nothing was."""
        return read_note(self._folder / "index" / key)

    def write_note(self, key: str, content: Mapping[str, Any]) -> None:
        """Note something under a key, while nobody else is busy with it."""
        draft = self.partial(key).with_suffix(".draft")
        draft.write_text(json.dumps(dict(content)))
        draft.replace(self._folder / "index" / key)

    def make_room(self, num_bytes: int, keep: Path | None = None) -> None:
        """Delete what was not used for longest until so many bytes fit into the budget and onto the disk.

        Raises:
            UnsuitableFile: The disk is full of other things, or of files that are in use.
        """
        total, free = sum(size for _, size, _ in self._files()), self._free_bytes()
        for _, size, path in sorted(self._files()):
            if total + num_bytes <= self._budget_bytes and num_bytes <= free:
                break
            if path != keep and self._discarded(path):
                total, free = total - size, free + size
        if num_bytes > max(free, 0):
            raise UnsuitableFile(f"has {num_bytes} bytes, for which this server has no disk space")

    def tidy(self) -> None:
        """Forget what was not completed, what is noted about files that are gone, and the oldest of too many notes."""
        for age, _, path in self._files():
            if path.parent.name == "partial" and time.time() - age > PARTIAL_S:
                self._discarded(path)
        notes = sorted(((_age(path), path) for path in (self._folder / "index").iterdir()), reverse=True)
        for number, (_, path) in enumerate(notes):
            if number >= MAX_NOTES or not self.blob(str(read_note(path).get("sha256"))).is_file():
                path.unlink(missing_ok=True)
        for path in (self._folder / "locks").iterdir():
            _unlinked([path], path)

    def _files(self) -> Iterable[tuple[float, int, Path]]:
        """Time of last use, bytes and place of all files, complete or not."""
        for path in (*(self._folder / "blobs").glob("*/*"), *(self._folder / "partial").iterdir()):
            with suppress(FileNotFoundError):
                status = path.lstat()
                yield status.st_mtime, status.st_size, path

    def _discarded(self, path: Path) -> bool:
        """Delete a file unless it is in use; says whether it is gone."""
        if path.parent.name != "partial":
            return _unlinked([path], path)
        lock = self._folder / "locks" / path.stem
        lock.touch()
        return _unlinked([path, lock], lock)

    def _free_bytes(self) -> int:
        return shutil.disk_usage(self._folder).free - SPARE_BYTES


def read_note(path: Path) -> dict[str, Any]:
    """A table in a JSON file; empty if there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _locks(file: IO[Any], path: Path, kind: int) -> bool:
    """Lock an open file, if nobody has it who minds and it is still the one at `path`."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
        return os.fstat(file.fileno()).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _unlinked(paths: Iterable[Path], lock: Path) -> bool:
    """Delete files whose `lock` is free."""
    try:
        with lock.open("rb") as file:
            if not _locks(file, lock, fcntl.LOCK_EX):
                return False
            for path in paths:
                path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    return True


def _age(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
