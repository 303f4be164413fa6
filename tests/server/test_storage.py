"""Files by key: whole, in parts, and never outside of the store."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from obstore.store import MemoryStore

from server.settings import Settings
from server.storage import (
    InvalidKey,
    Storage,
    StorageUnavailable,
    input_key,
    is_public,
    output_key,
    safe_name,
    suffix_of,
    upload_key,
)


async def read(storage: Storage, key: str, start: int = 0, end: int | None = None) -> bytes:
    """The bytes that a stream gives."""
    return b"".join([chunk async for chunk in storage.stream(key, start, end)])


@pytest.mark.parametrize("kind", ["folder", "bucket"])
def test_bytes_come_back_whole_and_in_parts(settings: Settings, kind: str) -> None:
    """What was stored is read again, from any byte to any byte, whatever the store."""
    storage = Storage.open(settings) if kind == "folder" else Storage(MemoryStore())
    data = bytes(range(256)) * 4096

    async def story() -> list[bytes]:
        await storage.put_bytes("out/ab/x.png", data)
        return [
            await read(storage, "out/ab/x.png"),
            await read(storage, "out/ab/x.png", 1000),
            await read(storage, "out/ab/x.png", 5, 9),
        ]

    assert asyncio.run(story()) == [data, data[1000:], data[5:9]]
    assert storage.read("out/ab/x.png") == data


def test_files_are_described_and_deleted(settings: Settings, tmp_path: Path) -> None:
    """Size and media type are known of a stored file, and nothing once it is gone."""
    storage, path = Storage.open(settings), tmp_path / "draft"
    path.write_bytes(b"12345")

    async def story() -> tuple[object, ...]:
        storage.write_file("out/ab/x.webp", path)
        found = await storage.head("out/ab/x.webp")
        await storage.delete("out/ab/x.webp")
        await storage.delete("out/ab/x.webp")
        assert found is not None and found.etag
        return found.size_bytes, found.content_type, await storage.head("out/ab/x.webp")

    assert asyncio.run(story()) == (5, "image/webp", None)


def test_a_store_without_room_says_so(settings: Settings) -> None:
    """Callers learn that it is for now, not their fault."""
    storage = Storage.open(settings)
    (settings.files_dir / "out").write_text("in the way")

    with pytest.raises(StorageUnavailable):
        asyncio.run(storage.put_bytes("out/ab/x.png", b"x"))


@pytest.mark.parametrize(
    "key",
    [
        "../x",
        "out/../../x",
        "/etc/passwd",
        "out//x",
        "out/.hidden",
        "",
        "out/a\0b",
        "out/a b",
        "out\\x",
        "~/x",
        "a/" * 20,
    ],
)
def test_no_key_leads_out_of_the_store(settings: Settings, key: str) -> None:
    """Whatever is not a plain key is not found, and cannot be written."""
    storage = Storage.open(settings)

    assert asyncio.run(storage.head(key)) is None
    with pytest.raises(InvalidKey):
        storage.read(key)
    with pytest.raises(InvalidKey):
        asyncio.run(storage.put_bytes(key, b"x"))


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("owl.png", "owl.png"),
        ("../../etc/passwd", "passwd"),
        ("C:\\pictures\\my owl.JPG", "my-owl.JPG"),
        ("", "file"),
        (".png", "png"),
        ("…", "file"),
        ("a" * 300 + ".png", "a" * 80 + ".png"),
        ("tar.gz", "tar.gz"),
    ],
)
def test_file_names_are_made_safe(name: str, safe: str) -> None:
    """A caller's file name keeps what is harmless of it, ending included."""
    assert safe_name(name) == safe


def test_keys_cannot_be_guessed_and_inputs_are_private() -> None:
    """Results and uploads are served to whoever knows the key; inputs never."""
    keys = {output_key("x", str(n)) for n in range(50)} | {upload_key("x.png") for _ in range(50)}

    assert len(keys) == 100 and all(is_public(key) for key in keys)
    assert not is_public(input_key(b"x")) and not is_public("out/../in/x")


def test_media_types_have_endings() -> None:
    """An upload that only tells its type gets a name that tells it, too."""
    assert [suffix_of(kind) for kind in ("image/png", "image/jpeg", "IMAGE/WEBP; q=1", "application/octet-stream")] == [
        ".png",
        ".jpg",
        ".webp",
        "",
    ]
