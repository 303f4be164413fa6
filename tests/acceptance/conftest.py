"""Live servers for real clients: one for what does no harm, one for what does."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.acceptance.live import FAKE, REAL, LiveServer

PHOTO = Path(__file__).parents[1] / "photos" / "clinic.png"


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server that every test leaves as it found it; it fetches from this machine."""
    server = LiveServer(tmp_path_factory.mktemp("live") / "data", REAL, UPSCALER_FETCH_ALLOW_HOSTS="127.0.0.1")
    server.start()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="session")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server whose pipeline takes 50 ms per step, whatever the machine: for tests of the wire and of its timing."""
    server = LiveServer(tmp_path_factory.mktemp("paced") / "data", FAKE, FAKE_STEP_S="0.05")
    server.start()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A piece of a photograph, 64 x 48 px, as PNG."""
    with Image.open(PHOTO) as photo:
        piece = photo.convert("RGB").crop((420, 200, 484, 248))
    file = io.BytesIO()
    piece.save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def arguments(picture: bytes) -> Callable[..., dict[str, Any]]:
    """The input of a request that is quickly done; keywords change it."""
    image_url = f"data:image/png;base64,{base64.b64encode(picture).decode()}"

    def make(**changes: Any) -> dict[str, Any]:
        return {"image_url": image_url, "prompt": "people", "seed": 1, "num_inference_steps": 4} | changes

    return make
