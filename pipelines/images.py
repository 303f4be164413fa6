"""Encoded pictures in, and what has to be kept beside their pixels: transparency, colour profile, orientation.

Pixels are worked on as 8-bit sRGB. A picture with another RGB profile is converted here and converted back band by
band (`restore_profile`), so that the result carries the profile it came with. Profiles that only an input can have
(grey, CMYK, a scanner's) are replaced by sRGB. Colours outside sRGB are clipped to it.

Nothing is decoded before the size in the header has been checked.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import (
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from pipelines.errors import ImageLoadError, ImageTooLarge, UnsupportedImageFormat

# Pillow's classes are used directly: `Image.open` has one pixel limit for the whole process.
_READERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "PNG": PngImagePlugin.PngImageFile,
    "JPEG": JpegImagePlugin.JpegImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "AVIF": AvifImagePlugin.AvifImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
}
SUPPORTED_FORMATS = tuple(_READERS)
_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"BM", "BMP"),
    (b"8BPS", "PSD"),
    (b"%PDF-", "PDF"),
    (b"\0\0\1\0", "ICO"),
    (b"qoif", "QOI"),
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
)
# A HEIF container names its contents; AVIF first, as its files list the general brands too.
_BRANDS = ((b"avif", "AVIF"), (b"avis", "AVIF"), (b"hei", "HEIC"), (b"hev", "HEIC"), (b"mif1", "HEIF"))
_SVG = re.compile(rb"(?:\xef\xbb\xbf)?\s*(?:<[?!][^>]*>\s*)*<svg\b", re.IGNORECASE)
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_INTENT = ImageCms.Intent.RELATIVE_COLORIMETRIC
_FLAGS = ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.HIGHRESPRECALC


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A decoded picture, upright.

    `rgb` has mode RGB in sRGB; `alpha` has mode L, or is None where the file has no transparency; `icc_profile` is
    what the result is to carry, to be applied with `restore_profile`; `format` is one of `SUPPORTED_FORMATS`.
    """

    rgb: Image.Image
    alpha: Image.Image | None
    icc_profile: bytes | None
    format: str

    @property
    def width(self) -> int:
        """In px."""
        return self.rgb.width

    @property
    def height(self) -> int:
        """In px."""
        return self.rgb.height


def decode(data: bytes, *, max_pixels: int) -> Picture:
    """Decode a picture; of an animation the first frame.

    Args:
        data: An encoded picture.
        max_pixels: Most pixels (width × height) that are decoded.

    Raises:
        ImageLoadError: The bytes are no picture, or a damaged or truncated one.
        UnsupportedImageFormat: They are a picture of a kind that is not read here.
        ImageTooLarge: The header announces more than `max_pixels`; nothing was decoded.
    """
    kind = _kind(data)
    if kind not in _READERS:
        raise UnsupportedImageFormat(kind, SUPPORTED_FORMATS)
    if kind == "WEBP":
        # Pillow's reader allocates the canvas at once, and has a limit of its own for it.
        _check_size(_webp_size(data), min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or max_pixels)))
    # Pillow reports damaged metadata by warnings; they say nothing about the pixels.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = _READERS[kind](io.BytesIO(data))
        except Exception as error:  # a reader raises whatever the damage leads to
            raise ImageLoadError(f"The {kind} file cannot be read: {error}") from error
        _check_size(image.size, max_pixels)
        if kind == "PNG":
            _check_png(data)
        try:
            image.load()
        except Exception as error:
            raise ImageLoadError(f"The {kind} file is damaged or truncated: {error}") from error
        profile = image.info.get("icc_profile")
        colour, alpha = _split(_upright(image), kind, sixteen_bit=kind == "PNG" and data[24] == 16)
        rgb, profile = _to_srgb(colour, profile)
    return Picture(rgb=rgb, alpha=alpha, icc_profile=profile, format=kind)


