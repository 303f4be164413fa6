"""Tile grids cover the picture exactly once, however they are moved."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.tiling import Grid, Tile, blend_weights, fit_grid, fuse, gather


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    """Grids of any shape, single tiles and thin strips included."""
    max_tile = 8 * draw(st.integers(1, 12))
    return fit_grid(
        draw(st.integers(1, 300)),
        draw(st.integers(1, 300)),
        max_tile=max_tile,
        overlap=draw(st.integers(0, max_tile // 2)),
    )


@st.composite
def moved_grids(draw: st.DrawFn) -> tuple[Grid, int, int]:
    """A grid and an offset that it allows."""
    grid = draw(grids().filter(lambda grid: len(grid.tops) * len(grid.lefts) <= 120))
    return (
        grid,
        draw(st.integers(-grid.slack_y, grid.slack_y)),
        draw(st.integers(-grid.slack_x, grid.slack_x)),
    )


@given(moved_grids())
@settings(deadline=None, max_examples=150)
def test_weights_are_a_partition_of_unity(moved: tuple[Grid, int, int]) -> None:
    """At any size, tile, overlap and offset the weights of all tiles add to one at every position."""
    grid, offset_y, offset_x = moved
    tiles, weights = grid.tiles(offset_y, offset_x), blend_weights(grid, offset_y, offset_x)

    total = torch.zeros(1, 1, grid.height, grid.width)
    fuse(torch.ones_like(weights), tiles, weights, total)

    assert weights.shape == (len(tiles), 1, grid.tile_height, grid.tile_width)
    assert weights.min() >= 0
    assert torch.allclose(total, torch.ones_like(total), atol=1e-6, rtol=0)


@given(moved_grids())
@settings(deadline=None, max_examples=150)
def test_tiles_are_inside_flush_and_of_one_shape(moved: tuple[Grid, int, int]) -> None:
    """Moved or not, every tile lies inside, has the grid's shape, and the outer ones touch the border."""
    grid, offset_y, offset_x = moved
    tiles = grid.tiles(offset_y, offset_x)

    assert {(tile.bottom - tile.top, tile.right - tile.left) for tile in tiles} == {(grid.tile_height, grid.tile_width)}
    assert min(tile.top for tile in tiles) == 0 == min(tile.left for tile in tiles)
    assert max(tile.bottom for tile in tiles) == grid.height
    assert max(tile.right for tile in tiles) == grid.width
    for starts, side in ((grid.tops, grid.tile_height), (grid.lefts, grid.tile_width)):
        assert all(right - left <= side - grid.overlap for left, right in itertools.pairwise(starts))


@given(grids())
def test_tile_sides_are_multiples_unless_they_are_the_whole_side(grid: Grid) -> None:
    """A side is either covered by one tile of its own length or by tiles that the model's strides divide."""
    for tile, side, starts in (
        (grid.tile_height, grid.height, grid.tops),
        (grid.tile_width, grid.width, grid.lefts),
    ):
        assert (len(starts) == 1 and tile == side) or (len(starts) > 1 and tile % 8 == 0)


@pytest.mark.parametrize(
    ("side", "max_tile", "overlap", "tile", "count"),
    [
        (256, 144, 16, 144, 2),  # fits in tiles of 136 exactly, which leaves nothing to move
        (256, 136, 16, 144, 2),
        (256, 72, 8, 72, 4),
        (512, 64, 8, 72, 9),
        (250, 136, 16, 136, 2),
        (96, 96, 16, 96, 1),
        (97, 96, 16, 64, 2),
        (3, 96, 16, 3, 1),
    ],
)
def test_tiles_shrink_to_fit(side: int, max_tile: int, overlap: int, tile: int, count: int) -> None:
    """As few tiles as the longest side allows, and no longer than that number needs plus room to move."""
    grid = fit_grid(side, 64, max_tile=max_tile, overlap=overlap)

    assert (grid.tile_height, len(grid.tops)) == (tile, count)
    assert count == 1 or grid.slack_y > 0


def test_one_tile_is_the_untiled_latent() -> None:
    """A picture that fits in one tile is gathered and fused bit for bit."""
    latents = torch.randn(1, 4, 40, 56)
    grid = fit_grid(40, 56, max_tile=64, overlap=8)
    out = torch.zeros_like(latents)

    fuse(gather(latents, grid.tiles()), grid.tiles(), blend_weights(grid), out)

    assert grid.tiles() == [Tile(0, 0, 40, 56)]
    assert torch.equal(out, latents)


