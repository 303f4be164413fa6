"""Weights by URL: downloaded once, checked, kept by content within a disk budget.

Files lie on a `Shelf` under the SHA-256 of their bytes; its keys are the SHA-256 of URLs, and what is noted under one
is what the URL stood for when it was last asked. Downloads that break off are resumed.

How the network is reached is the caller's: it is given as a function that opens a URL, and guards what it dials.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from weights.header import SNIFF_BYTES, UnsuitableFile, is_pickle, sniff
from weights.shelf import Shelf, read_note

MAX_TRIES = 5
"""Times a download is taken up again; each must have brought something."""
FRESH_S = 600.0
"""Seconds for which a URL is believed to stand for the same file without asking."""
ROOM_BYTES = 2**28
"""Disk space that is made at once for a file whose length nobody has told."""
HASH_BYTES = 2**24
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


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
        self._open, self._interrupted = open, interrupted
        self._shelf = Shelf(folder, budget_bytes)
        self._max_bytes = min(max_file_bytes, budget_bytes)
        self._convert, self._fresh_s = convert, fresh_s

    def holding(self) -> AbstractContextManager[None]:
        """Until the end of the block, no file that this thread fetches is deleted by whoever needs its room."""
        return self._shelf.holding()

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
            UnsuitableFile: The file is not what was asked for, or finds no room; nothing of it is kept.
            FileTooLarge: It is larger than this server accepts.
            Exception: What `open` raises, and what `poll` raises.
        """
        key = hashlib.sha256(url.encode()).hexdigest()
        wanted = _Wanted(url, check, sniff, poll)
        try:
            with self._shelf.only_one(key, poll):
                while True:  # again only if the file is deleted in the moment between
                    entry = self._entry(key)
                    if entry is None or time.time() - entry.checked_at > self._fresh_s:
                        entry = self._renewed(wanted, key, entry)
                    if (path := self._shelf.hold(entry.sha256)) is not None:
                        check(path)
                        return WeightFile(path=path, name=entry.name, sha256=entry.sha256)
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            raise UnsuitableFile("does not fit onto this server's disk, which is full") from error

    def _renewed(self, wanted: _Wanted, key: str, entry: _Entry | None) -> _Entry:
        """Ask the other server whether the file is still the same, and download it if not."""
        partial = self._shelf.partial(key)
        try:
            entry = self._download(wanted, partial, entry)
            if partial.exists():
                entry = self._kept(partial, entry, wanted)
        except (UnsuitableFile, FileTooLarge, OSError):
            _forget(partial)
            raise
        except self._interrupted:
            has_changed = partial.exists()
            if not _validator_of_partial(partial):
                _forget(partial)  # nobody could say later whether it is the beginning of the same file
            if entry is None or has_changed:
                raise
            # The file was here before and nothing says that it has changed.
        self._shelf.write_note(key, asdict(entry))
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
                    if answer.status_code == 416 or not _continues(answer, partial):
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
        raise UnsuitableFile("could not be downloaded: its server contradicts itself about what it has")

    def _receive(self, answer: Answer, partial: Path, wanted: _Wanted) -> None:
        """Write what arrives, after what is there if the answer is its continuation."""
        if answer.headers.get("content-encoding", "").strip().lower() not in ("", "identity"):
            raise UnsuitableFile("came compressed for the way, which files of weights must not")
        received = _size(partial) if answer.status_code == 206 else 0
        total = int(announced) if (announced := answer.headers.get("content-length", "")).isdecimal() else 0
        if total + received > self._max_bytes:
            raise FileTooLarge(self._max_bytes)
        self._shelf.make_room(total)
        room = total
        partial.with_suffix(".json").write_text(json.dumps({"validator": _validator_of(answer)}))
        with partial.open("ab" if received else "wb") as file:
            for chunk in answer.iter_raw():
                wanted.poll()
                head = chunk[:SNIFF_BYTES] if received == 0 else b""
                if len(head) == SNIFF_BYTES and not (self._convert is not None and is_pickle(head)):
                    wanted.sniff(head)
                received, room = received + len(chunk), room - len(chunk)
                if received > self._max_bytes:
                    raise FileTooLarge(self._max_bytes)
                if room < 0:
                    self._shelf.make_room(ROOM_BYTES)
                    room = ROOM_BYTES
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
        sha256 = _digest(partial, wanted.poll)
        self._shelf.add(partial, sha256)
        _forget(partial)
        self._shelf.tidy()
        return replace(entry, sha256=sha256)

    def _entry(self, key: str) -> _Entry | None:
        try:
            entry = _Entry(**self._shelf.note(key))
        except TypeError:
            return None
        return entry if self._shelf.blob(entry.sha256).is_file() else None


def _headers(partial: Path, entry: _Entry | None) -> dict[str, str]:
    """What to ask for: the rest of a download that broke off, else the file unless it is the one we have."""
    headers = {"accept": "*/*", "accept-encoding": "identity"}
    validator = _validator_of_partial(partial)
    if _size(partial) and validator:
        return headers | {"range": f"bytes={_size(partial)}-", "if-range": validator}
    if entry is not None and entry.etag:
        return headers | {"if-none-match": entry.etag}
    if entry is not None and entry.modified:
        return headers | {"if-modified-since": entry.modified}
    return headers


def _continues(answer: Answer, partial: Path) -> bool:
    """Whether an answer can be used: one that is a part must go on where we are, in the file that we have begun."""
    if answer.status_code != 206:
        return True
    begins_here = re.match(rf"bytes {_size(partial)}-", answer.headers.get("content-range", ""))
    return begins_here is not None and _validator_of(answer) in ("", _validator_of_partial(partial))


def _validator_of(answer: Answer) -> str:
    """What stands for the exact bytes of an answer."""
    etag = answer.headers.get("etag", "")
    return answer.headers.get("last-modified", "") if not etag or etag.startswith("W/") else etag


def _validator_of_partial(partial: Path) -> str:
    return str(read_note(partial.with_suffix(".json")).get("validator", ""))


def _digest(path: Path, poll: Poll) -> str:
    """The SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(HASH_BYTES):
            poll()
            digest.update(chunk)
    return digest.hexdigest()


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


def _forget(partial: Path) -> None:
    partial.unlink(missing_ok=True)
    partial.with_suffix(".json").unlink(missing_ok=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
