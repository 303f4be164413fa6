"""Stored files over HTTP."""

from __future__ import annotations

import asyncio

import pytest
from starlette.testclient import TestClient

from server.settings import Settings
from server.storage import Storage

KEY = "out/ab/0123456789_owl.png"
DATA = bytes(range(256)) * 2048


@pytest.fixture
def stored(app_settings: Settings) -> str:
    """A stored file's path on the server."""
    asyncio.run(Storage.open(app_settings).put_bytes(KEY, DATA))
    return f"/files/{KEY}"


def test_a_file_is_read_by_anybody_from_anywhere(client: TestClient, stored: str) -> None:
    """No key, any origin, right type and length; HEAD says the same without the bytes."""
    got, headed = client.get(stored), client.head(stored)

    assert got.content == DATA and headed.content == b""
    for answer in (got, headed):
        assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
        assert answer.headers["content-length"] == str(len(DATA)) and answer.headers["accept-ranges"] == "bytes"
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [("bytes=0-0", 0, 1), ("bytes=100-199", 100, 200), ("bytes=524000-", 524000, 524288), ("bytes=-5", 524283, 524288)],
)
def test_a_part_is_read_by_range(client: TestClient, stored: str, asked: str, start: int, end: int) -> None:
    """206 with exactly the bytes that were asked for."""
    answer = client.get(stored, headers={"range": asked})

    assert answer.status_code == 206 and answer.content == DATA[start:end]
    assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{len(DATA)}"
    assert client.head(stored, headers={"range": asked}).headers["content-length"] == str(end - start)


@pytest.mark.parametrize("asked", ["bytes=5-1", "bytes=a-b", "lines=1-2", "bytes=1-2,5-6", "bytes=-"])
def test_ranges_that_make_no_sense_are_ignored(client: TestClient, stored: str, asked: str) -> None:
    """The whole file is always a right answer."""
    assert client.get(stored, headers={"range": asked}).status_code == 200


def test_a_range_behind_the_end_is_refused(client: TestClient, stored: str) -> None:
    """416 tells how long the file is."""
    answer = client.get(stored, headers={"range": "bytes=524288-"})

    assert answer.status_code == 416 and answer.headers["content-range"] == "bytes */524288"


def test_a_known_file_is_not_sent_again(client: TestClient, stored: str) -> None:
    """Entity tags work for caches and for resumed downloads."""
    etag = client.get(stored).headers["etag"]

    assert client.get(stored, headers={"if-none-match": etag}).status_code == 304
    assert client.get(stored, headers={"range": "bytes=0-1", "if-range": etag}).status_code == 206
    assert client.get(stored, headers={"range": "bytes=0-1", "if-range": '"other"'}).status_code == 200