@given(moved_grids())
@settings(deadline=None, max_examples=40)
def test_a_pointwise_model_hides_the_tiling(moved: tuple[Grid, int, int]) -> None:
    """A model that looks at one position only gives the same fused prediction with and without tiles."""
    grid, offset_y, offset_x = moved
    ramp = torch.linspace(-3, 3, grid.height)[:, None] + torch.linspace(-1, 1, grid.width)
    latents = torch.stack([ramp, ramp.sin(), torch.ones_like(ramp)])[None]
    tiles, weights = grid.tiles(offset_y, offset_x), blend_weights(grid, offset_y, offset_x)
    out = torch.zeros_like(latents)

    fuse(gather(latents, tiles).tanh(), tiles, weights, out)

    assert torch.allclose(out, latents.tanh(), atol=1e-6, rtol=0)


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_tile_batches_do_not_change_a_bit(batch: int) -> None:
    """However the tiles are batched, the fused prediction has the same bits."""
    grid = fit_grid(100, 130, max_tile=48, overlap=12)
    tiles, weights = grid.tiles(), blend_weights(grid)
    predictions = torch.randn(len(tiles), 4, grid.tile_height, grid.tile_width)
    whole, parts = torch.zeros(1, 4, 100, 130), torch.zeros(1, 4, 100, 130)

    fuse(predictions, tiles, weights, whole)
    for start in range(0, len(tiles), batch):
        part = slice(start, start + batch)
        fuse(predictions[part], tiles[part], weights[part], parts)

    assert torch.equal(whole, parts)


def test_tile_order_changes_round_off_only() -> None:
    """Adding the tiles in another order moves the fused prediction by less than 1e-5."""
    grid = fit_grid(100, 130, max_tile=48, overlap=12)
    tiles, weights = grid.tiles(1, -1), blend_weights(grid, 1, -1)
    predictions = torch.randn(len(tiles), 4, grid.tile_height, grid.tile_width)
    order = random.Random(5).sample(range(len(tiles)), len(tiles))
    straight, shuffled = torch.zeros(1, 4, 100, 130), torch.zeros(1, 4, 100, 130)

    fuse(predictions, tiles, weights, straight)
    fuse(predictions[order], [tiles[index] for index in order], weights[order], shuffled)

    assert (straight - shuffled).abs().max() < 1e-5


def test_jitter_is_deterministic_and_spreads() -> None:
    """The same step and seed give the same offset; twenty steps use most offsets and move the blend bands."""
    grid = fit_grid(256, 256, max_tile=136, overlap=16)
    offsets = [grid.jitter(step, seed=7) for step in range(20)]

    assert offsets == [grid.jitter(step, seed=7) for step in range(20)]
    assert offsets != [grid.jitter(step, seed=8) for step in range(20)]
    assert len({y for y, _ in offsets}) >= 12 <= len({x for _, x in offsets})
    assert {grid.tiles(y, x)[0] for y, x in offsets} == {Tile(0, 0, 144, 144)}
    assert not torch.equal(blend_weights(grid, *offsets[0]), blend_weights(grid, *offsets[1]))


def test_inner_tiles_move_with_the_grid() -> None:
    """With three tiles and more along a side the inner ones shift by the offset."""
    grid = fit_grid(300, 64, max_tile=96, overlap=8)
    offset = grid.slack_y

    tops = [tile.top for tile in grid.tiles(offset, 0)]

    assert offset > 0
    assert tops == [0, *(top + offset for top in grid.tops[1:-1]), grid.tops[-1]]


def test_half_precision_predictions_are_summed_in_the_precision_of_the_result() -> None:
    """Predictions of a half-precision model add up in float32."""
    grid = fit_grid(40, 100, max_tile=48, overlap=16)
    out = torch.zeros(1, 4, 40, 100)

    fuse(
        torch.ones(len(grid.tiles()), 4, 40, 64, dtype=torch.float16)[..., : grid.tile_width],
        grid.tiles(),
        blend_weights(grid),
        out,
    )

    assert out.dtype == torch.float32
    assert torch.allclose(out, torch.ones_like(out), atol=1e-6)


def test_impossible_requests_are_refused() -> None:
    """Sides and overlaps that make no grid, and offsets beyond the slack, raise with the numbers in the message."""
    with pytest.raises(ValueError, match="overlap of 96"):
        fit_grid(200, 200, max_tile=96, overlap=96)
    with pytest.raises(ValueError, match="multiple of 8"):
        fit_grid(200, 200, max_tile=90, overlap=8)
    with pytest.raises(ValueError, match="slack"):
        fit_grid(40, 40, max_tile=48, overlap=8).tiles(1, 0)
