"""What lies in the full set, and where it came from: `weights.lock.json`, written as files come.

```
{"parts": {"sd15": {"repository": …, "revision": …, "license": …, "files": {"unet/config.json": {…}}}}}
```

Each file has its SHA-256, its size in bytes and its name in the repository. A revision is the commit that was fetched;
null where files came from a folder that did not say.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

LOCK_FILE = "weights.lock.json"
CHUNK_BYTES = 2**22


class LockUnreadable(Exception):
    """The lock file is not what was written; the message names it."""


@dataclass(frozen=True, kw_only=True)
class LockedFile:
    """A file as it was when it came."""

    sha256: str
    size_bytes: int
    source: str  # its name in the repository; empty for one that a conversion made


@dataclass(frozen=True, kw_only=True)
class LockedPart:
    """A part as it was when it came; `files` by their path in its folder."""

    repository: str
    revision: str | None
    license: str | None  # as the hub said
    files: Mapping[str, LockedFile]
    made_from: Mapping[str, LockedFile] = field(default_factory=dict)  # what a conversion read, by name


class Fault(NamedTuple):
    """A file that is not as it was: its path relative to the set's folder, and what is wrong."""

    path: str
    reason: str


def read_lock(root: Path) -> dict[str, LockedPart]:
    """The parts that are locked in a set's folder, by their own; empty where nothing is.

    Raises:
        LockUnreadable: See there.
    """
    file = root / LOCK_FILE
    try:
        parts = json.loads(file.read_text(encoding="utf-8"))["parts"]
        return {name: _part(part) for name, part in parts.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise LockUnreadable(f"{file} cannot be read ({error}). Move it away and pull or import again.") from error


def _part(content: Mapping[str, Any]) -> LockedPart:
    files = {name: LockedFile(**file) for name, file in content["files"].items()}
    made_from = {name: LockedFile(**file) for name, file in content.get("made_from", {}).items()}
    return LockedPart(**{**content, "files": files, "made_from": made_from})


def write_lock(root: Path, parts: Mapping[str, LockedPart]) -> None:
    """Replace the lock file at once: whoever reads sees the old or the new one."""
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / LOCK_FILE, {"parts": {name: asdict(parts[name]) for name in sorted(parts)}})


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that it is whole whenever the machine stops."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    with draft.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def sha256_of(path: Path, read: Callable[[int], None] = lambda num_bytes: None) -> str:
    """SHA-256 of a file; `read` is told of the bytes as they are read and may raise to stop."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            read(len(chunk))
    return digest.hexdigest()


def locked_file(path: Path, source: str = "", sha256: str | None = None) -> LockedFile:
    """A file that is there, for the lock; reads it once, unless its hash is known."""
    return LockedFile(sha256=sha256 or sha256_of(path), size_bytes=path.stat().st_size, source=source)


def is_whole(root: Path, name: str, part: LockedPart) -> bool:
    """Whether all files of a part are there in their sizes; reads none of them."""
    return all(_size(root / name / path) == file.size_bytes for path, file in part.files.items())


def faults(
    root: Path, parts: Mapping[str, LockedPart], read: Callable[[int], None] = lambda num_bytes: None
) -> Iterator[Fault]:
    """What is wrong with locked files, in their order; every file is read once, several at a time."""
    files = [(root / name / path, file) for name, part in parts.items() for path, file in part.files.items()]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        try:
            reasons = pool.map(lambda entry: _wrong_with(entry[0], entry[1], read), files)
            for (path, _), reason in zip(files, reasons, strict=True):
                if reason:
                    yield Fault(str(path.relative_to(root)), reason)
        finally:
            pool.shutdown(cancel_futures=True)


def _wrong_with(path: Path, file: LockedFile, read: Callable[[int], None]) -> str:
    size = _size(path)
    if size is None:
        return "is missing"
    if size != file.size_bytes:
        return f"has {size} bytes, expected {file.size_bytes}"
    try:
        found = sha256_of(path, read)
    except OSError as error:  # a disk that fails is what this is for
        return f"cannot be read: {error.strerror or error}"
    return "" if found == file.sha256 else f"has changed: SHA-256 is {found}, expected {file.sha256}"


def size_of(parts: Iterable[LockedPart]) -> int:
    """Bytes of all files of parts."""
    return sum(file.size_bytes for part in parts for file in part.files.values())


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
