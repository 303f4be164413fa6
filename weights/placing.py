"""How complete files become a part of the full set: converted where needed, moved into place, locked.

Files wait in a folder of their part below `.partial`; one process at a time changes a set.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from weights import unpickle
from weights.catalogue import Part
from weights.header import UnsuitableFile
from weights.lock import LockedFile, LockedPart, is_whole, locked_file, read_lock, write_lock

PARTIAL = ".partial"
SPARE_BYTES = 2**30
"""Disk space that is left to others."""
LOCK_POLL_S = 0.2


class NoSpace(Exception):
    """The disk is too small for what was asked for; nothing was fetched."""


def staging(root: Path, part: Part) -> Path:
    """Where the files of a part wait."""
    return root / PARTIAL / part.folder.replace("/", "--")


def is_complete(part: Part, root: Path, lock: Mapping[str, LockedPart]) -> bool:
    """Whether a part came and is there, as far as sizes tell; one of an older catalogue may lack files by now."""
    return part.folder in lock and is_whole(root, part.folder, lock[part.folder]) and not part.missing(root)


@contextmanager
def only_one(root: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other process changes the set, and be the one that does."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    note(f"another process is changing {root}: waiting for it")
                    told = True
                time.sleep(LOCK_POLL_S)
        yield


class Staged(NamedTuple):
    """A complete file, its name in the repository (empty: made here), and its SHA-256 where it was compared already."""

    file: Path
    source: str
    sha256: str | None = None

    def locked(self) -> LockedFile:
        """The file for the lock."""
        return locked_file(self.file, self.source, self.sha256)


def place(
    part: Part,
    root: Path,
    staged: Mapping[str, Staged],
    *,
    revision: str | None,
    license: str | None,
    poll: Callable[[], None],
    made_from: Mapping[str, LockedFile] | None = None,
) -> None:
    """Move the complete files of a part into the set, converted where it says so, and lock them.

    Args:
        part: The part.
        root: Folder of the set.
        staged: Files by their path in the part's folder, in a folder of their own on the same disk; all are taken away.
        revision: The commit, if known.
        license: What the hub said.
        poll: Called now and then; may raise to stop.
        made_from: What files were converted from elsewhere.

    Raises:
        UnsuitableFile: A conversion refuses a file.
    """
    files = dict(staged)
    converted = [each for each in files.values() if part.converted or each.file.name.endswith(".safetensors.bin")]
    made_from = dict(made_from or {}) | {each.source: each.locked() for each in converted}
    if part.converted:
        made = _converted(part, [each.file for each in converted], converted[0].file.parent / "made", poll)
        files = {path: Staged(made / path, "") for path in part.made}
    else:
        for path, each in staged.items():
            if each in converted:
                files[path] = Staged(each.file.with_suffix(""), "")
                unpickle.convert(each.file, files[path].file, poll)
    locked = {path: each.locked() for path, each in files.items()}
    for path, each in files.items():
        target = root / part.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        each.file.replace(target)
    entry = LockedPart(
        repository=part.repository, revision=revision, license=license, files=locked, made_from=made_from
    )
    write_lock(root, read_lock(root) | {part.folder: entry})


def _converted(part: Part, files: Sequence[Path], made: Path, poll: Callable[[], None]) -> Path:
    """Run a part's conversion in a process of its own, which takes its memory with it."""
    shutil.rmtree(made, ignore_errors=True)
    command = [sys.executable, "-m", "weights.convert", part.converted, *map(str, files), str(made)]
    here = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while True:
            poll()
            try:
                _, complaint = process.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        last = (complaint.strip().splitlines() or ["without a word"])[-1]
        raise UnsuitableFile(f"{part.repository} could not be converted: {last}")
    return made
