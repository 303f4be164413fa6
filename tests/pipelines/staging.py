"""Running recipes on the pocket weights, and pictures of every kind to run them on."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipelines.delivery import Result
from pipelines.models import Models
from pipelines.planning import Limits
from pipelines.progress import Progress
from pipelines.residency import Residency
from tests.conftest import png_bytes
from tests.pipelines import icc
from weights.store import WeightStore

LIMITS = Limits(
    max_input_pixels=10**7, max_output_pixels=10**7, max_large_input_pixels=10**7, max_large_output_pixels=10**7
)


def pocket_models(store: WeightStore) -> Models:
    """The models of the built-in set, all of which stay once they are loaded."""
    device = torch.device("cpu")
    return Models(store, device, Residency(device, device_bytes=sys.maxsize, host_bytes=0))


def run(
    pipeline: Any,
    image: Image.Image | bytes,
    params: Any,
    *,
    limits: Limits = LIMITS,
    progress: Progress = lambda report: None,
) -> tuple[Image.Image, Result, bytes]:
    """Upscale; returns the picture, the result and the bytes of the PNG."""
    output = BytesIO()
    data = image if isinstance(image, bytes) else png_bytes(image)
    result = pipeline(data, params, limits=limits, output=output, progress=progress)
    return Image.open(BytesIO(output.getvalue())), result, output.getvalue()


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The picture in a format."""
    buffer = BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def _animation() -> bytes:
    first, second = Image.new("RGB", (24, 16), (200, 30, 30)), Image.new("RGB", (24, 16), (30, 30, 200))
    return encoded(first, "GIF", save_all=True, append_images=[second])


def _transparent() -> bytes:
    image = Image.new("RGBA", (24, 16), (200, 30, 30, 255))
    image.paste((0, 0, 0, 0), (0, 0, 8, 16))
    return encoded(image, "PNG")


RED = (200, 30, 30)


def _red() -> Image.Image:
    return Image.new("RGB", (24, 16), RED)


def _faint() -> Image.Image:
    return Image.new("RGBA", (24, 16), (*RED, 180))


def _turned() -> bytes:
    """Lies on its side in the file, and says so: 24 x 16 px when it is upright, blue at the upper left."""
    upright = _red()
    upright.paste((30, 30, 200), (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(upright.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=95, exif=exif.tobytes())


def _profiled() -> bytes:
    """In a wide colour space: the result has the profile again, and with it the same numbers."""
    return encoded(Image.new("RGB", (24, 16), (150, 110, 100)), "PNG", icc_profile=icc.display_p3())


def interlaced(image: Image.Image) -> bytes:
    """An Adam7 PNG (PNG specification, section 8.2) of an RGB picture, which Pillow cannot write."""
    pixels, packed = np.asarray(image), b""
    for y, x, dy, dx in (
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ):
        packed += b"".join(b"\0" + row.tobytes() for row in pixels[y::dy, x::dx] if row.size)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *image.size, 8, 2, 0, 0, 1)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(packed)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


KINDS: dict[str, tuple[Callable[[], bytes], str, tuple[int, int, int]]] = {
    "one pixel": (lambda: encoded(Image.new("RGB", (1, 1), RED), "PNG"), "RGB", RED),
    "grey": (lambda: encoded(Image.new("L", (24, 16), 90), "PNG"), "RGB", (90, 90, 90)),
    "grey with alpha": (lambda: encoded(Image.new("LA", (24, 16), (90, 180)), "PNG"), "RGBA", (90, 90, 90)),
    "black and white": (lambda: encoded(Image.new("1", (24, 16), 1), "PNG"), "RGB", (255, 255, 255)),
    "16 bits": (lambda: encoded(Image.new("I;16", (24, 16), 90 * 257), "PNG"), "RGB", (90, 90, 90)),
    "palette": (lambda: encoded(_red().quantize(4), "PNG"), "RGB", RED),
    "palette with transparency": (lambda: encoded(_red().quantize(4), "PNG", transparency=b"\xc0"), "RGBA", RED),
    "CMYK": (lambda: encoded(Image.new("CMYK", (24, 16), (55, 225, 225, 0)), "JPEG", quality=95), "RGB", RED),
    "animation": (_animation, "RGB", RED),
    "transparent": (_transparent, "RGBA", RED),
    "progressive JPEG": (lambda: encoded(_red(), "JPEG", progressive=True, quality=95), "RGB", RED),
    "interlaced PNG": (lambda: interlaced(_red()), "RGB", RED),
    "WebP": (lambda: encoded(_red(), "WEBP", quality=95), "RGB", RED),
    "WebP with alpha": (lambda: encoded(_faint(), "WEBP", lossless=True, exact=True), "RGBA", RED),
    "turned by EXIF": (_turned, "RGB", RED),
    "with a profile": (_profiled, "RGB", (150, 110, 100)),
    "TIFF": (lambda: encoded(_red(), "TIFF"), "RGB", RED),
    "BMP": (lambda: encoded(_red(), "BMP"), "RGB", RED),
}
"""Pictures of one colour: how to make each, the mode of its result, and its colour in the lower right corner."""

DAMAGED: dict[str, Callable[[], bytes]] = {
    "cut in two": lambda: (whole := encoded(Image.effect_noise((64, 64), 50), "PNG"))[: len(whole) // 2],
    "JPEG without its end": lambda: encoded(Image.effect_noise((64, 64), 50), "JPEG")[:-400],
    "GIF of a header": lambda: _animation()[:20],
    "WebP without its end": lambda: encoded(Image.effect_noise((64, 64), 50).convert("RGB"), "WEBP")[:-200],
    "a web page": lambda: b"<!doctype html><p>not a picture</p>",
    "nothing": lambda: b"",
}
"""What is no picture, or a part of one."""
