"""Fixtures that several packages use: the built-in weights and pictures nobody trained on."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import pytest
import torch
from PIL import Image

from weights.store import WeightStore, open_store

PHOTOS = Path(__file__).parent / "photos"
HELD_OUT = ("clinic", "shuttle", "ceiling")
"""Photographs that no part of the pocket weights was trained on."""


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    """Every test starts from the same random numbers, on one thread: tests of several processes share two cores."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield


@pytest.fixture(scope="session")
def pocket() -> WeightStore:
    """The built-in weights."""
    return open_store("pocket", root=Path("unused"), has_cuda=False)


@pytest.fixture(scope="session")
def photo_crop() -> Image.Image:
    """A 128 x 96 px piece of a photograph with faces and cloth."""
    with Image.open(PHOTOS / "clinic.png") as image:
        return image.convert("RGB").crop((420, 200, 548, 296))


def png_bytes(image: Image.Image) -> bytes:
    """The picture as an encoded PNG."""
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
