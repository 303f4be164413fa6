"""Real files of every kind, whole and damaged, decode to the right pixels or to a clear error."""

from __future__ import annotations

import io
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from pipelines.errors import ImageLoadError, ImageTooLarge, PipelineError, UnsupportedImageFormat
from pipelines.images import SUPPORTED_FORMATS, Picture, bleed_edges, decode, restore_profile, upscale_alpha
from tests.pipelines import icc

MAX_PIXELS = 4_000_000


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Encode with Pillow."""
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def read(data: bytes) -> Picture:
    """Decode with the limit of these tests."""
    return decode(data, max_pixels=MAX_PIXELS)


def colours(width: int = 48, height: int = 40) -> Image.Image:
    """A smooth picture that no flip or rotation maps to itself."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    channels = [255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 90 + 40 * np.sin((x + 2 * y) / 9)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def difference(left: Image.Image, right: Image.Image) -> float:
    """The largest difference of two pictures of the same size."""
    return float(np.abs(np.asarray(left, dtype=float) - np.asarray(right, dtype=float)).max())


def png(width: int, height: int, depth: int, colour_type: int, data: bytes, *extra: bytes) -> bytes:
    """Build a PNG by hand from its filtered rows; `extra` chunks come before them."""

    def chunk(body: bytes) -> bytes:
        return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))

    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, depth, colour_type, 0, 0, 0)
    bodies = [header, *extra, b"IDAT" + zlib.compress(data), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(body) for body in bodies)


@pytest.mark.parametrize("size", [(1, 1), (16000, 10), (7, 300)])
def test_any_shape(size: tuple[int, int]) -> None:
    """A single pixel and long strips decode like any picture."""
    picture = read(save(colours(*size), "PNG"))

    assert (picture.width, picture.height) == size
    assert (picture.rgb.mode, picture.alpha, picture.icc_profile, picture.format) == ("RGB", None, None, "PNG")
    assert difference(picture.rgb, colours(*size)) == 0


@pytest.mark.parametrize(
    ("kind", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 95, "subsampling": 0}, 12),
        ("JPEG", {"progressive": True, "quality": 95, "subsampling": 0}, 12),
        ("WEBP", {"quality": 95}, 40),
        ("AVIF", {"quality": 95}, 40),
        ("GIF", {}, 60),
    ],
)
def test_formats(kind: str, options: dict[str, Any], tolerance: float) -> None:
    """Every supported format decodes to the picture it was made from."""
    picture = read(save(colours(), kind, **options))

    assert picture.format == kind
    assert difference(picture.rgb, colours()) <= tolerance


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_grey_is_scaled(kind: str) -> None:
    """16-bit grey keeps its whole range: nothing is clipped at 255."""
    ramp = np.linspace(0, 65535, 4096).round().astype(np.uint16).reshape(64, 64)

    picture = read(save(Image.fromarray(ramp), kind))

    assert difference(picture.rgb, Image.fromarray((ramp / 257).round().astype(np.uint8)).convert("RGB")) == 0


def test_sixteen_bit_grey_png_with_a_transparent_level() -> None:
    """The transparent grey of a 16-bit file is compared at 16 bits."""
    rows = b"".join(b"\0" + struct.pack(">2H", 4000, 4001) for _ in range(2))

    picture = read(png(2, 2, 16, 0, rows, b"tRNS" + struct.pack(">H", 4000)))

    assert picture.alpha is not None
    assert np.asarray(picture.alpha).tolist() == [[0, 255], [0, 255]]


def test_sixteen_bit_colour_png() -> None:
    """16-bit RGB keeps its range, and its transparent colour."""
    levels = np.linspace(0, 65535, 256).round().astype(">u2").reshape(16, 16)
    pixels = np.stack([levels, levels[::-1], levels.T], axis=-1)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    key = struct.pack(">3H", *pixels[3, 4])

    opaque, keyed = read(png(16, 16, 16, 2, rows)), read(png(16, 16, 16, 2, rows, b"tRNS" + key))

    assert np.abs(np.asarray(opaque.rgb) - pixels / 257).max() <= 1
    assert keyed.alpha is not None
    assert np.argwhere(np.asarray(keyed.alpha) == 0).tolist() == [[3, 4]]


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr"])
def test_other_colour_models_become_rgb(mode: str) -> None:
    """Bilevel, grey, palette and print colours decode to what Pillow makes of them."""
    original = colours().convert(mode)
    kind = {"YCbCr": "TIFF", "CMYK": "JPEG"}.get(mode, "PNG")

    picture = read(save(original, kind))

    assert picture.rgb.mode == "RGB"
    assert picture.alpha is None
    assert difference(picture.rgb, original.convert("RGB")) <= (12 if kind == "JPEG" else 3)


