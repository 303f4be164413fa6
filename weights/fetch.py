"""Weights by URL: downloaded once, checked, kept by content within a disk budget.

```
<folder>/blobs/ab/abcd….safetensors   files by the SHA-256 of their bytes
<folder>/index/<sha256 of the URL>    what a URL stood for when it was last asked, as JSON
<folder>/partial/<sha256 of the URL>  downloads that are not complete; they are resumed
<folder>/locks/<sha256 of the URL>    one download of a URL at a time, over all processes
```

How the network is reached is the caller's: it is given as a function that opens a URL, and guards what it dials.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from weights.header import SNIFF_BYTES, UnsuitableFile, is_pickle, sniff

MAX_TRIES = 5
"""Times a download is taken up again; each must have brought something."""
FRESH_S = 600.0
"""Seconds for which a URL is believed to stand for the same file without asking."""
PARTIAL_S = 86400.0
"""Seconds after which a download that broke off is forgotten."""
LOCK_POLL_S = 0.2
SPARE_BYTES = 2**30
"""Disk space that is left to others."""


class FileTooLarge(Exception):
    """The file has more bytes than this server accepts."""

    def __init__(self, max_bytes: int) -> None:
        super().__init__(f"The file is larger than {max_bytes} bytes.")
        self.max_bytes = max_bytes


class Answer(Protocol):
    """What a server sent: status 200, 206, 304 or 416, headers by name in any case, and the bytes as they come."""

    @property
    def status_code(self) -> int: ...
    @property
    def headers(self) -> Mapping[str, str]: ...
    def iter_raw(self) -> Iterator[bytes]: ...


Poll = Callable[[], None]
Open = Callable[[str, Mapping[str, str], Poll], AbstractContextManager[Answer]]
"""Opens a URL with these headers; calls the last argument now and then, which may raise to stop."""


@dataclass(frozen=True, kw_only=True)
class WeightFile:
    """A file on disk: where it lies, what it was called where it came from, and the SHA-256 of its bytes."""

    path: Path
    name: str
    sha256: str

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return self.name.rpartition(".")[0] or self.name


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What a URL stood for."""

    sha256: str
    name: str
    etag: str
    modified: str
    checked_at: float


@dataclass(frozen=True)
class _Wanted:
    """A URL, and what its caller wants to be asked."""

    url: str
    check: Callable[[Path], object]
    sniff: Callable[[bytes], None]
    poll: Poll


