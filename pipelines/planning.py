"""What may be made: sizes, pixel limits and memory, decided before any work starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import psutil

from pipelines.errors import ImageTooLarge, InvalidParams

MAX_SIDE_PX = 65_535
"""Longest side of a result: what JPEG viewers and most tools can take."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Pixels that are accepted; the `large` pair applies where the request allows large pictures."""

    max_input_pixels: int
    max_output_pixels: int
    max_large_input_pixels: int
    max_large_output_pixels: int


def plan_size(
    width: int, height: int, scale: float, *, max_pixels: int, multiple: int = 1, way_out: str = ""
) -> tuple[int, int]:
    """Output size (width, height) in px for an input of `width` x `height`: each side times the scale, rounded.

    What counts is the picture as it is worked on, with sides padded to `multiple`: a strip of one pixel is cheap to
    send and dear to make.

    Args:
        width: Of the input.
        height: Of the input.
        scale: Output side over input side.
        max_pixels: Most pixels of the padded output.
        multiple: Sides are padded to multiples of this.
        way_out: A sentence for the caller on what to do about a picture that is too large.

    Raises:
        InvalidParams: The scale is below 1.
        ImageTooLarge: The output would have more pixels, or a longer side, than is allowed.
    """
    if scale < 1:
        raise InvalidParams("scale", f"scale must be at least 1, got {scale}")

    def planned(shrink: float) -> tuple[int, int, float]:
        """The output size for an input shrunk by a factor, and how many times too large it is."""
        sides = [round(max(1, int(side * shrink)) * scale) for side in (width, height)]
        padded = [-(-side // multiple) * multiple for side in sides]
        return sides[0], sides[1], max(padded[0] * padded[1] / max_pixels, (max(sides) / MAX_SIDE_PX) ** 2)

    new_width, new_height, excess = planned(1.0)
    if excess > 1:
        shrink = 1.0
        # Where not even one pixel may grow by so much, one pixel is the best advice there is.
        while (over := planned(shrink)[2]) > 1 and shrink * max(width, height) > 1:
            shrink *= min(0.999, over**-0.5)
        raise ImageTooLarge(
            f"Upscaling {width} x {height} by {scale:g} makes {new_width} x {new_height} pixels; at most "
            f"{max_pixels / 1e6:.1f} megapixels (sides padded to {multiple}) and {MAX_SIDE_PX} px a side are allowed."
            + (f" {way_out}" if way_out else ""),
            width=width,
            height=height,
            max_width=max(1, int(width * shrink)),
            max_height=max(1, int(height * shrink)),
        )
    return new_width, new_height


def check_memory(width: int, height: int, size: tuple[int, int], *, needed: float) -> None:
    """Refuse what would not fit into memory, rather than be killed for it halfway.

    Args:
        width: Of the input.
        height: Of the input.
        size: Output (width, height) in px.
        needed: Bytes that the work takes at its peak.

    Raises:
        ImageTooLarge: The picture needs more memory than is free.
    """
    free = psutil.virtual_memory().available
    if needed <= free:
        return
    shrink = math.sqrt(free / needed)
    raise ImageTooLarge(
        f"A result of {size[0]} x {size[1]} pixels needs about {needed / 2**30:.1f} GiB of memory and "
        f"{free / 2**30:.1f} GiB are free.",
        width=width,
        height=height,
        max_width=max(1, int(width * shrink)),
        max_height=max(1, int(height * shrink)),
    )
