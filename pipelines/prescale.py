"""The pre-stage: enlarge a picture to the exact output size, before diffusion redraws its detail.

`CompactPreStage` runs a small super-resolution network (Real-ESRGAN's SRVGGNetCompact, arXiv:2107.10833, BSD-3) that
doubles the picture as often as needed, in tiles; `Lanczos` is the classic filter and finishes what doubling overshoots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


def nothing() -> None:
    """Nobody listens."""


class PreStage(Protocol):
    """Anything that enlarges a picture."""

    def __call__(self, image: Tensor, size: tuple[int, int], on_tile: Callable[[], None] = nothing) -> Tensor:
        """Resize an image.

        Args:
            image: (1, 3, h, w) float32, 0..1.
            size: Wanted (height, width) in px.
            on_tile: Called after each piece of work; may raise to stop.

        Returns:
            (1, 3, height, width) float32, clamped to 0..1, on the device of `image`.
        """


class Lanczos:
    """Windowed sinc of three lobes, widened to the source's pixels when a picture gets smaller; works on the CPU."""

    def __call__(self, image: Tensor, size: tuple[int, int], on_tile: Callable[[], None] = nothing) -> Tensor:
        """Resize an image; see `PreStage`."""
        height, width = size
        if image.shape[-2:] == (height, width):
            return image
        resized = torch.empty(1, image.shape[1], height, width)
        for source, target in zip(image[0].float().cpu(), resized[0], strict=True):
            channel = Image.fromarray(source.numpy()).resize((width, height), Image.Resampling.LANCZOS)
            target.copy_(torch.from_numpy(np.array(channel)))
        return resized.clamp_(0, 1).to(image.device)


class CompactPreStage:
    """Enlarge with a ×2 network as often as needed, then shrink to the exact size.

    Tiles are computed with a margin and only their centres are kept: as long as the margin is no narrower than the
    reach of the network, the result is that of one pass over the whole picture.

    Args:
        model: Maps (1, 3, h, w) in 0..1 to (1, 3, 2h, 2w); used on the device and in the type of its parameters.
        tile_px: Side of a tile's centre, in input px.
        halo_px: Margin around it; Compact with 8 inner convolutions reaches 10 px.
    """

    def __init__(self, model: nn.Module, *, tile_px: int = 512, halo_px: int = 32) -> None:
        self.model = model
        self.tile_px = tile_px
        self.halo_px = halo_px

    @torch.inference_mode()
    def __call__(self, image: Tensor, size: tuple[int, int], on_tile: Callable[[], None] = nothing) -> Tensor:
        """Resize an image; see `PreStage`. An image that already has the size is returned as it is."""
        height, width = size
        while image.shape[-2] < height or image.shape[-1] < width:
            image = self._double(image, on_tile)
        return Lanczos()(image, size)

    def _double(self, image: Tensor, on_tile: Callable[[], None]) -> Tensor:
        """(1, 3, h, w) -> (1, 3, 2h, 2w), on the device of `image`, one network pass per tile."""
        height, width = image.shape[-2:]
        doubled = torch.empty(1, 3, 2 * height, 2 * width, device=image.device)
        like = next(self.model.parameters())
        for top in range(0, height, self.tile_px):
            for left in range(0, width, self.tile_px):
                bottom, right = min(top + self.tile_px, height), min(left + self.tile_px, width)
                upper, outer = max(top - self.halo_px, 0), max(left - self.halo_px, 0)
                tile = image[..., upper : bottom + self.halo_px, outer : right + self.halo_px]
                result = self.model(tile.to(like))
                rows, columns = 2 * (top - upper), 2 * (left - outer)
                doubled[..., 2 * top : 2 * bottom, 2 * left : 2 * right] = result[
                    ..., rows : rows + 2 * (bottom - top), columns : columns + 2 * (right - left)
                ]
                on_tile()
        return doubled.clamp_(0, 1)
