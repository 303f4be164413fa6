"""Files that callers send, in one piece or in parts that arrive in any order."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import structlog

from server.errors import BadRequest, BodyTooLarge
from server.ledger import Blob, Ledger
from server.storage import Storage, StorageUnavailable, content_type_of, suffix_of, upload_key

HOLDER = "upload"
WRITE_BYTES = 2**20
MAX_PARTS = 10_000
ABANDONED_S = 86400.0
SWEEP_S = 3600.0
UPLOAD_ID = re.compile(r"[A-Za-z0-9_-]{16,64}", re.ASCII)

log = structlog.get_logger()


def place_upload(file_name: str, content_type: str) -> str:
    """A new key for an upload, whose name tells its media type if there is a name's ending for it."""
    key = upload_key(file_name or "upload.bin")
    kind = content_type.split(";")[0].strip().lower()
    if kind and content_type_of(key) != kind:
        key += suffix_of(kind)
    return key


def new_upload_id() -> str:
    """A name for the parts of one upload."""
    return secrets.token_urlsafe(24)


class Uploads:
    """Takes bytes in, keeps parts on the local disk until the last one is there, and hands files to the store."""

    def __init__(self, folder: Path, storage: Storage, ledger: Ledger, *, max_bytes: int) -> None:
        self._folder, self._storage, self._ledger, self._max_bytes = folder, storage, ledger, max_bytes

    async def store(self, key: str, chunks: AsyncIterator[bytes], *, expires_s: float) -> None:
        """Store an upload in one piece.

        Raises:
            BodyTooLarge: It has more bytes than allowed; nothing is kept.
        """
        with self._draft() as draft:
            await self._write(draft, chunks)
            await self._keep(key, draft, expires_s)

    async def store_part(self, upload_id: str, number: int, chunks: AsyncIterator[bytes]) -> str:
        """Keep one part, replacing an earlier one of the same number; returns its entity tag.

        Raises:
            BadRequest: There is no such upload or number.
            BodyTooLarge: The part alone has more bytes than a file may have.
        """
        if not UPLOAD_ID.fullmatch(upload_id) or not 1 <= number <= MAX_PARTS:
            raise BadRequest(f"Part {number} of this upload cannot exist")
        with self._draft() as draft:
            etag = await self._write(draft, chunks)
            parts = self._folder / upload_id
            parts.mkdir(mode=0o700, exist_ok=True)
            if sum(part.stat().st_size for part in parts.iterdir()) + draft.stat().st_size > 2 * self._max_bytes:
                raise BodyTooLarge(self._max_bytes)
            draft.rename(parts / f"{number}.{etag}")
        return etag

    async def complete(self, key: str, upload_id: str, parts: Sequence[Any], *, expires_s: float) -> None:
        """Join the parts in the order of their numbers and store the file.

        Raises:
            BadRequest: The list is not one of parts that are here.
            BodyTooLarge: Together they have more bytes than a file may have.
        """
        if not UPLOAD_ID.fullmatch(upload_id):
            raise BadRequest("There is no such upload")
        paths = [self._folder / upload_id / name for name in part_names(parts)]
        if not paths or not all(path.is_file() for path in paths):
            raise BadRequest("The list of parts is empty or names a part that was not uploaded")
        if sum(path.stat().st_size for path in paths) > self._max_bytes:
            raise BodyTooLarge(self._max_bytes)
        with self._draft() as draft:
            await asyncio.to_thread(_join, paths, draft)
            await self._keep(key, draft, expires_s)
        await asyncio.to_thread(shutil.rmtree, self._folder / upload_id, True)

    def sweep(self) -> None:
        """Remove what was begun and never completed."""
        if not self._folder.is_dir():
            return
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > ABANDONED_S:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    async def sweep_in_time(self) -> None:
        """Sweep every hour until cancelled."""
        while True:
            try:
                await asyncio.to_thread(self.sweep)
            except OSError:
                log.exception("upload_sweep_failed")
            await asyncio.sleep(SWEEP_S)

    async def _keep(self, key: str, draft: Path, expires_s: float) -> None:
        # Held before it is stored, so that no file is there of which the sweep does not know.
        await self._ledger.hold_blob(Blob(key, HOLDER, time.time() + expires_s))
        await self._storage.put_file(key, draft)

    async def _write(self, draft: Path, chunks: AsyncIterator[bytes]) -> str:
        digest, size = hashlib.sha256(), 0
        with draft.open("wb") as file:
            async for block in _gathered(chunks):
                size += len(block)
                if size > self._max_bytes:
                    raise BodyTooLarge(self._max_bytes)
                await asyncio.to_thread(_write_block, file, block, digest)
        return digest.hexdigest()[:32]

    @contextlib.contextmanager
    def _draft(self) -> Iterator[Path]:
        draft = self._folder / f"draft-{secrets.token_hex(8)}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            yield draft
        except OSError as error:
            raise StorageUnavailable(str(error)) from error
        finally:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)


def part_names(parts: Sequence[Any]) -> list[str]:
    """The file names of listed parts, in order of their numbers; clients list them in any order and spelling.

    Raises:
        BadRequest: An entry is not a part.
    """
    numbered: dict[int, str] = {}
    for part in parts:
        number, etag = _field(part, "partNumber", "part_number"), _field(part, "etag", "ETag")
        if isinstance(number, bool) or not isinstance(number, int) or not isinstance(etag, str):
            raise BadRequest('Expected {"parts": [{"partNumber": number, "etag": text}, ...]}')
        tag = etag.strip().removeprefix("W/").strip('"')
        if not re.fullmatch(r"[0-9a-f]{32}", tag):
            raise BadRequest(f"Part {number} was not uploaded")
        numbered[number] = f"{number}.{tag}"
    return [numbered[number] for number in sorted(numbered)]


def _field(part: Any, *names: str) -> Any:
    if not isinstance(part, Mapping):
        return None
    return next((part[name] for name in names if name in part), None)


async def _gathered(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Larger blocks of the same bytes: a thread is asked once per mebibyte, not once per packet."""
    block = bytearray()
    async for chunk in chunks:
        block += chunk
        if len(block) >= WRITE_BYTES:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


def _write_block(file: BinaryIO, block: bytes, digest: Any) -> None:
    digest.update(block)
    file.write(block)


def _join(paths: Sequence[Path], target: Path) -> None:
    with target.open("wb") as whole:
        for path in paths:
            with path.open("rb") as part:
                shutil.copyfileobj(part, whole, WRITE_BYTES)
