"""The safety checker sees the whole picture that goes out, however often it is decoded."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines import guard
from pipelines.delivery import write_picture
from pipelines.errors import NonFiniteResult
from pipelines.guard import Lookout, deliver_checked
from pipelines.images import decode
from pipelines.progress import Stages
from tests.conftest import png_bytes


class Vae:
    """What decides whether a decode is repeated."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def in_float32(self) -> Vae:
        return Vae(torch.float32)


class Watcher:
    """A safety checker that keeps what it was shown."""

    def is_unsafe(self, image: Image.Image) -> bool:
        self.shown = np.asarray(image)
        return False


def test_a_decode_that_is_repeated_is_seen_from_the_top() -> None:
    """Rows of a decode that overflowed half-way are forgotten: what is checked is what is sent."""
    picture = decode(png_bytes(Image.new("RGB", (8, 8))), max_pixels=100)
    rows = torch.linspace(0, 1, 8)[None, None, :, None].expand(1, 3, 8, 8)

    def bands(vae: Any) -> Iterator[Tensor]:
        yield rows[..., :3, :]
        if vae.dtype != torch.float32:
            raise NonFiniteResult
        yield rows[..., 3:, :]

    watcher, output = Watcher(), BytesIO()
    vae: Any = Vae(torch.bfloat16)
    checker: Any = watcher
    recipe = {"output": {"width": 8, "height": 8}}
    deliver_checked(bands, vae, picture, recipe, output, Stages(lambda report: None), checker)

    assert np.array_equal(watcher.shown, np.asarray(Image.open(BytesIO(output.getvalue()))))


@pytest.mark.parametrize("size", [(64, 48), (2000, 1900)])
def test_what_is_looked_at_is_the_picture_made_smaller(size: tuple[int, int]) -> None:
    """Bands of any height become blocks averaged over the whole picture."""
    width, height = size
    picture = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    lookout = Lookout(width, height)
    for top in range(0, height, 37):
        lookout(picture[top : top + 37])

    side = lookout.factor
    wanted = picture.reshape(height // side, side, width // side, side, 3).mean(axis=(1, 3))
    assert side == max(1, min(size) // guard.LOOKOUT_SIDE_PX)
    assert np.abs(np.asarray(lookout.picture()) - wanted).max() <= 0.5


def test_black_pictures_are_black_to_the_last_row() -> None:
    """More rows than one band has."""
    picture = decode(png_bytes(Image.new("RGB", (8, 8))), max_pixels=100)
    output = BytesIO()

    write_picture(guard._black(4, 700), picture, {"output": {"width": 4, "height": 700}}, output)

    black = Image.open(output)
    assert black.size == (4, 700) and black.getextrema() == ((0, 0),) * 3
