"""One denoising loop over tiles, shared by every family of diffusion models.

At each step the model's output for all tiles is fused into one prediction for the whole latent, after guidance, and
the scheduler steps once. For solvers that are linear in their inputs this equals a solver per tile; for stochastic
ones it is the only version with the right noise. Noise, seed and sampler state are global, so the result does not
depend on how tiles are batched (MultiDiffusion, arXiv 2302.08113, equations 3 to 5).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from pipelines.schedules import detail_bump, timestep_of_sigma
from pipelines.tiling import Grid, Tile, blend_weights, fuse, gather

ConditioningT = TypeVar("ConditioningT", contravariant=True)


class Denoiser(Protocol[ConditioningT]):
    """A family of models behind one question: which noise is in these tiles?"""

    alphas_cumprod: Tensor
    """Noise schedule the model was trained on, (T,), float32."""

    def predict_noise(
        self, tiles: Tensor, places: Sequence[Tile], timestep: float, conditioning: ConditioningT
    ) -> Tensor:
        """Predict the noise in latent tiles, guidance included.

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
    latents: Tensor,
    scheduler: SchedulerMixin,
    conditioning: ConditioningT,
    *,
    grid: Grid,
    tile_batch: int,
    seed: int,
    detail: float = 0.0,
    on_step: Callable[[int], None] = lambda step: None,
) -> Tensor:
    """Denoise a whole latent tile by tile.

    Args:
        model: The family; its predictions are fused.
        latents: (1, C, H, W), float32: the noised start in the scheduler's own scale.
        scheduler: A diffusers scheduler on variance-exploding latents (Euler), set to the wanted sigmas.
        conditioning: Passed on to the model.
        grid: Tiles fitted to the latent.
        tile_batch: Tiles per call of the model; changes memory and speed, not the result.
        seed: Decides how the tile edges move from step to step.
        detail: The model is told a noise level lower by up to this fraction in the middle steps, so that it leaves
            more fine structure (tiled-upscaler literature: "detail daemon"); 0 is the unchanged schedule.
        on_step: Called after each step with its number, from 1; may raise to stop.

    Returns:
        (1, C, H, W), float32, free of noise.
    """
    sigmas, num_steps = scheduler.sigmas, len(scheduler.timesteps)
    for i, timestep in enumerate(scheduler.timesteps):
        sigma = float(sigmas[i])
        seen = sigma * (1 - detail * detail_bump(i, num_steps))
        if seen == sigma:
            model_input, model_timestep = scheduler.scale_model_input(latents, timestep), float(timestep)
        else:
            model_input, model_timestep = (
                latents / (1 + seen**2) ** 0.5,
                float(timestep_of_sigma(model.alphas_cumprod, seen)),
            )
        noise = _fused_prediction(
            model, model_input, model_timestep, conditioning, grid, grid.jitter(i, seed), tile_batch
        )
        latents = scheduler.step(noise * (seen / sigma), timestep, latents).prev_sample
        on_step(i + 1)
    return latents


def _fused_prediction(
    model: Denoiser[ConditioningT],
    model_input: Tensor,
    timestep: float,
    conditioning: ConditioningT,
    grid: Grid,
    offset: tuple[int, int],
    tile_batch: int,
) -> Tensor:
    """The weighted mean of all tiles' predictions, (1, C, H, W); one full tile is passed through untouched."""
    tiles = grid.tiles(*offset)
    if len(tiles) == 1:
        return model.predict_noise(model_input, tiles, timestep, conditioning)
    weights = blend_weights(grid, *offset).to(model_input.device)
    fused = torch.zeros_like(model_input)
    for batch in batches(len(tiles), tile_batch):
        places = tiles[batch]
        prediction = model.predict_noise(gather(model_input, places), places, timestep, conditioning)
        fuse(prediction, places, weights[batch], fused)
    return fused


def batches(num_tiles: int, tile_batch: int) -> Iterator[slice]:
    """Slices of at most `tile_batch` tiles, as even as they can be so that few batch shapes occur."""
    num_batches = -(-num_tiles // tile_batch)
    size = -(-num_tiles // num_batches)
    return (slice(start, min(start + size, num_tiles)) for start in range(0, num_tiles, size))
