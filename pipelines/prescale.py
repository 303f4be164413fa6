"""The pre-stage: enlarge a picture to the exact output size, before diffusion redraws its detail.

`NetworkPreStage` runs a super-resolution network (`weights.superres`: Compact, ESRGAN, Real-ESRGAN, 4x-UltraSharp) as
often as needed, in tiles; `Lanczos` is the classic filter and finishes what the network overshoots. Both can also
deliver their result in bands, so that a picture larger than memory can be enlarged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from pipelines.bands import cut
from pipelines.errors import ModelsUnusable, NonFiniteResult
from pipelines.spool import Pixels, Spool
from weights.compact import load_compact
from weights.rrdbnet import UnsuitableNetwork
from weights.store import WeightStore
from weights.superres import SUFFIXES, find_network, load_network

TILE_PX = 1024
"""Side of the area that a network makes at once, of its result."""
HALO_PX = 32
"""Margin of input around it: as far as large networks look, in practice."""
BAND_PX = 2**19
"""Most pixels in one band of a result, where the least height of a band allows."""
LEAST_BAND_ROWS = 128
"""Of input: lower bands would compute more margin than picture."""
FREE_FACTOR = 4
"""Up to so many times the sides of the input a network's whole result is kept."""
FOLD_PX = 4
"""Bands begin at multiples of this: networks that fold pixels into channels see the same blocks in every band."""


def nothing() -> None:
    """Nobody listens."""


class PreStage(Protocol):
    """Anything that enlarges a picture."""

    def __call__(
        self, image: Tensor, size: tuple[int, int], on_tile: Callable[[], None] = nothing, *, seed: int = 0
    ) -> Tensor:
        """Resize an image.

        Args:
            image: (1, 3, h, w) float32, 0..1.
            size: Wanted (height, width) in px.
            on_tile: Called after each piece of work; may raise to stop.
            seed: Decides all noise; pre-stages without noise ignore it.

        Returns:
            (1, 3, height, width) float32, clamped to 0..1, on the device of `image`.
        """


class BandedPreStage(PreStage, Protocol):
    """A pre-stage for pictures of any size."""

    def bands(
        self, image: Pixels, size: tuple[int, int], on_tile: Callable[[], None] = nothing, *, seed: int = 0
    ) -> Iterator[Tensor]:
        """Resize an image as `__call__` does, delivered as bands (1, 3, rows, width) from top to bottom."""
        ...


class Lanczos:
    """Windowed sinc of three lobes, widened to the source's pixels when a picture gets smaller; works on the CPU."""

    def __call__(
        self, image: Tensor, size: tuple[int, int], on_tile: Callable[[], None] = nothing, *, seed: int = 0
    ) -> Tensor:
        """Resize an image; see `PreStage`."""
        height, width = size
        if image.shape[-2:] == (height, width):
            return image
        resized = torch.empty(1, image.shape[1], height, width)
        for source, target in zip(image[0].float().cpu(), resized[0], strict=True):
            channel = Image.fromarray(source.numpy()).resize((width, height), Image.Resampling.LANCZOS)
            target.copy_(torch.from_numpy(np.array(channel)))
        return resized.clamp_(0, 1).to(image.device)

    def bands(
        self, image: Pixels, size: tuple[int, int], on_tile: Callable[[], None] = nothing, *, seed: int = 0
    ) -> Iterator[Tensor]:
        """Resize an image; see `BandedPreStage`."""
        yield from lanczos_bands(image, size, image.shape[-2:], on_tile)