def restore_profile(image: Image.Image, icc_profile: bytes | None) -> Image.Image:
    """Convert sRGB pixels to the profile that a `Picture` came with.

    Args:
        image: Mode RGB; a band is as good as a whole picture.
        icc_profile: `Picture.icc_profile`.

    Returns:
        Mode RGB, of the same size; `image` itself where there is nothing to convert.
    """
    if icc_profile is None:
        return image
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
    if _is_srgb(profile):
        return image
    return _converted(image, _transform(_srgb(), profile, "RGB"))


def upscale_alpha(alpha: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize an alpha channel (mode L) to `size` (width, height) with Lanczos; a constant one stays constant."""
    low, high = alpha.getextrema()
    if low == high:
        return Image.new("L", size, low)
    return alpha if alpha.size == size else alpha.resize(size, Image.Resampling.LANCZOS)


def bleed_edges(rgb: Image.Image, alpha: Image.Image) -> Image.Image:
    """Continue the visible colours smoothly into fully transparent pixels.

    What a file holds there is arbitrary, often black; left in place it would bleed into the visible edge when the
    picture is enlarged. Averages the visible pixels over ever larger squares, then fills from the largest down.

    Args:
        rgb: Mode RGB.
        alpha: Mode L, of the same size.

    Returns:
        Mode RGB, equal to `rgb` wherever alpha is not 0; `rgb` itself where nothing is, or all is, transparent.
    """
    low, high = alpha.getextrema()
    if low != 0 or high == 0:
        return rgb
    weight = np.asarray(alpha, dtype=np.float32)
    return Image.fromarray(
        np.where(weight[..., None] > 0, np.asarray(rgb), _filled(np.asarray(rgb) * weight[..., None], weight))
    )


def _kind(data: bytes) -> str:
    """Name the format that the first bytes announce."""
    for signature, kind in _SIGNATURES:
        if data.startswith(signature):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        brands = data[8 : min(struct.unpack(">I", data[:4])[0], 256)]
        found = next((kind for brand, kind in _BRANDS if brand in brands), None)
        if found is not None:
            return found
    if _SVG.match(data[:1024]):
        return "SVG"
    raise ImageLoadError("The bytes are not an image." if data else "There are no bytes: the image is empty.")


def _check_size(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ImageLoadError(f"The image has no pixels: {width} x {height}.")
    if width * height > max_pixels:
        shrink = math.sqrt(max_pixels / (width * height))
        raise ImageTooLarge(
            f"The image has {width} x {height} = {width * height / 1e6:.1f} megapixels; "
            f"at most {max_pixels / 1e6:.1f} are accepted.",
            width=width,
            height=height,
            max_width=int(width * shrink),
            max_height=int(height * shrink),
        )


def _webp_size(data: bytes) -> tuple[int, int]:
    """Read the canvas size of a WebP file from its first chunk (RFC 9649, section 2)."""
    if len(data) < 30:
        raise ImageLoadError("The WEBP file is truncated.")
    if data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF


def _check_png(data: bytes) -> None:
    """Compare the checksums of the pixel chunks, which Pillow skips."""
    view, place = memoryview(data), 8
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 8 + length
        if kind == b"IDAT" and end + 4 <= len(data):
            (expected,) = struct.unpack_from(">I", data, end)
            if zlib.crc32(view[place + 4 : end]) != expected:
                raise ImageLoadError("The PNG file is damaged: the checksum of its pixels is wrong.")
        place = end + 4


def _upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Pillow has already applied a TIFF's and removed the tag."""
    try:
        orientation = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF says nothing about the orientation
        return image
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _split(image: Image.Image, kind: str, *, sixteen_bit: bool) -> tuple[Image.Image, Image.Image | None]:
    """Split into 8-bit colour (mode L, RGB or CMYK) and alpha (mode L)."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.uint32)
        grey = Image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
        if not isinstance(transparent, int):
            return grey, None
        return grey, Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8))
    if image.mode in ("I", "F", "LAB"):
        raise UnsupportedImageFormat(f"{kind} with pixels of type {image.mode}", SUPPORTED_FORMATS)
    if sixteen_bit and isinstance(transparent, tuple):
        image.info["transparency"] = tuple(level >> 8 for level in transparent)  # as Pillow has shortened the pixels
    if image.has_transparency_data:
        colour = image.convert("RGBA")
        grey_file = image.mode in ("1", "L", "LA", "La")
        return colour.convert("L" if grey_file else "RGB"), colour.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    return image.convert("L" if image.mode == "1" else "RGB"), None


def _to_srgb(image: Image.Image, icc_profile: bytes | None) -> tuple[Image.Image, bytes | None]:
    """Convert L, RGB or CMYK pixels to sRGB; returns them with the profile that the result is to carry.

    A profile that is damaged or belongs to another kind of pixels is ignored, as browsers do.
    """
    if not icc_profile:
        return image.convert("RGB"), None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc_profile))
        space = profile.profile.xcolor_space.strip()
        if space == "RGB" and image.mode in ("RGB", "L"):
            image = image.convert("RGB")
            if _is_srgb(profile):
                return image, icc_profile
        elif (space, image.mode) not in (("GRAY", "L"), ("CMYK", "CMYK")):
            return image.convert("RGB"), None
        converted = _converted(image, _transform(profile, _srgb(), image.mode))
    except (ImageCms.PyCMSError, OSError, ValueError):
        return image.convert("RGB"), None
    return converted, icc_profile if space == "RGB" and _has_way_back(profile) else _srgb_bytes()


def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def _srgb_bytes() -> bytes:
    """The sRGB profile with a fixed creation date (bytes 24 to 35), so that equal pictures are equal files."""
    profile = bytearray(_srgb().tobytes())
    profile[24:36] = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    return bytes(profile)


def _transform(
    source: ImageCms.ImageCmsProfile, target: ImageCms.ImageCmsProfile, mode: str
) -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(source, target, mode, "RGB", _INTENT, _FLAGS)


def _converted(image: Image.Image, transform: ImageCms.ImageCmsTransform) -> Image.Image:
    converted = ImageCms.applyTransform(image, transform)
    assert converted is not None  # it is None only when converting in place
    return converted


def _has_way_back(profile: ImageCms.ImageCmsProfile) -> bool:
    """Whether pixels can be converted to the profile; a scanner's may describe its input only."""
    try:
        _transform(_srgb(), profile, "RGB")
    except ImageCms.PyCMSError:
        return False
    return True


def _is_srgb(profile: ImageCms.ImageCmsProfile) -> bool:
    """Whether an RGB profile means sRGB: no colour of a coarse lattice moves by more than one level."""
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    lattice = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(9, 81, 3)
    moved = np.asarray(_converted(Image.fromarray(lattice), _transform(profile, _srgb(), "RGB")))
    return int(np.abs(moved.astype(int) - lattice).max()) <= 1


def _filled(colour: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.uint8]:
    """From colours (h, w, 3) times weight (h, w) to colours everywhere: of coarser pixels where the weight is 0."""
    known = weight > 0
    own = (colour / np.maximum(weight, 1e-6)[..., None] + 0.5).clip(0, 255).astype(np.uint8)
    if known.all():
        return own
    height, width = weight.shape
    coarse = Image.fromarray(_filled(_halved(colour), _halved(weight)))
    around = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))
    return np.where(known[..., None], own, around)


def _halved(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Add up squares of 2 × 2; an odd last row or column stands alone."""
    padded = np.pad(values, [(0, values.shape[0] % 2), (0, values.shape[1] % 2)] + [(0, 0)] * (values.ndim - 2))
    return padded[::2, ::2] + padded[1::2, ::2] + padded[::2, 1::2] + padded[1::2, 1::2]
