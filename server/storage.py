"""The blob store: keys to bytes, in a local folder or in a bucket; nothing else of the server knows which.

Keys: `in/<sha256>` for inputs, named by their content; `out/<2 hex>/<random>_<name>` for results and
`up/<2 hex>/<random>_<name>` for uploads, whose random part is what protects them: who knows it may read the file.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import mimetypes
import os
import re
import secrets
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from obstore.exceptions import BaseError as ObstoreError
from obstore.store import LocalStore, ObjectStore, from_url

from server.settings import Settings

KEY = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9_.-]{0,150}/){0,6}[A-Za-z0-9_-][A-Za-z0-9_.-]{0,150}", re.ASCII)
"""No segment starts with a dot, so that no key leads out of the store or to a temporary file."""

PUBLIC = ("out/", "up/")
"""Keys that are served to whoever knows them."""

OUTPUT_SUFFIXES = {"image/png": ".png", "image/tiff": ".tif"}
"""What the files that are made end in, by content type."""

CHUNK_BYTES = 2**20  # what is read at once; each chunk costs a change of threads
MAX_NAME = 80
TOKEN_BYTES = 15
TOKEN_LETTERS = TOKEN_BYTES * 4 // 3
# What pictures are called; the system's own table differs from machine to machine.
CONTENT_TYPES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".webp": "image/webp",
    ".gif": "image/gif",
    ".bmp": "image/bmp",
    ".tif": "image/tiff",
    ".tiff": "image/tiff",
    ".avif": "image/avif",
    ".heic": "image/heic",
    ".txt": "text/plain",
    ".json": "application/json",
    ".safetensors": "application/octet-stream",
}


class StorageUnavailable(Exception):
    """The store cannot take a file at the moment: no room, no permission, no connection."""


class InvalidKey(ValueError):
    """The text is not a key of this store."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A stored file."""

    key: str
    size_bytes: int
    modified: datetime
    etag: str

    @property
    def content_type(self) -> str:
        """The media type that its name tells."""
        return content_type_of(self.key)


def content_type_of(name: str) -> str:
    """The media type that a file's name tells, `application/octet-stream` when it tells none."""
    suffix = os.path.splitext(name)[1].lower()
    return CONTENT_TYPES.get(suffix) or mimetypes.guess_type(name)[0] or "application/octet-stream"


def suffix_of(content_type: str) -> str:
    """The file name's ending for a media type; empty when none is known."""
    kind = content_type.split(";")[0].strip().lower()
    known = {value: key for key, value in reversed(CONTENT_TYPES.items())}
    if kind == "application/octet-stream":
        return ""
    return known.get(kind) or mimetypes.guess_extension(kind) or ""


def safe_name(name: str) -> str:
    """A file name reduced to letters, digits, `_`, `-` and inner dots, its ending kept; never empty."""
    stem, suffix = os.path.splitext(re.split(r"[/\\]", name)[-1])
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", stem).strip("-")[:MAX_NAME] or "file"
    suffix = re.sub(r"[^A-Za-z0-9.]+", "", suffix)[:16]
    return stem + (suffix if len(suffix) > 1 else "")


def input_key(data: bytes) -> str:
    """The key of an input: the same bytes are stored once."""
    return f"in/{hashlib.sha256(data).hexdigest()}"


def output_key(request_id: str, token: str, suffix: str = ".png") -> str:
    """The key of the picture that an attempt makes; its secret is the attempt's.

    The dispatcher knows it as well, and can delete what an attempt stored that died before it could say so.
    """
    return _secret_key("out", hashlib.sha256(token.encode()).digest(), f"{request_id}{suffix}")


def upload_key(name: str) -> str:
    """A new key for an upload with this file name."""
    return _secret_key("up", secrets.token_bytes(1 + TOKEN_BYTES), name)