@pytest.mark.parametrize(("mode", "kind"), [("RGBA", "PNG"), ("LA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF")])
def test_alpha_is_split_off(mode: str, kind: str) -> None:
    """Colour and transparency come apart unchanged, also where the picture cannot be seen."""
    original = colours().convert("L" if mode == "LA" else "RGB").convert(mode)
    alpha = Image.linear_gradient("L").resize(original.size)
    original.putalpha(alpha)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}

    picture = read(save(original, kind, **options))

    assert picture.alpha is not None
    assert difference(picture.alpha, alpha) == 0
    assert difference(picture.rgb, original.convert("RGB")) == 0


@pytest.mark.parametrize("transparency", [3, bytes([0, 128, 255])])
def test_palette_transparency(transparency: int | bytes) -> None:
    """One transparent palette entry, or a list of them, becomes an alpha channel."""
    original = colours().quantize(8)

    picture = read(save(original, "PNG", transparency=transparency))

    expected = Image.open(io.BytesIO(save(original, "PNG", transparency=transparency))).convert("RGBA")
    assert picture.alpha is not None
    assert difference(picture.alpha, expected.getchannel("A")) == 0
    assert len(set(picture.alpha.tobytes())) > 1


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_frame_of_an_animation(kind: str) -> None:
    """Animations and multi-page files give their first frame."""
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    options = {"lossless": True} if kind == "WEBP" else {}

    picture = read(save(frames[0], kind, save_all=True, append_images=frames[1:], **options))

    assert difference(picture.rgb, frames[0]) == 0


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied_once(kind: str, orientation: int) -> None:
    """Every orientation comes out upright, whatever the format, with sides swapped where they have to be."""
    undo = {
        2: "FLIP_LEFT_RIGHT",
        3: "ROTATE_180",
        4: "FLIP_TOP_BOTTOM",
        5: "TRANSPOSE",
        6: "ROTATE_90",
        7: "TRANSVERSE",
        8: "ROTATE_270",
    }
    upright = colours()
    stored = upright.transpose(Image.Transpose[undo[orientation]]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation

    picture = read(save(stored, kind, exif=exif))

    assert (picture.width, picture.height) == (48, 40)
    assert difference(picture.rgb, upright) < (60 if kind in ("JPEG", "WEBP") else 1)
    assert np.abs(np.asarray(picture.rgb, dtype=float) - np.asarray(upright, dtype=float)).mean() < 4


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\xff", b""])
def test_damaged_exif_is_ignored(exif: bytes) -> None:
    """Metadata that cannot be read changes nothing."""
    assert difference(read(save(colours(), "JPEG", quality=95, exif=exif)).rgb, colours()) < 60


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "AVIF"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_truncated_files(kind: str, part: float) -> None:
    """A file cut short anywhere is an error, never a half-grey picture."""
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    data = save(noise, kind)

    with pytest.raises(ImageLoadError):
        read(data[: int(len(data) * part)])


@pytest.mark.parametrize(
    "data", [b"", b"\0", b"<!doctype html><html><body>404</body></html>", b"{}", b"\x89PNG\r\n\x1a\n", b"GIF89a",
             b"BM", b"II*\0", b"\xff\xd8\xff\xe0", b"RIFF\0\0\0\0WEBP", b"\0\0\0\x1cftypavif", b"just text " * 500,
             b"\0\0\0\x18ftypisom\0\0\0\0isommp42", b"<!doctype html><html><svg></svg></html>"]
)  # fmt: skip
def test_not_an_image(data: bytes) -> None:
    """Web pages, text and bare signatures are not images."""
    with pytest.raises(ImageLoadError):
        read(data)


@given(
    place=st.integers(8, 700),
    value=st.integers(0, 255),
    kind=st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"]),
)
@settings(deadline=None, max_examples=150)
def test_damaged_bytes_never_escape_as_another_error(place: int, value: int, kind: str) -> None:
    """Whatever byte is wrong, the file decodes or one of the documented errors says why not, without a warning."""
    data = bytearray(save(colours(24, 20), kind))
    data[place % len(data)] = value

    try:
        picture = read(bytes(data))
    except PipelineError as error:
        assert str(error)
    else:
        assert picture.rgb.mode == "RGB" and picture.width > 0


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<!-- made by hand -->\n<svg/>', "SVG"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"8BPS\0\1", "PSD"),
        (b"%PDF-1.7", "PDF"),
        (b"\xff\x0a\0\0", "JPEG XL"),
    ],
)
def test_formats_that_are_not_read(data: bytes, found: str) -> None:
    """Known formats without a reader are named, together with those that have one."""
    with pytest.raises(UnsupportedImageFormat) as caught:
        read(data)

    assert caught.value.found == found
    assert "PNG" in caught.value.supported


