"""PNG files written band by band decode to exactly the pixels that went in."""

from __future__ import annotations

import io
import itertools
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipelines.images import decode, restore_profile
from pipelines.png import PngWriter
from tests.pipelines.icc import display_p3


def encode(pixels: np.ndarray, cuts: list[int], **options: object) -> bytes:
    """Write an array in bands that begin at `cuts`."""
    stream = io.BytesIO()
    height, width, channels = pixels.shape
    with PngWriter(stream, width, height, mode="RGB" if channels == 3 else "RGBA", **options) as png:  # type: ignore[arg-type]
        for top, bottom in itertools.pairwise([0, *cuts, height]):
            png.write(pixels[top:bottom])
    return stream.getvalue()


def chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Split a PNG into its chunks, checking every checksum."""
    found, place = [], 8
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        body = data[place + 8 : place + 8 + length]
        assert struct.unpack_from(">I", data, place + 8 + length)[0] == zlib.crc32(kind + body)
        found.append((kind, body))
        place += 12 + length
    return found


@given(
    width=st.integers(1, 70),
    height=st.integers(1, 300),
    channels=st.sampled_from([3, 4]),
    level=st.integers(0, 3),
    data=st.data(),
)
def test_decodes_bit_exact(width: int, height: int, channels: int, level: int, data: st.DataObject) -> None:
    """Any size, either mode, any way to cut it into bands, any level: Pillow reads back the same pixels."""
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, channels), dtype=np.uint8)
    cuts = sorted(data.draw(st.sets(st.integers(1, height), max_size=5)) - {height})

    picture = Image.open(io.BytesIO(encode(pixels, cuts, level=level)))

    assert picture.mode == ("RGB" if channels == 3 else "RGBA")
    assert np.array_equal(np.asarray(picture), pixels)


def test_bands_of_one_row_give_the_same_pixels_as_one_band() -> None:
    """The filter carries over from band to band."""
    pixels = np.asarray(Image.radial_gradient("L").convert("RGB"))

    rows = Image.open(io.BytesIO(encode(pixels, list(range(1, len(pixels))))))

    assert np.array_equal(np.asarray(rows), pixels)


def test_views_that_are_not_contiguous_are_written_too() -> None:
    """A crop or a mirrored view needs no copy by the caller."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)[::-1, 5:45]

    assert np.array_equal(np.asarray(Image.open(io.BytesIO(encode(pixels, [7])))), pixels)


def test_same_pixels_give_the_same_bytes() -> None:
    """Nothing in the file depends on when it was written."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 20, 3), dtype=np.uint8)

    assert encode(pixels, [3], text={"a": "b"}) == encode(pixels, [3], text={"a": "b"})


def test_text_and_profile_come_back() -> None:
    """Unicode text and the colour profile are read back unchanged, before the pixels, with valid checksums."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    text = {"recipe": '{"prompt": "Käse, 猫 🐈"}', "Software": "x" * 5000, "empty": ""}

    data = encode(np.zeros((3, 4, 3), dtype=np.uint8), [], icc_profile=profile, text=text)

    picture = Image.open(io.BytesIO(data))
    assert picture.info["icc_profile"] == profile
    assert picture.text == text
    kinds = [kind for kind, _ in chunks(data)]
    assert kinds == [b"IHDR", b"iCCP", b"iTXt", b"iTXt", b"iTXt", b"IDAT", b"IEND"]


def test_a_picture_survives_the_way_through_with_everything_it_carries() -> None:
    """Decoded, converted back and written, a transparent Display P3 picture is what it was, profile included."""
    original = Image.merge("RGBA", [Image.linear_gradient("L").point(lambda v, k=k: 80 + v // k) for k in (2, 3, 4, 1)])
    stream = io.BytesIO()
    original.save(stream, "PNG", icc_profile=display_p3())
    picture = decode(stream.getvalue(), max_pixels=10**6)
    assert picture.alpha is not None

    bands = np.dstack([restore_profile(picture.rgb, picture.icc_profile), picture.alpha])
    written = Image.open(io.BytesIO(encode(bands, [100, 101], icc_profile=picture.icc_profile)))

    assert written.info["icc_profile"] == display_p3()
    assert np.array_equal(np.asarray(written)[..., 3], np.asarray(original)[..., 3])
    assert np.abs(np.asarray(written).astype(int) - np.asarray(original)).max() <= 2


def test_a_flat_picture_is_small() -> None:
    """Equal rows filter to zeros."""
    assert len(encode(np.full((1000, 1000, 3), 77, dtype=np.uint8), [])) < 40_000


def test_wrong_rows_are_refused() -> None:
    """Rows of another type or width, too many and too few, raise; the message says what was expected."""
    png = PngWriter(io.BytesIO(), 4, 3)
    with pytest.raises(ValueError, match=r"uint8 rows of shape \(rows, 4, 3\); got float32"):
        png.write(np.zeros((1, 4, 3), dtype=np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape"):
        png.write(np.zeros((1, 4, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match="at most 3 more rows; got 4"):
        png.write(np.zeros((4, 4, 3), dtype=np.uint8))
    png.write(np.zeros((2, 4, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="Expected 3 rows; got 2"):
        png.close()


def test_what_a_png_cannot_hold_is_refused() -> None:
    """Sizes, modes and keywords outside the format raise before a byte of pixels is written."""
    with pytest.raises(ValueError, match="0 x 3"):
        PngWriter(io.BytesIO(), 0, 3)
    with pytest.raises(ValueError, match="CMYK"):
        PngWriter(io.BytesIO(), 1, 1, mode="CMYK")
    for keyword in ("", "x" * 80, "two  spaces", " outer", "猫", "line\nbreak"):
        with pytest.raises(ValueError, match="keyword"):
            PngWriter(io.BytesIO(), 1, 1, text={keyword: "x"})


def test_an_error_leaves_the_file_unfinished() -> None:
    """An exception inside the context passes through, and no end marker pretends that the file is whole."""
    stream = io.BytesIO()

    with pytest.raises(RuntimeError, match="stop"), PngWriter(stream, 4, 4):
        raise RuntimeError("stop")

    assert b"IEND" not in stream.getvalue()
