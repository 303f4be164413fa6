"""The BigTIFF that is written is the picture, for a reader that is not ours."""

from __future__ import annotations

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from pipelines.tiff import BigTiffWriter


@pytest.mark.parametrize(("mode", "size"), [("RGB", (37, 300)), ("RGBA", (5, 128)), ("RGB", (1, 1))])
def test_pillow_reads_what_was_written(mode: str, size: tuple[int, int]) -> None:
    """Rows in bands of any height come back bit by bit, with text and profile."""
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    stream = BytesIO()
    with BigTiffWriter(stream, width, height, mode=mode, icc_profile=b"profile", text={"recipe": '{"a": "é"}'}) as tiff:
        for top in range(0, height, 50):
            tiff.write(pixels[top : top + 50])

    picture = Image.open(BytesIO(stream.getvalue()))

    assert stream.getvalue()[:4] == b"II+\0"
    assert (picture.mode, picture.size) == (mode, size)
    assert np.array_equal(np.asarray(picture), pixels)
    assert picture.info["icc_profile"] == b"profile"
    assert "recipe" in picture.tag_v2[270]


def test_rows_are_counted() -> None:
    """Missing rows, too many and wrong ones are errors."""
    with pytest.raises(ValueError, match="Expected 4 rows; got 0"):
        BigTiffWriter(BytesIO(), 3, 4).close()
    with pytest.raises(ValueError, match="Expected 4 rows; got 5"):
        BigTiffWriter(BytesIO(), 3, 4).write(np.zeros((5, 3, 3), np.uint8))
    with pytest.raises(ValueError, match="rows of 3 px"):
        BigTiffWriter(BytesIO(), 3, 4).write(np.zeros((1, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="RGB or RGBA"):
        BigTiffWriter(BytesIO(), 3, 4, mode="L")