def lanczos_bands(
    image: Pixels, size: tuple[int, int], covered: Sequence[float], on_tile: Callable[[], None]
) -> Iterator[Tensor]:
    """Resize the upper left of a picture with Lanczos' filter, band by band.

    Args:
        image: (1, 3, h, w), 0..1.
        size: Wanted (height, width) in px.
        covered: (height, width) in px of `image` of what is resized, with fractions. What reaches beyond the borders
            continues the last pixels.
        on_tile: Called after each band; may raise to stop.

    Yields:
        Bands (1, 3, rows, width), clamped to 0..1, from top to bottom.
    """
    height, width = size
    source_height, source_width = image.shape[-2:]
    ratio = covered[0] / height
    reach = 3 * max(1.0, ratio)
    rows = max(16, BAND_PX // max(width, math.ceil(ratio * source_width)))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        upper, lower = max(0, math.floor(top * ratio - reach)), math.ceil(bottom * ratio + reach)
        slab = image[..., upper : min(source_height, lower), :]
        if (source_height, source_width) == size == tuple(covered):
            band = image[..., top:bottom, :]
        else:
            box = (0.0, top * ratio - upper, float(covered[1]), bottom * ratio - upper)
            right, below = (max(0, math.ceil(end - 1e-6)) for end in (box[2] - slab.shape[-1], box[3] - slab.shape[-2]))
            slab = F.pad(slab, (0, right, 0, below), mode="replicate") if right or below else slab
            box = (*box[:2], min(box[2], slab.shape[-1]), min(box[3], slab.shape[-2]))
            band = lanczos_part(slab, (width, bottom - top), box)
        on_tile()
        yield band.clamp(0, 1)


def lanczos_part(image: Tensor, size: tuple[int, int], box: tuple[float, float, float, float]) -> Tensor:
    """Resize a part of a picture with Lanczos' filter, which looks at what is around the part too.

    Args:
        image: (1, C, H, W).
        size: Wanted (width, height) in px.
        box: Left, top, right and bottom in px of `image`, with fractions.

    Returns:
        (1, C, height, width) float32 on the CPU, not clamped.
    """
    channels = (Image.fromarray(channel.numpy()) for channel in image[0].float().cpu())
    resized = (channel.resize(size, Image.Resampling.LANCZOS, box=box) for channel in channels)
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in resized]))[None]


