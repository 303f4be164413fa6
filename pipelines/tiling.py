"""Tile grids fitted to the picture, and the weights that blend the tiles' predictions back into one.

All lengths are latent positions. A grid has equally large tiles: they batch, and compile once. From step to step the
grid moves (`Grid.jitter`) without ever needing one more row of tiles: the outer tiles stay flush with the border, the
others shift, and with them the bands in which two neighbours are cross-faded. A grid of two tiles moves its band only.

Blending divides each ramp by the sum of all ramps at a position, so the weights add to one wherever the tiles lie:
the fused prediction of a model that looks at one position only is exactly the untiled one (MultiDiffusion,
arXiv:2302.08113, equation 5, with weights that fall towards a tile's edge). Moving the grid is SpotDiffusion's idea
(arXiv:2407.15507).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import NamedTuple

import torch
from torch import Tensor

# Multiples of these irrational numbers spread evenly over 0..1 from the first few steps on; two, so that rows and
# columns do not move together.
_STRIDE_Y = (math.sqrt(5) - 1) / 2
_STRIDE_X = math.sqrt(2) - 1


class Tile(NamedTuple):
    """A box of latent positions, `bottom` and `right` exclusive."""

    top: int
    left: int
    bottom: int
    right: int


@dataclass(frozen=True, kw_only=True)
class Grid:
    """`len(tops)` × `len(lefts)` tiles of one shape that cover `height` × `width` latent positions.

    Neighbours share at least `overlap` positions, at any offset within `slack_y` and `slack_x`; `overlap` is also the
    width of the band in which they are cross-faded.
    """

    height: int
    width: int
    tile_height: int
    tile_width: int
    tops: tuple[int, ...]
    lefts: tuple[int, ...]
    overlap: int

    @property
    def slack_y(self) -> int:
        """The largest vertical offset, in either direction; 0 for one row of tiles."""
        return _slack(self.tops, self.tile_height, self.height, self.overlap)

    @property
    def slack_x(self) -> int:
        """The largest horizontal offset, in either direction; 0 for one column of tiles."""
        return _slack(self.lefts, self.tile_width, self.width, self.overlap)

    def jitter(self, step: int, seed: int) -> tuple[int, int]:
        """Return the (vertical, horizontal) offset of the grid at a step; the same for the same step and seed."""
        start = random.Random(seed)
        phase_y, phase_x = start.random(), start.random()
        return (
            _spread(phase_y + step * _STRIDE_Y, self.slack_y),
            _spread(phase_x + step * _STRIDE_X, self.slack_x),
        )

    def tiles(self, offset_y: int = 0, offset_x: int = 0) -> list[Tile]:
        """Return the tiles row by row, all inside and together covering everything.

        Raises:
            ValueError: an offset is larger than the slack.
        """
        self._check(offset_y, offset_x)
        return [
            Tile(top, left, top + self.tile_height, left + self.tile_width)
            for top, left in product(_shifted(self.tops, offset_y), _shifted(self.lefts, offset_x))
        ]

    def _check(self, offset_y: int, offset_x: int) -> None:
        if abs(offset_y) > self.slack_y or abs(offset_x) > self.slack_x:
            raise ValueError(
                f"Offset ({offset_y}, {offset_x}) is beyond this grid's slack of ±({self.slack_y}, {self.slack_x})."
            )


def fit_grid(height: int, width: int, *, max_tile: int, overlap: int, multiple: int = 8) -> Grid:
    """Fit equal tiles to a latent: as few as `max_tile` allows, then as small as that number allows.

    A side of at most `max_tile` is one tile of exactly that side; padding it to what the model needs is the caller's
    business. Other tile sides are multiples of `multiple`. Where the fitted tiles leave nothing to move, they get
    one `multiple` more, even beyond `max_tile`, so that the blend bands can move from step to step.

    Args:
        height: Of the latent.
        width: Of the latent.
        max_tile: The longest tile side, a multiple of `multiple`.
        overlap: The least number of positions shared by neighbours, below `max_tile`.
        multiple: What tile sides must divide by, from the strides of the model.

    Raises:
        ValueError: the arguments do not describe a grid.
    """
    if min(height, width, max_tile, multiple) < 1 or max_tile % multiple or not 0 <= overlap < max_tile:
        raise ValueError(
            f"Expected positive sizes, a tile side that is a multiple of {multiple} and a smaller overlap; got latents "
            f"of {height}x{width}, a tile side of {max_tile} and an overlap of {overlap}."
        )
    tile_height, tops = _fit_side(height, max_tile, overlap, multiple)
    tile_width, lefts = _fit_side(width, max_tile, overlap, multiple)
    return Grid(
        height=height,
        width=width,
        tile_height=tile_height,
        tile_width=tile_width,
        tops=tops,
        lefts=lefts,
        overlap=overlap,
    )


def blend_weights(grid: Grid, offset_y: int = 0, offset_x: int = 0) -> Tensor:
    """Return the weight of every tile at each of its positions, adding to one over the tiles at every position.

    Args:
        grid: The grid.
        offset_y: The vertical offset that `grid.tiles` was given.
        offset_x: The horizontal offset that `grid.tiles` was given.

    Returns:
        (num_tiles, 1, tile_height, tile_width) float32 on the CPU in 0..1, in the order of `grid.tiles`. Zero outside
        a tile's blend bands: there it is context for the model only.
    """
    grid._check(offset_y, offset_x)
    rows = _side_weights(grid.tops, grid.tile_height, grid.height, grid.overlap, offset_y)
    columns = _side_weights(grid.lefts, grid.tile_width, grid.width, grid.overlap, offset_x)
    weights = rows[:, None, :, None] * columns[None, :, None, :]  # (rows, columns, th, tw)
    return weights.reshape(-1, 1, grid.tile_height, grid.tile_width)


def surround(grid: Grid, tiles: Sequence[Tile], weights: Tensor, boxes: Sequence[Tile]) -> tuple[list[Tile], Tensor]:
    """Give each box a tile of its own, so that no other tile's edge is blended into it.

    Args:
        grid: The grid.
        tiles: Its tiles, wherever they are moved to.
        weights: (len(tiles), 1, th, tw) of `blend_weights` for them.
        boxes: On the latent. One that is larger than a tile, and all in a grid of one tile, are left as they are.

    Returns:
        The tiles with those of the boxes after them, and weights that still add to one at every position: 1 in the
        box's own tile inside the box, falling to 0 over the grid's overlap around it.
    """
    tiles, weights = list(tiles), weights.clone()
    if len(tiles) == 1:
        return tiles, weights
    for box in boxes:
        if box.bottom - box.top > grid.tile_height or box.right - box.left > grid.tile_width:
            continue
        top = _around(box.top, box.bottom, grid.tile_height, grid.height)
        left = _around(box.left, box.right, grid.tile_width, grid.width)
        own = Tile(top, left, top + grid.tile_height, left + grid.tile_width)
        rows = _fading(own.top, own.bottom, box.top, box.bottom, grid.overlap)
        columns = _fading(own.left, own.right, box.left, box.right, grid.overlap)
        share = rows[:, None] * columns[None]
        for tile, weight in zip(tiles, weights, strict=True):
            upper, outer = max(tile.top, own.top), max(tile.left, own.left)
            lower, inner = min(tile.bottom, own.bottom), min(tile.right, own.right)
            if upper < lower and outer < inner:
                weight[0, upper - tile.top : lower - tile.top, outer - tile.left : inner - tile.left] *= (
                    1 - share[upper - own.top : lower - own.top, outer - own.left : inner - own.left]
                )
        tiles.append(own)
        weights = torch.cat([weights, share[None, None].to(weights)])
    return tiles, weights


def gather(latents: Tensor, tiles: Sequence[Tile]) -> Tensor:
    """Copy tiles of one shape out of (1, C, H, W) latents; returns (len(tiles), C, th, tw), same dtype and device."""
    return torch.cat([latents[:, :, top:bottom, left:right] for top, left, bottom, right in tiles])


def fuse(predictions: Tensor, tiles: Sequence[Tile], weights: Tensor, out: Tensor) -> None:
    """Add weighted tile predictions to `out`, in place.

    Tiles are added one after the other, so the sum does not depend on how they were batched, nor, as an atomic
    scatter would on a GPU, on chance.

    Args:
        predictions: (N, C, th, tw).
        tiles: N tiles.
        weights: (N, 1, th, tw), rows of `blend_weights` on the device of `out`.
        out: (1, C, H, W), usually float32 zeros before the first batch.
    """
    weighted = predictions.to(out.dtype) * weights
    for (top, left, bottom, right), tile in zip(tiles, weighted, strict=True):
        out[0, :, top:bottom, left:right] += tile


def _fit_side(side: int, max_tile: int, overlap: int, multiple: int) -> tuple[int, tuple[int, ...]]:
    """The tile side and the evenly spread starts of the tiles."""
    if side <= max_tile:
        return side, (0,)
    count = math.ceil((side - overlap) / (max_tile - overlap))
    tile = multiple * math.ceil((side + (count - 1) * overlap) / (multiple * count))
    starts = _even_starts(side, tile, count)
    if _slack(starts, tile, side, overlap) == 0 and tile + multiple < side:
        tile += multiple
        starts = _even_starts(side, tile, count)
    return tile, starts


def _even_starts(side: int, tile: int, count: int) -> tuple[int, ...]:
    return tuple(round(index * (side - tile) / (count - 1)) for index in range(count))


def _slack(starts: Sequence[int], tile: int, side: int, overlap: int) -> int:
    """How far a grid can move: its outer bands stay inside the outer tiles, its inner tiles inside the latent."""
    if len(starts) == 1:
        return 0
    room = min((tile - starts[1] - overlap) // 2, (tile - (starts[-1] - starts[-2]) - overlap) // 2)
    if len(starts) > 2:
        room = min(room, starts[1], side - tile - starts[-2])
    return room


def _spread(phase: float, slack: int) -> int:
    """Map the fraction of `phase` evenly to -slack..slack."""
    return math.floor((phase % 1.0) * (2 * slack + 1)) - slack


def _shifted(starts: Sequence[int], offset: int) -> list[int]:
    return [starts[0], *(start + offset for start in starts[1:-1]), *starts[1:][-1:]]


def _side_weights(starts: Sequence[int], tile: int, side: int, overlap: int, offset: int) -> Tensor:
    """Weights along one side, (tiles, tile) float32: ramps over the moved bands, divided by their sum."""
    bands = [right + (left + tile - right - overlap) // 2 + offset for left, right in pairwise(starts)]
    opens = [-side, *bands]
    closes = [*(band + overlap for band in bands), 2 * side]
    moved = _shifted(starts, offset)
    ramps = torch.zeros(len(starts), side, dtype=torch.float64)
    for ramp, start, first, end in zip(ramps, moved, opens, closes, strict=True):
        position = torch.arange(start, start + tile, dtype=torch.float64)
        nearest = torch.minimum(position - first + 1, end - position) / (overlap + 1)
        ramp[start : start + tile] = nearest.clamp(0, 1)
    shares = ramps / ramps.sum(dim=0)
    return torch.stack([share[start : start + tile] for share, start in zip(shares, moved, strict=True)]).float()


def _around(first: int, end: int, tile: int, side: int) -> int:
    """Where a tile starts that has a span in its middle, as far as the border allows."""
    return min(max(0, (first + end - tile) // 2), side - tile)


def _fading(start: int, stop: int, first: int, end: int, width: int) -> Tensor:
    """1 from `first` to `end`, falling to 0 over `width` positions on both sides, for positions `start` to `stop`."""
    position = torch.arange(start, stop)
    distance = torch.maximum(first - position, position - end + 1).clamp(min=0)
    return (1 - distance / (width + 1)).clamp(min=0)