class WeightCache:
    """Files of weights by URL; safe to use from several threads and processes.

    Args:
        folder: Where files are kept; made if it is not there.
        open: Opens a URL.
        interrupted: What `open` raises when the network or the other server is at fault.
        max_file_bytes: Largest file.
        budget_bytes: Bytes of all files together; those not used for longest go first.
        convert: Turns a pickle (first path) into safetensors (second path), polling; None refuses pickles.
        fresh_s: See `FRESH_S`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        open: Open,
        interrupted: type[Exception],
        max_file_bytes: int,
        budget_bytes: int,
        convert: Callable[[Path, Path, Poll], None] | None = None,
        fresh_s: float = FRESH_S,
    ) -> None:
        self._folder, self._open, self._interrupted = folder, open, interrupted
        self._max_bytes, self._budget_bytes = min(max_file_bytes, budget_bytes), budget_bytes
        self._convert, self._fresh_s = convert, fresh_s
        for name in ("blobs", "index", "partial", "locks"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        for file in (folder / "partial").iterdir():
            with suppress(FileNotFoundError):
                if time.time() - file.stat().st_mtime > PARTIAL_S:
                    file.unlink()

    def fetch(
        self,
        url: str,
        check: Callable[[Path], object],
        poll: Poll = lambda: None,
        *,
        sniff: Callable[[bytes], None] = sniff,
    ) -> WeightFile:
        """The file behind a URL, from disk when it is the same as before.

        Args:
            url: As the caller gave it; never written anywhere.
            check: Raises `UnsuitableFile` for a file that must not be kept.
            poll: Called now and then while others are waited for; may raise to stop, and what came so far is kept.
            sniff: Raises `UnsuitableFile` by a file's first bytes, so that the rest need not be waited for.

        Raises:
            UnsuitableFile: The file is not what was asked for; nothing of it is kept.
            FileTooLarge: It is larger than this server accepts.
            Exception: What `open` raises, and what `poll` raises.
        """
        key = hashlib.sha256(url.encode()).hexdigest()
        with self._only_one(key, poll):
            entry = self._entry(key)
            if entry is None or time.time() - entry.checked_at > self._fresh_s:
                entry = self._renewed(_Wanted(url, check, sniff, poll), key, entry)
            path = self._blob(entry.sha256)
            check(path)
            os.utime(path)  # the time of its last use decides what goes first
            return WeightFile(path=path, name=entry.name, sha256=entry.sha256)

    def _renewed(self, wanted: _Wanted, key: str, entry: _Entry | None) -> _Entry:
        """Ask the other server whether the file is still the same, and download it if not."""
        partial = self._folder / "partial" / key
        try:
            entry = self._download(wanted, partial, entry)
            if partial.exists():
                entry = self._kept(partial, entry, wanted)
        except (UnsuitableFile, FileTooLarge):
            _forget(partial)
            raise
        except self._interrupted:
            if entry is None or partial.exists():
                raise
            # The file was here before and nothing says that it has changed.
        _write(self._folder / "index" / key, asdict(entry))
        return entry

    def _download(self, wanted: _Wanted, partial: Path, entry: _Entry | None) -> _Entry:
        """Complete the partial file, or leave none when the file is the same as before; as far as it is known then."""
        for attempt in range(MAX_TRIES):
            before = _size(partial)
            try:
                with self._open(wanted.url, _headers(partial, entry), wanted.poll) as answer:
                    if answer.status_code == 304 and entry is not None:
                        _forget(partial)  # of another file, and of no use
                        return replace(entry, checked_at=time.time())
                    if answer.status_code == 416:
                        _forget(partial)
                        continue
                    self._receive(answer, partial, wanted)
                    return _Entry(
                        sha256="",
                        name=_name(wanted.url, answer.headers),
                        etag=answer.headers.get("etag", ""),
                        modified=answer.headers.get("last-modified", ""),
                        checked_at=time.time(),
                    )
            except self._interrupted:
                if attempt == MAX_TRIES - 1 or _size(partial) <= before:
                    raise
        raise UnsuitableFile("could not be downloaded: its server contradicts itself about its length")

    def _receive(self, answer: Answer, partial: Path, wanted: _Wanted) -> None:
        """Write what arrives; what is there is kept only if the other server agrees that it is the beginning."""
        if answer.headers.get("content-encoding", "identity") != "identity":
            raise UnsuitableFile("came compressed for the way, which files of weights must not")
        resumed = answer.status_code == 206 and re.match(
            rf"bytes {_size(partial)}-", answer.headers.get("content-range", "")
        )
        if answer.status_code == 206 and not resumed:
            _forget(partial)
            raise UnsuitableFile("could not be resumed: its server sent another part than was asked for")
        total = int(announced) if (announced := answer.headers.get("content-length", "")).isdecimal() else 0
        if total + (_size(partial) if resumed else 0) > self._max_bytes:
            raise FileTooLarge(self._max_bytes)
        self._make_room(total)
        validator = answer.headers.get("etag", "")
        if not validator or validator.startswith("W/"):
            validator = answer.headers.get("last-modified", "")
        _write(partial.with_suffix(".json"), {"validator": validator})
        received = _size(partial) if resumed else 0
        with partial.open("ab" if resumed else "wb") as file:
            for chunk in answer.iter_raw():
                wanted.poll()
                head = chunk[:SNIFF_BYTES] if received == 0 else b""
                if len(head) == SNIFF_BYTES and not (self._convert is not None and is_pickle(head)):
                    wanted.sniff(head)
                received += len(chunk)
                if received > self._max_bytes:
                    raise FileTooLarge(self._max_bytes)
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())

    def _kept(self, partial: Path, entry: _Entry, wanted: _Wanted) -> _Entry:
        """Check a complete file and move it to where files are kept."""
        with partial.open("rb") as file:
            head = file.read(SNIFF_BYTES)
        if is_pickle(head) and self._convert is not None:
            converted = partial.with_suffix(".converted")
            try:
                self._convert(partial, converted, wanted.poll)
                converted.replace(partial)
            finally:
                converted.unlink(missing_ok=True)
        wanted.check(partial)
        with partial.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        blob = self._blob(sha256)
        blob.parent.mkdir(exist_ok=True)
        partial.replace(blob)
        _forget(partial)
        self._make_room(0, keep=blob)
        return replace(entry, sha256=sha256)

    def _make_room(self, num_bytes: int, keep: Path | None = None) -> None:
        """Delete what was not used for longest until so many bytes fit into the budget and onto the disk.

        Raises:
            UnsuitableFile: The disk is full of other things.
        """
        blobs = []
        for path in (self._folder / "blobs").rglob("*.safetensors"):
            with suppress(FileNotFoundError):
                status = path.stat()
                blobs.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in blobs)
        free = shutil.disk_usage(self._folder).free - SPARE_BYTES
        for _, size, path in sorted(blobs):
            if total + num_bytes <= self._budget_bytes and num_bytes <= free:
                break
            if path != keep:
                # Whoever has the file open keeps reading it.
                path.unlink(missing_ok=True)
                total, free = total - size, free + size
        if num_bytes > max(free, 0):
            raise UnsuitableFile(f"has {num_bytes} bytes, for which this server has no disk space")

    def _blob(self, sha256: str) -> Path:
        return self._folder / "blobs" / sha256[:2] / f"{sha256}.safetensors"

    def _entry(self, key: str) -> _Entry | None:
        try:
            entry = _Entry(**json.loads((self._folder / "index" / key).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return entry if self._blob(entry.sha256).is_file() else None

    @contextmanager
    def _only_one(self, key: str, poll: Poll) -> Iterator[None]:
        """Wait until nobody else is busy with a URL."""
        with (self._folder / "locks" / key).open("w") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    poll()
                    time.sleep(LOCK_POLL_S)
            yield


def _headers(partial: Path, entry: _Entry | None) -> dict[str, str]:
    """What to ask for: the rest of a download that broke off, else the file unless it is the one we have."""
    headers = {"accept": "*/*", "accept-encoding": "identity"}
    validator = _validator(partial)
    if _size(partial) and validator:
        return headers | {"range": f"bytes={_size(partial)}-", "if-range": validator}
    if entry is not None and entry.etag:
        return headers | {"if-none-match": entry.etag}
    if entry is not None and entry.modified:
        return headers | {"if-modified-since": entry.modified}
    return headers


def _validator(partial: Path) -> str:
    try:
        return str(json.loads(partial.with_suffix(".json").read_text())["validator"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _name(url: str, headers: Mapping[str, str]) -> str:
    """What a file is called: as its server says, else as its URL ends; without what a path could be made of."""
    disposition = headers.get("content-disposition", "")
    if (extended := re.search(r"filename\*\s*=\s*utf-8''([^;]+)", disposition, re.IGNORECASE)) is not None:
        name = urllib.parse.unquote(extended[1])
    elif (plain := re.search(r'filename\s*=\s*(?:"([^"]+)"|([^;\s]+))', disposition, re.IGNORECASE)) is not None:
        name = plain[1] or plain[2]
    else:
        name = urllib.parse.unquote(urllib.parse.urlsplit(url).path)
    return re.sub(r"[\x00-\x1f\x7f]", "", name.replace("\\", "/").rpartition("/")[2])[:200]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
    draft.write_text(json.dumps(dict(content)))
    draft.replace(path)


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    partial.with_suffix(".json").unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