def test_pixel_types_that_are_not_read() -> None:
    """Floating-point TIFF has no defined white, so it is refused instead of guessed."""
    with pytest.raises(UnsupportedImageFormat, match="TIFF with pixels of type F"):
        read(save(Image.new("F", (4, 4), 0.5), "TIFF"))


def test_a_png_bomb_is_refused_from_its_header() -> None:
    """30,000 × 30,000 px in a few hundred kilobytes are refused in milliseconds, with the size that would do."""
    bomb = png(30000, 30000, 8, 2, bytes(30001 * 900))
    started = time.process_time()

    with pytest.raises(ImageTooLarge, match="900.0 megapixels") as caught:
        read(bomb)

    assert time.process_time() - started < 0.1
    assert (caught.value.width, caught.value.height) == (30000, 30000)
    assert caught.value.max_width * caught.value.max_height <= MAX_PIXELS < (caught.value.max_width + 1) ** 2


def test_a_webp_bomb_is_refused_before_its_canvas_is_allocated() -> None:
    """The largest canvas that WebP can announce is refused with its size."""
    bomb = b"RIFF\x16\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + (2**24 - 1).to_bytes(3, "little") * 2

    with pytest.raises(ImageTooLarge) as caught:
        decode(bomb, max_pixels=10**18)

    assert caught.value.width == caught.value.height == 2**24


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"}])
def test_webp_sizes_are_read_from_every_kind_of_first_chunk(options: dict[str, Any]) -> None:
    """Lossy, lossless and extended files announce their size in different places."""
    data = save(colours(50, 40), "WEBP", **options)

    with pytest.raises(ImageTooLarge, match="50 x 40"):
        decode(data, max_pixels=1999)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF"])
def test_the_limit_holds_for_every_format(kind: str) -> None:
    """One pixel too many is too many; exactly the limit is not."""
    data = save(Image.new("RGB", (50, 40)), kind)

    assert decode(data, max_pixels=2000).width == 50
    with pytest.raises(ImageTooLarge):
        decode(data, max_pixels=1999)


def test_wrong_checksums_are_damage() -> None:
    """A PNG whose header or pixels do not match their checksum is not decoded."""
    data = bytearray(save(colours(), "PNG"))
    header, pixels = bytearray(data), bytearray(data)
    header[29] ^= 1
    place = data.index(b"IDAT")
    pixels[place + 4 + struct.unpack_from(">I", data, place - 4)[0]] ^= 1

    for damaged in (header, pixels):
        with pytest.raises(ImageLoadError):
            read(bytes(damaged))


def test_only_our_own_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow would warn above its process-wide limit; that limit is neither heard nor changed."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)

    pictures = [read(save(colours(), kind)) for kind in SUPPORTED_FORMATS]

    assert {(picture.width, picture.height) for picture in pictures} == {(48, 40)}
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_a_wide_gamut_profile_is_converted_and_kept() -> None:
    """Display P3 pixels become sRGB, and come back as they were in the profile that is kept byte for byte."""
    profile = icc.display_p3()
    muted = Image.fromarray((90 + np.asarray(colours()) * 0.3).astype(np.uint8))

    picture = read(save(muted, "PNG", icc_profile=profile))

    back = restore_profile(picture.rgb, picture.icc_profile)
    assert picture.icc_profile == profile
    assert difference(picture.rgb, muted) > 3
    assert difference(back, muted) <= 2


def test_known_colours_of_display_p3() -> None:
    """P3's red lies outside sRGB and is clipped to it; its grey is grey; a muted red gets stronger."""
    profile, srgb = icc.display_p3(), Image.new("RGB", (1, 1))

    def converted(*colour: int) -> tuple[int, ...]:
        srgb.putpixel((0, 0), colour)
        return read(save(srgb, "PNG", icc_profile=profile)).rgb.getpixel((0, 0))  # type: ignore[return-value]

    assert converted(255, 0, 0) == pytest.approx((255, 0, 0), abs=3)
    assert np.ptp(converted(128, 128, 128)) <= 1
    assert converted(180, 100, 100)[0] > 184