def _secret_key(kind: str, secret: bytes, name: str) -> str:
    token = base64.urlsafe_b64encode(secret[1 : 1 + TOKEN_BYTES]).decode()
    return f"{kind}/{secret[:1].hex()}/{token}_{safe_name(name)}"


def file_name_of(key: str) -> str:
    """The name with which a file was uploaded or made."""
    name = key.rpartition("/")[2]
    return name[TOKEN_LETTERS + 1 :] if key.startswith(PUBLIC) else name


def is_key(text: str) -> bool:
    """Whether a text can be a key."""
    return KEY.fullmatch(text) is not None


def is_public(key: str) -> bool:
    """Whether the file of this key is served by URL."""
    return key.startswith(PUBLIC) and is_key(key)


class Storage:
    """Files by key. A write is complete or absent, and on the disk when the call returns."""

    def __init__(self, store: ObjectStore, root: Path | None = None) -> None:
        self._store, self._root = store, root

    @classmethod
    def open(cls, settings: Settings) -> Storage:
        """The store of the settings: `storage_url`, else the files folder."""
        if settings.storage_url:
            return cls(from_url(settings.storage_url))
        settings.make_folders()
        return cls(LocalStore(settings.files_dir, mkdir=True, automatic_cleanup=False), settings.files_dir)

    async def put_bytes(self, key: str, data: bytes) -> None:
        """Store these bytes; raises StorageUnavailable."""
        await asyncio.to_thread(self._put, _checked(key), data)

    async def put_file(self, key: str, path: Path) -> None:
        """Store a copy of a file; raises StorageUnavailable."""
        await asyncio.to_thread(self._put, _checked(key), path)

    async def head(self, key: str) -> Found | None:
        """What is known of a file; None when there is none, or when the text cannot be a key."""
        if not is_key(key):
            return None
        try:
            return _found(key, await self._store.head_async(key))
        except FileNotFoundError:
            return None

    async def stream(self, key: str, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The bytes from `start` up to, not including, `end`.

        Raises:
            FileNotFoundError: There is no such file.
        """
        options: dict[str, Any] = {} if start == 0 and end is None else {"range": (start, end)}
        if options and end is None:
            options = {"range": {"offset": start}}
        result = await self._store.get_async(_checked(key), options=options or None)  # type: ignore[arg-type]  # a typed dictionary there
        async for chunk in result.stream(min_chunk_size=CHUNK_BYTES):
            yield bytes(chunk)

    async def delete(self, key: str) -> None:
        """Remove a file; one that is not there is removed already."""
        if is_key(key):
            try:
                await self._store.delete_async(key)
            except FileNotFoundError:
                return

    def read(self, key: str) -> bytes:
        """All bytes of a file, on the calling thread; raises FileNotFoundError."""
        return bytes(self._store.get(_checked(key)).bytes())

    def chunks(self, key: str) -> tuple[int, Iterator[bytes]]:
        """Size and chunks of a file, on the calling thread; raises FileNotFoundError."""
        found = self._store.get(_checked(key))
        return found.meta["size"], (bytes(chunk) for chunk in found.stream(min_chunk_size=CHUNK_BYTES))

    def write_file(self, key: str, path: Path) -> None:
        """Store a copy of a file, on the calling thread."""
        self._put(_checked(key), path)

    def _put(self, key: str, source: bytes | Path) -> None:
        try:
            self._store.put(key, source)
            if self._root is not None:
                # A request is recorded as done after this call: its file must survive what the record survives.
                _flush(self._root / key)
                _flush((self._root / key).parent)
        except (OSError, ObstoreError) as error:
            raise StorageUnavailable(str(error)) from error


def _checked(key: str) -> str:
    if not is_key(key):
        raise InvalidKey(f"{key[:100]!r} is not a key of the blob store")
    return key


def _found(key: str, meta: Any) -> Found:
    return Found(
        key=key, size_bytes=meta["size"], modified=meta["last_modified"], etag=(meta["e_tag"] or "").strip('"')
    )


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
