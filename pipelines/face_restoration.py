"""Restore small faces with a network for aligned faces, and paste them back so that nobody sees where.

A face is cut out of the input with hair and chin, as the network's training pictures show it, enlarged to 512 px and
restored. What the input determines stays the input's: tones and all structure above two of its pixels (`colour`); the
network adds what is finer. The result fades out over an ellipse, row by row on its way into the file, so that memory
does not grow with the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.colour import wavelet_match
from pipelines.faces import Box
from pipelines.prescale import Lanczos, lanczos_part
from pipelines.spool import Pixels
from weights.restoreformer import SIDE_PX

CUT_SIDES, CUT_CENTRE = 1.85, 0.42
"""Side of what is cut out, over the face's, and where its middle is in the face's height: measured on a portrait so
that eyes and mouth come to lie where they do in FFHQ, on which such networks are trained (eyes at 240 px of 512)."""
LEAST_FACE_PX = 16
"""Below this there is nothing to restore a face from."""
FEATHER = 0.3
"""Part of the ellipse's radius over which the restored face fades out."""

Restore = Callable[[Tensor], Tensor]
"""From aligned faces (1, 3, 512, 512) in 0..1 to restored ones."""


@dataclass(frozen=True, kw_only=True)
class RestoredFace:
    """A restored face and the square of the input that it belongs to, which may reach beyond the borders.

    `top`, `left` and `side` are whole px of the input; `pixels` is (1, 3, 512, 512) float32, 0..1, on the CPU.
    """

    top: int
    left: int
    side: int
    pixels: Tensor


def restore_faces(
    image: Pixels, faces: Iterable[Box], restore: Restore, *, max_px: int, on_face: Callable[[], None]
) -> list[RestoredFace]:
    """Restore the small faces of a picture.

    Args:
        image: (1, 3, H, W) float32, 0..1.
        faces: Where faces are.
        restore: The network.
        max_px: Faces that are higher are left as they are: there the picture knows better than the network.
        on_face: Called after each face; may raise to stop.
    """
    height, width = image.shape[-2:]
    restored = []
    for face in faces:
        face_px = (face.bottom - face.top) * height
        if not LEAST_FACE_PX <= face_px <= max_px:
            continue
        side = round(CUT_SIDES * face_px)
        top = round((face.top + CUT_CENTRE * (face.bottom - face.top)) * height - side / 2)
        left = round((face.left + face.right) / 2 * width - side / 2)
        cut = Lanczos()(_cut(image, top, left, side), (SIDE_PX, SIDE_PX))
        octaves = max(1, 1 + round(math.log2(SIDE_PX / side)))
        made = restore(cut).float().cpu().clamp(0, 1)
        kept = wavelet_match(made, cut, levels=octaves, chroma_levels=octaves, amount=1.0)
        restored.append(RestoredFace(top=top, left=left, side=side, pixels=kept))
        on_face()
    return restored


def with_faces(
    bands: Iterable[Tensor],
    faces: Sequence[RestoredFace],
    *,
    source: tuple[int, int],
    size: tuple[int, int],
    weight: float,
) -> Iterator[Tensor]:
    """Paste restored faces into a result that passes by.

    Args:
        bands: (1, 3, rows, W), from top to bottom.
        faces: Of `restore_faces`.
        source: (height, width) in px of the picture that they were cut out of.
        size: (height, width) in px of the result.
        weight: 0..1, of the restored face against what is there.

    Yields:
        The bands; where no face is, they are what they were.
    """
    top = 0
    for band in bands:
        band = band.clone() if faces else band
        for face in faces:
            _paste(face, band, top, source, size, weight)
        top += band.shape[-2]
        yield band


def _cut(image: Pixels, top: int, left: int, side: int) -> Tensor:
    """A square of the picture (1, 3, side, side), continued beyond the borders with the last pixels."""
    height, width = image.shape[-2:]
    first, last = min(max(0, top), height - 1), min(max(1, top + side), height)
    inside = image[..., first:last, :]
    rows = torch.arange(top, top + side).clamp(first, last - 1) - first
    columns = torch.arange(left, left + side).clamp(0, width - 1)
    return inside[..., rows, :][..., columns].float().cpu()


def _paste(
    face: RestoredFace, band: Tensor, band_top: int, source: tuple[int, int], size: tuple[int, int], weight: float
) -> None:
    """Blend a face into a band, in place."""
    scale_y, scale_x = size[0] / source[0], size[1] / source[1]
    top, left = math.ceil(max(0.0, face.top * scale_y)), math.ceil(max(0.0, face.left * scale_x))
    top, bottom = max(top, band_top), min((face.top + face.side) * scale_y, size[0], band_top + band.shape[-2])
    bottom, right = math.floor(bottom), math.floor(min((face.left + face.side) * scale_x, size[1]))
    if top >= bottom or left >= right:
        return
    # Where those rows and columns lie in the restored face, in its own px.
    per_y, per_x = SIDE_PX / (face.side * scale_y), SIDE_PX / (face.side * scale_x)
    box = (
        (left - face.left * scale_x) * per_x,
        (top - face.top * scale_y) * per_y,
        (right - face.left * scale_x) * per_x,
        (bottom - face.top * scale_y) * per_y,
    )
    restored = lanczos_part(face.pixels, (right - left, bottom - top), box).to(band)
    y = (torch.arange(top, bottom) + 0.5) / scale_y - face.top
    x = (torch.arange(left, right) + 0.5) / scale_x - face.left
    radius = ((2 * y[:, None] / face.side - 1) ** 2 + (2 * x[None] / face.side - 1) ** 2).sqrt()
    inside = ((1 - radius) / FEATHER).clamp(0, 1)
    share = (weight * inside**2 * (3 - 2 * inside)).to(band)  # smooth at both ends
    place = band[..., top - band_top : bottom - band_top, left:right]
    place.lerp_(restored, share)
