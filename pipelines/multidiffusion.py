"""One denoising loop over tiles, shared by every family of diffusion models.

At each step the model's output for all tiles is fused into one prediction for the whole latent, after guidance, and
the scheduler steps once. For solvers that are linear in their inputs this equals a solver per tile; for stochastic
ones it is the only version with the right noise. Noise, seed and sampler state are global, so the result does not
depend on how tiles are batched (MultiDiffusion, arXiv 2302.08113, equations 3 to 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from pipelines.samplers import Sampler
from pipelines.tiling import Grid, Tile, blend_weights, fuse, gather, surround

ConditioningT = TypeVar("ConditioningT", contravariant=True)


class Denoiser(Protocol[ConditioningT]):
    """A family of models behind one question: what is in these tiles?"""

    def predict(self, tiles: Tensor, places: Sequence[Tile], timestep: float, conditioning: ConditioningT) -> Tensor:
        """Predict the noise in latent tiles (or the velocity, for flow models), guidance included.

        Args:
            tiles: (N, C, h, w), float32, scaled to the variance the model expects.
            places: Where each tile lies on the latent; what the model knows of the whole picture is cut there.
            timestep: Position in the training schedule; need not be whole.
            conditioning: What `encode` of the same family returned for the whole picture.

        Returns:
            (N, C, h, w), float32.
        """
        ...


def tiled_denoise(
    model: Denoiser[ConditioningT],
    sample: Tensor,
    sampler: Sampler,
    conditioning: ConditioningT,
    *,
    grid: Grid,
    tile_batch: int,
    seed: int,
    whole: Sequence[Tile] = (),
    watch: Callable[[Callable[[], Tensor]], None] = lambda estimate: None,
    on_step: Callable[[int], None] = lambda step: None,
    on_batch: Callable[[], None] = lambda: None,
) -> Tensor:
    """Denoise a whole latent tile by tile.

    Args:
        model: The family; its predictions are fused.
        sample: (1, C, H, W), float32: what `sampler.start` returned.
        sampler: The steps; made for this run.
        conditioning: Passed on to the model.
        grid: Tiles fitted to the latent.
        tile_batch: Tiles per call of the model; changes memory and speed, not the result.
        seed: Decides how the tile edges move from step to step.
        whole: Boxes of the latent that no tile edge may cut: each gets a tile of its own around it, whose prediction
            alone counts there. One that is larger than a tile is left to the grid.
        watch: Told before each `on_step` how to compute the clean latents that the model expects.
        on_step: Called after each step with its number, from 1; may raise to stop.
        on_batch: Called after each call of the model, of which a large picture has hundreds a step; likewise.

    Returns:
        (1, C, H, W), float32, free of noise.
    """
    for step in range(sampler.num_steps):
        shown, timestep = sampler.model_input(step, sample)
        offset = grid.jitter(step, seed)
        tiles, weights = surround(grid, grid.tiles(*offset), blend_weights(grid, *offset), whole)
        weights = weights.to(shown.device)
        prediction = fused_prediction(
            model, shown, timestep, conditioning, tiles, weights, tile_batch=tile_batch, on_batch=on_batch
        )
        watch(partial(sampler.estimate, step, prediction, sample))
        sample = sampler.advance(step, prediction, sample)
        on_step(step + 1)
    return sample


def fused_prediction(
    model: Denoiser[ConditioningT],
    model_input: Tensor,
    timestep: float,
    conditioning: ConditioningT,
    tiles: Sequence[Tile],
    weights: Tensor,
    *,
    tile_batch: int,
    on_batch: Callable[[], None] = lambda: None,
) -> Tensor:
    """The weighted mean of all tiles' predictions, (1, C, H, W); one full tile is passed through untouched.

    Args:
        model: Predicts in tiles.
        model_input: (1, C, H, W), float32.
        timestep: See `Denoiser.predict`.
        conditioning: Passed on to the model.
        tiles: Of one shape; together they cover everything.
        weights: (len(tiles), 1, th, tw) on the device of `model_input`, adding to one at every position.
        tile_batch: Tiles per call of the model.
        on_batch: Called after each call of the model; may raise to stop.
    """
    if len(tiles) == 1:
        fused = model.predict(model_input, tiles, timestep, conditioning)
        on_batch()
        return fused
    fused = torch.zeros_like(model_input)
    for batch in batches(len(tiles), tile_batch):
        places = tiles[batch]
        prediction = model.predict(gather(model_input, places), places, timestep, conditioning)
        fuse(prediction, places, weights[batch], fused)
        on_batch()
    return fused


def batches(num_tiles: int, tile_batch: int) -> Iterator[slice]:
    """Slices of at most `tile_batch` tiles, as even as they can be so that few batch shapes occur."""
    num_batches = -(-num_tiles // tile_batch)
    size = -(-num_tiles // num_batches)
    return (slice(start, min(start + size, num_tiles)) for start in range(0, num_tiles, size))
