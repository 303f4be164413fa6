"""Small pictures of unfinished latents, for somebody who waits: cheap, and close enough to see where it goes.

The VAE would cost as much as several steps. Latents say nearly linearly what the colours of their place are; the line
is fitted once for each pass, by least squares between the start latents and the picture that they were encoded from,
so it holds for every VAE. Shown is that picture, with the difference between the colours of the latents now and at the
start, as the model expects them to end.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pipelines.spool import Pixels

SIDE_PX = 512
"""Longest side of a preview."""
FITTED_SIDE = 64
"""Latents on the longest side that the line is fitted on."""


class Painter:
    """Previews of one pass.

    Args:
        start: (1, C, h, w) float32, the latents of `picture`, free of noise.
        picture: (1, 3, H, W) float32, 0..1, padded to what VAE and denoiser can halve.
        size: (height, width) in px that a result is cut to.
    """

    def __init__(self, start: Tensor, picture: Pixels, size: tuple[int, int]) -> None:
        height, width = picture.shape[-2:]
        factor = min(1.0, SIDE_PX / max(height, width))
        self._sides = max(1, round(height * factor)), max(1, round(width * factor))
        self._shown = max(1, round(size[0] * factor)), max(1, round(size[1] * factor))
        self._picture = _small(picture, self._sides)
        # No larger than what is shown: a picture of 16,000 px has latents of 2,000.
        self._grid = tuple(min(*sides) for sides in zip(start.shape[-2:], self._sides, strict=True))
        self._line = _fitted(start, self._picture)
        self._before = self._colours(start)

    def __call__(self, latents: Tensor) -> Image.Image:
        """An RGB picture of latents of the shape of `start`, of which no noise is left but the model's doubt."""
        change = self._colours(latents) - self._before
        pixels = self._picture + F.interpolate(change, self._sides, mode="bilinear")
        height, width = self._shown
        levels = (pixels[0, :, :height, :width].clamp(0, 1) * 255).round().to(torch.uint8)
        return Image.fromarray(levels.permute(1, 2, 0).contiguous().numpy())

    def _colours(self, latents: Tensor) -> Tensor:
        """The colours (1, 3, h, w) that the line gives for latents, on the CPU."""
        small = F.interpolate(latents, self._grid, mode="area")[0].float().cpu()
        return torch.einsum("ck,chw->khw", self._line, small)[None]


def lazily(make: Callable[[], Painter]) -> Callable[[Tensor], Image.Image]:
    """A painter that is made when the first picture is wanted: short runs need none."""
    made: list[Painter] = []

    def paint(latents: Tensor) -> Image.Image:
        if not made:
            made.append(make())
        return made[0](latents)

    return paint


def _fitted(start: Tensor, picture: Tensor) -> Tensor:
    """The line (C, 3) from latents to colours; what is constant goes out in differences."""
    factor = min(1.0, FITTED_SIDE / max(start.shape[-2:]))
    sides = tuple(max(1, round(side * factor)) for side in start.shape[-2:])
    pair = (F.interpolate(one.float().cpu(), sides, mode="area") for one in (start, picture))
    latents, colours = (one[0].flatten(1).T for one in pair)
    latents, colours = latents - latents.mean(dim=0), colours - colours.mean(dim=0)
    # A flat picture tells nothing about colours: held towards zero it gives none rather than any.
    gram = latents.T @ latents + 1e-3 * len(latents) * torch.eye(latents.shape[1])
    return torch.linalg.solve(gram, latents.T @ colours)


def _small(picture: Pixels, sides: tuple[int, int]) -> Tensor:
    """A picture (1, 3, H, W) reduced to `sides`, on the CPU; of one in a file, only as many rows are read."""
    if isinstance(picture, Tensor):
        return F.interpolate(picture.float(), sides, mode="area").cpu()
    step = picture.shape[-2] / sides[0]
    rows = [picture[..., int(n * step) : int(n * step) + 1, :] for n in range(sides[0])]
    return F.interpolate(torch.cat(rows, dim=-2).float(), sides, mode="area").cpu()
