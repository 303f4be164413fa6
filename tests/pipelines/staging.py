"""Running recipes on the pocket weights, and pictures of every kind to run them on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from io import BytesIO
from typing import Any

import torch
from PIL import Image

from pipelines.delivery import Result
from pipelines.models import Models
from pipelines.planning import Limits
from pipelines.progress import Progress
from pipelines.residency import Residency
from tests.conftest import png_bytes
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


KINDS: dict[str, tuple[Callable[[], bytes], str, tuple[int, int, int]]] = {
    "one pixel": (lambda: encoded(Image.new("RGB", (1, 1), (200, 30, 30)), "PNG"), "RGB", (200, 30, 30)),
    "grey": (lambda: encoded(Image.new("L", (24, 16), 90), "PNG"), "RGB", (90, 90, 90)),
    "16 bits": (lambda: encoded(Image.new("I;16", (24, 16), 90 * 257), "PNG"), "RGB", (90, 90, 90)),
    "palette": (lambda: encoded(Image.new("RGB", (24, 16), (200, 30, 30)).quantize(4), "PNG"), "RGB", (200, 30, 30)),
    "CMYK": (lambda: encoded(Image.new("CMYK", (24, 16), (55, 225, 225, 0)), "JPEG", quality=95), "RGB", (200, 30, 30)),
    "animation": (_animation, "RGB", (200, 30, 30)),
    "transparent": (_transparent, "RGBA", (200, 30, 30)),
}
"""Pictures of one colour: how to make each, the mode of its result, and its colour in the lower right corner."""