def test_srgb_pixels_are_not_touched() -> None:
    """Pixels tagged with an sRGB profile are exact, in and out."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()

    picture = read(save(colours(), "PNG", icc_profile=profile))

    assert picture.icc_profile == profile
    assert difference(picture.rgb, colours()) == 0
    assert restore_profile(picture.rgb, profile) is picture.rgb


@pytest.mark.parametrize(
    ("mode", "kind", "profile"),
    [("L", "PNG", icc.grey(1.8)), ("LA", "PNG", icc.grey(1.8)), ("CMYK", "JPEG", icc.cmyk()),
     ("RGB", "PNG", icc.scanner())],
)  # fmt: skip
def test_profiles_that_only_an_input_can_have(mode: str, kind: str, profile: bytes) -> None:
    """Grey, print and scanner profiles are applied, and the result carries sRGB, always the same bytes."""
    original = colours().convert("L" if mode == "LA" else mode).convert(mode)

    picture, again = (read(save(original, kind, icc_profile=profile)) for _ in range(2))

    assert picture.icc_profile == again.icc_profile != profile
    assert b"sRGB" in (picture.icc_profile or b"").replace(b"\0", b"")
    assert restore_profile(picture.rgb, picture.icc_profile) is picture.rgb
    assert difference(picture.rgb, original.convert("RGB")) > 5


@pytest.mark.parametrize(
    ("mode", "kind", "profile"),
    [("RGB", "PNG", b"not a profile"), ("RGB", "PNG", icc.display_p3()[:200]), ("RGB", "PNG", icc.grey(1.8)),
     ("CMYK", "JPEG", icc.display_p3()), ("RGB", "PNG", icc.cmyk())],
)  # fmt: skip
def test_profiles_that_do_not_fit_are_ignored(mode: str, kind: str, profile: bytes) -> None:
    """A damaged profile, or one of another kind of pixels, is dropped and the picture kept."""
    original = colours().convert(mode)

    picture = read(save(original, kind, icc_profile=profile))

    assert picture.icc_profile is None
    assert difference(picture.rgb, original.convert("RGB")) <= (12 if kind == "JPEG" else 0)


def test_grey_files_with_an_rgb_profile() -> None:
    """Grey pixels take an RGB profile as three equal channels."""
    picture = read(save(colours().convert("L"), "JPEG", icc_profile=icc.display_p3(1.4)))

    assert picture.icc_profile == icc.display_p3(1.4)
    assert difference(picture.rgb, colours().convert("L").convert("RGB")) > 10


def test_constant_alpha_stays_constant() -> None:
    """A flat alpha channel is refilled, whatever the size."""
    assert set(upscale_alpha(Image.new("L", (5, 7), 93), (11, 13)).tobytes()) == {93}


def test_alpha_grows_smoothly_and_keeps_its_flat_parts() -> None:
    """Away from an edge, opaque stays opaque and transparent transparent; the same size is the channel itself."""
    alpha = Image.new("L", (20, 20))
    alpha.paste(255, (0, 0, 10, 20))

    large = np.asarray(upscale_alpha(alpha, (50, 50)))

    assert large.shape == (50, 50)
    assert set(large[:, :15].ravel()) == {255}
    assert set(large[:, 35:].ravel()) == {0}
    assert upscale_alpha(alpha, (20, 20)) is alpha


def test_visible_colours_bleed_into_transparent_pixels() -> None:
    """Hidden pixels take on the colours nearby; visible ones are not touched."""
    rgb, alpha = Image.new("RGB", (37, 23), "black"), Image.new("L", (37, 23))
    rgb.paste("red", (0, 0, 9, 23))
    rgb.paste("blue", (28, 0, 37, 23))
    alpha.paste(255, (0, 0, 9, 23))
    alpha.paste(7, (28, 0, 37, 23))

    bled = np.asarray(bleed_edges(rgb, alpha)).astype(int)

    visible = np.asarray(alpha) > 0
    assert np.array_equal(bled[visible], np.asarray(rgb)[visible])
    assert bled[:, 9:12, 0].min() > 200 > 55 > bled[:, 9:12, 2].max()
    assert bled[:, 26:28, 2].min() > 150
    assert (bled[..., 0] + bled[..., 2]).min() > 200


@pytest.mark.parametrize("level", [0, 1, 255])
def test_even_transparency_needs_no_bleeding(level: int) -> None:
    """Where nothing or everything is transparent there is nothing to fill, or nothing to fill with."""
    rgb = colours()

    assert bleed_edges(rgb, Image.new("L", rgb.size, level)) is rgb
