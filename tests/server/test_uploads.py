"""What uploads leave behind, and what is told when there is no room for them."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server import uploads
from server.app import create_app
from server.ledger import Ledger
from server.settings import Settings
from server.storage import Storage
from server.uploads import ABANDONED_S, Uploads


def no_room(*args: Any, **kwargs: Any) -> Any:
    """A call of the system that finds the disk full."""
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["mkdir", "open", "rename", "_write_block", "_join"])
def test_a_full_disk_is_said_to_be_for_a_while(client: TestClient, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """503 with the time to come back, whichever step finds no room, and nothing is left there."""
    begun = client.post("/files/upload/multipart").json()
    url = f"{begun['access_url']}/multipart/{begun['uploadId']}"
    put = [lambda: client.put(f"{url}/1", content=b"data"), lambda: client.post("/files/upload", content=b"data")]
    if step == "_join":
        etag = put.pop(0)().headers["etag"]
        put = [lambda: client.post(f"{url}/complete", json={"parts": [{"partNumber": 1, "etag": etag}]})]
    if step == "rename":
        put.pop()

    with monkeypatch.context() as patch:
        patch.setattr(uploads if step.startswith("_") else Path, step, no_room)
        answers = [call() for call in put]

    assert [(answer.status_code, answer.headers["retry-after"]) for answer in answers] == [(503, "5")] * len(put)
    assert client.post("/files/upload", content=b"data").status_code == 200


def test_what_was_begun_and_left_is_swept_without_a_next_upload(app_settings: Settings) -> None:
    """A server that starts, and every hour after, removes old drafts and parts; young ones stay."""
    folder, old = app_settings.uploads_dir, time.time() - ABANDONED_S - 1
    (folder / "parts").mkdir(parents=True)
    for name in ("draft-old", "draft-young", "parts/1.x"):
        (folder / name).write_bytes(b"x")
    for name in ("draft-old", "parts"):
        os.utime(folder / name, (old, old))

    with TestClient(create_app(app_settings)):
        wait_until(lambda: len(list(folder.iterdir())) == 1)

    assert [path.name for path in folder.iterdir()] == ["draft-young"]


def test_an_upload_is_known_to_the_sweep_before_it_is_stored(settings: Settings, ledger: Ledger) -> None:
    """A server that dies in between leaves no file that nobody would ever delete."""

    class DyingStorage(Storage):
        async def put_file(self, key: str, path: Path) -> None:
            await super().put_file(key, path)
            raise SystemError("killed")

    async def chunks() -> AsyncIterator[bytes]:
        yield b"data"

    async def story() -> list[str]:
        whole = Storage.open(settings)
        taking = Uploads(settings.uploads_dir, DyingStorage(whole._store), ledger, max_bytes=100)
        with pytest.raises(SystemError):
            await taking.store("up/ab/x", chunks(), expires_s=60.0)
        assert await whole.head("up/ab/x") is not None
        return await ledger.sweep(time.time() + 90)

    assert asyncio.run(story()) == ["up/ab/x"]


def wait_until(is_so: Callable[[], bool]) -> None:
    """Wait up to 5 s for something to become true."""
    deadline = time.monotonic() + 5
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)