class NetworkPreStage:
    """Enlarge with a network of a whole factor as often as needed, and by a filter take away what is too much.

    Tiles are computed with a margin and only their centres are kept: as long as the margin is no narrower than the
    reach of the network, the result is that of one pass over the whole picture.

    Args:
        model: Maps (1, 3, h, w) in 0..1 to `upscale` times the sides; used on the device and in the type of its
            parameters. See `weights.superres.Network`.
        tile_px: Side of a tile's centre, in input px; 1024 px of the result unless given.
        halo_px: Margin around it; `HALO_PX`, or the reach of the network where it tells a smaller one.
    """

    def __init__(self, model: nn.Module, *, tile_px: int | None = None, halo_px: int | None = None) -> None:
        self.model = model
        self.factor = int(getattr(model, "upscale", 1))
        self.tile_px = tile_px or TILE_PX // self.factor
        self.halo_px = min(HALO_PX, int(getattr(model, "receptive_px", HALO_PX))) if halo_px is None else halo_px

    @torch.inference_mode()
    def __call__(
        self, image: Tensor, size: tuple[int, int], on_tile: Callable[[], None] = nothing, *, seed: int = 0
    ) -> Tensor:
        """Resize an image; see `PreStage`. An image that already has the size is returned as it is."""
        if image.shape[-2:] == tuple(size):
            return image
        return torch.cat(list(self.bands(image, size, on_tile)), dim=-2).to(image.device)

    @torch.inference_mode()
    def bands(
        self, image: Pixels, size: tuple[int, int], on_tile: Callable[[], None] = nothing, *, seed: int = 0
    ) -> Iterator[Tensor]:
        """Resize an image; see `BandedPreStage`. What lies between two passes of the network is spooled.

        What the network overshoots is taken away behind the first passes, at `FREE_FACTOR` times the sides: the later
        ones then end at the size exactly, and no picture between is larger than the result. For fewer passes, where
        the network's whole result is worth most, it is taken away at the end.
        """
        num_passes, num_free = self._passes(image, size)
        for i in range(num_passes):
            if i == num_free:
                later = self.factor ** (num_passes - i)
                sides = (math.ceil(size[0] / later), math.ceil(size[1] / later))
                covered = [
                    own * side * later / whole for own, side, whole in zip(image.shape[-2:], sides, size, strict=True)
                ]
                if sides != tuple(image.shape[-2:]):
                    image = Spool.of(lanczos_bands(image, sides, covered, on_tile), *sides)
            height, width = self.factor * image.shape[-2], self.factor * image.shape[-1]
            rows = max(LEAST_BAND_ROWS, BAND_PX // (self.factor * width) // FOLD_PX * FOLD_PX)
            enlarged = self._enlarged(image, min(self.tile_px, rows), on_tile)
            if i + 1 == num_passes and (num_passes > num_free or (height, width) == size):
                yield from cut(enlarged, *size)
                return
            image = Spool.of(enlarged, height, width)
        yield from Lanczos().bands(image, size, on_tile)

    def _passes(self, image: Pixels, size: tuple[int, int]) -> tuple[int, int]:
        """How often the network runs in all, and how often before anything is taken away."""
        num_passes = num_free = 0
        while self.factor > 1 and any(
            self.factor**num_passes * own < wanted for own, wanted in zip(image.shape[-2:], size, strict=True)
        ):
            num_passes += 1
            num_free += self.factor ** (num_passes - 1) < FREE_FACTOR
        return num_passes, num_free

    def _enlarged(self, image: Pixels, tile_rows: int, on_tile: Callable[[], None]) -> Iterator[Tensor]:
        """Bands (1, 3, rows, factor · w), float32, one network pass per tile."""
        height, width = image.shape[-2:]
        like = next(self.model.parameters())
        for top in range(0, height, tile_rows):
            bottom = min(top + tile_rows, height)
            upper = max(top - self.halo_px, 0)
            band = torch.empty(1, 3, self.factor * (bottom - top), self.factor * width)
            for left in range(0, width, self.tile_px):
                right = min(left + self.tile_px, width)
                outer = max(left - self.halo_px, 0)
                tile = image[..., upper : bottom + self.halo_px, outer : right + self.halo_px]
                result = self.model(tile.to(like))
                rows, columns = self.factor * (top - upper), self.factor * (left - outer)
                band[..., self.factor * left : self.factor * right] = result[
                    ...,
                    rows : rows + self.factor * (bottom - top),
                    columns : columns + self.factor * (right - left),
                ]
                on_tile()
            if not torch.isfinite(band).all():
                raise NonFiniteResult("The pre-upscaler's network makes values that are not finite.")
            yield band.clamp_(0, 1)


def load_prestage(store: WeightStore, device: torch.device) -> NetworkPreStage | Lanczos:
    """The pre-stage of a set of weights: the network file in `upscaler`, else the set's Compact network, else Lanczos.

    Raises:
        ModelsUnusable: The file in `upscaler` cannot be read, or there are several.
    """
    network = network_in(store, "upscaler", load_network)
    if network is not None:
        return NetworkPreStage(network.to(device))
    if store.has("upscaler-compact-x2"):
        return NetworkPreStage(load_compact(store.folder("upscaler-compact-x2")).to(device))
    return Lanczos()


def network_in(
    store: WeightStore, part: str, load: Callable[[Path], nn.Module], *, suffixes: Sequence[str] = SUFFIXES
) -> nn.Module | None:
    """The network in the one file of a part of a set of weights; None where there is none.

    Raises:
        ModelsUnusable: The file cannot be read, or there are several.
    """
    if not store.has(part):
        return None
    try:
        file = find_network(store.folder(part), suffixes)
        return None if file is None else load(file)
    except UnsuitableNetwork as error:
        raise ModelsUnusable(f"The file in the weights' folder `{part}` cannot be used: {error}") from error
