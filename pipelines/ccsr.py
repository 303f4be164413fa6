"""CCSR as a pre-stage: enlarge a picture, then let a diffusion model restore what a lens, a codec or a resize took.

Paper: "Improving the Stability and Efficiency of Diffusion Models for Content Consistent Super-Resolution" (arXiv
2401.00877), code and weights Apache-2.0 by its README, on Stable Diffusion 2.1 (CreativeML OpenRAIL++-M).

The picture is enlarged by another pre-stage and encoded once; its latents steer the ControlNet. From pure noise at
the last timestep T one call guesses the clean latents. Version 2 ends there. Version 1 noises the guess again to
t_max of the schedule, runs the DDPM chain down to t_min, and ends with the guess of the last call: its decoder was
trained to make a sharp picture of that. The schedule is chosen by one index for noising and for the first call; the
original rounds twice and is off by one for some numbers of steps.

Tiles are blended by Gaussian weights (Mixture of Diffusers, arXiv 2302.02412) in one prediction for the whole latent,
and all noise is drawn for the whole latent, so the tile grid does not show in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler
from torch import Tensor

from pipelines.bands import cut, filter_bands
from pipelines.colour import adain, halo_rows, moments, wavelet_match
from pipelines.errors import NonFiniteResult
from pipelines.multidiffusion import Denoiser, fused_prediction
from pipelines.prescale import BandedPreStage, nothing
from pipelines.redraw import EXACT_PX, Canvas, above_noise, compensated, compensated_in_bands
from pipelines.spool import Pixels, Spool, rows_of
from pipelines.streamed_vae import StreamedVAE
from pipelines.tiling import Grid, Tile, fit_grid, gather
from pipelines.vae import TiledVAE
from weights.ccsr import Layout, Networks, load_networks, read_layout

TILE_BATCH = {"cpu": 1, "cuda": 8}
"""Tiles per forward; a tile of Stable Diffusion 2.1 is 64 latents."""
WAVELET_LEVELS = 5
"""Structures above about 32 px take the colours of the enlarged picture."""
GAUSSIAN_VARIANCE = 0.01
"""Of the tiles' weights, in units of the tile's side squared."""

SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "variance_type": "fixed_small",
}
LAST = 999


def spaced_timesteps(num_steps: int) -> list[int]:
    """The schedule of version 1, ascending: `num_steps` timesteps from 0 to 999, both included."""
    if num_steps == 1:
        return [LAST]
    return [round(i * LAST / (num_steps - 1)) for i in range(num_steps)]


def plan(layout: Layout) -> list[int]:
    """The timesteps that are visited, descending; the first is T, the second is where the guess is noised to.

    Raises:
        ValueError: Version 1 has no schedule of two steps, and version 2 none that leaves no step to run.
    """
    num_steps = layout.num_steps
    if num_steps == 1:
        return [layout.start_timestep]
    if layout.version == "v2":
        leading = [1 + (LAST + 1) // num_steps * i for i in reversed(range(num_steps))]
        chain = leading[num_steps - round(num_steps * layout.t_max) : num_steps - round(num_steps * layout.t_min)]
        if not chain:
            raise ValueError(f"{num_steps} steps leave none between t_max {layout.t_max} and t_min {layout.t_min}.")
        return [layout.start_timestep, *chain]
    if num_steps == 2:
        raise ValueError("The schedule of version 1 has 1 step, or 3 and more; got 2.")
    low = min(num_steps - 2, round(num_steps * layout.t_min))
    high = min(num_steps - 2, max(low, round(num_steps * layout.t_max) - 1))
    return [layout.start_timestep, *reversed(spaced_timesteps(num_steps)[low : high + 1])]


def gaussian_weights(grid: Grid) -> Tensor:
    """The weight of every tile at each of its positions, adding to one over the tiles at every position.

    Returns:
        (num_tiles, 1, tile_height, tile_width) float32 on the CPU. Sums are 64-bit: the raw weights of a tile's
        corners are around 1e-10, which 16 bits round to nothing.
    """

    def profile(length: int) -> Tensor:
        position = (torch.arange(length, dtype=torch.float64) - (length - 1) / 2) / length
        return torch.exp(-(position**2) / (2 * GAUSSIAN_VARIANCE))

    tile = profile(grid.tile_height)[:, None] * profile(grid.tile_width)[None, :]
    total = torch.zeros(grid.height, grid.width, dtype=torch.float64)
    tiles = grid.tiles()
    for top, left, bottom, right in tiles:
        total[top:bottom, left:right] += tile
    shares = [tile / total[top:bottom, left:right] for top, left, bottom, right in tiles]
    return torch.stack(shares)[:, None].float()


class RestoringUNet:
    """CCSR's UNet and ControlNet behind the `Denoiser` interface; the conditioning is the picture's latents.

    Args:
        networks: On their device.
        prediction_type: "epsilon", as published, or "v_prediction".
    """

    def __init__(self, networks: Networks, *, prediction_type: str = "epsilon") -> None:
        self.networks = networks
        self.prediction_type = prediction_type
        self.alphas_cumprod: Tensor = DDPMScheduler(**SCHEDULE).alphas_cumprod

    @property
    def size_multiple(self) -> int:
        """Latent sides must be multiples of this: the UNet halves them once per level."""
        return 2 ** (len(self.networks.unet.config.block_out_channels) - 1)

    def predict(self, tiles: Tensor, places: Sequence[Tile], timestep: float, conditioning: Tensor) -> Tensor:
        """See `Denoiser.predict`; `conditioning` is (1, C, H, W), the latents of the whole picture."""
        networks = self.networks
        unet = networks.unet
        sample = tiles.to(unet.device, unet.dtype)
        steps = torch.full((), timestep, device=unet.device)
        embeds = networks.prompt_embeds.to(unet.device).expand(len(tiles), -1, -1)
        down, middle = networks.controlnet(
            sample,
            steps,
            encoder_hidden_states=embeds,
            controlnet_cond=gather(conditioning, places).to(sample),
            return_dict=False,
        )
        predicted = unet(
            sample,
            steps,
            encoder_hidden_states=embeds,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
            return_dict=False,
        )[0].to(tiles.device, torch.float32)
        if self.prediction_type == "epsilon":
            return predicted
        alpha = float(self.alphas_cumprod[int(timestep)])
        return math.sqrt(alpha) * predicted + math.sqrt(1 - alpha) * tiles


def restore(
    model: Denoiser[Tensor],
    condition: Tensor,
    layout: Layout,
    *,
    grid: Grid,
    tile_batch: int,
    generator: torch.Generator,
    on_tile: Callable[[], None] = nothing,
) -> Tensor:
    """Make clean latents from the latents of a picture.

    Args:
        model: Predicts the noise.
        condition: (1, C, H, W), float32: the latents of the picture to restore.
        layout: Which schedule is run, and what it starts from.
        grid: Tiles fitted to the latents.
        tile_batch: Tiles per call of the model; changes memory and speed, not the result.
        generator: On the CPU; every noise is drawn here, for the whole latent.
        on_tile: Called after each call of the model; may raise to stop.

    Returns:
        (1, C, H, W), float32, on the device of `condition`.
    """
    scheduler = DDPMScheduler(**SCHEDULE)
    tiles, weights = grid.tiles(), gaussian_weights(grid).to(condition.device)

    def predict(sample: Tensor, timestep: int) -> Tensor:
        return fused_prediction(
            model, sample, float(timestep), condition, tiles, weights, tile_batch=tile_batch, on_batch=on_tile
        )

    def noised(clean: Tensor, timestep: int) -> Tensor:
        noise = torch.randn(clean.shape, generator=generator, dtype=torch.float32).to(clean.device)
        return scheduler.add_noise(clean, noise, torch.tensor([timestep]))

    last, *chain = plan(layout)
    if layout.start == "picture":
        sample = noised(condition, last)
    else:
        sample = torch.randn(condition.shape, generator=generator, dtype=torch.float32).to(condition.device)
    alpha = float(scheduler.alphas_cumprod[last])
    clean = (sample - math.sqrt(1 - alpha) * predict(sample, last)) / math.sqrt(alpha)
    if not chain:
        return clean
    sample = noised(clean, chain[0])
    scheduler.set_timesteps(timesteps=chain)
    for timestep in chain:
        step = scheduler.step(predict(sample, timestep), timestep, sample, generator=generator)
        sample, clean = step.prev_sample, step.pred_original_sample
    return clean


class CCSR:
    """Another pre-stage's picture, restored. Works for pictures of any size, one pixel included.

    Args:
        model: Predicts the noise in tiles.
        vae: Encodes the enlarged picture and decodes the restored one.
        base: Enlarges to the exact size.
        layout: How the networks were meant to be run.
        exact_px: Pictures of more pixels pass through the VAE in bounded memory, see `Canvas`.
    """

    def __init__(
        self,
        model: RestoringUNet,
        vae: AutoencoderKL,
        base: BandedPreStage,
        layout: Layout,
        *,
        exact_px: int = EXACT_PX,
    ) -> None:
        self.model, self.base, self.layout = model, base, layout
        self.canvas = Canvas(vae, size_multiple=model.size_multiple, exact_px=exact_px)
        self.tile_batch = TILE_BATCH[vae.device.type]

    @classmethod
    def load(cls, folder: Path, *, device: torch.device, dtype: torch.dtype, base: BandedPreStage) -> CCSR:
        """Load from a folder with `ccsr.json`; nothing is downloaded."""
        layout = read_layout(folder)
        found = load_networks(folder, layout, dtype=dtype)
        networks = Networks(found.unet.to(device), found.controlnet.to(device), found.prompt_embeds.to(device))
        # The VAE overflows float16 on some pictures, bfloat16 has the range.
        vae_dtype = torch.bfloat16 if dtype == torch.float16 else dtype
        vae = AutoencoderKL.from_pretrained(folder / layout.vae, torch_dtype=vae_dtype, local_files_only=True)
        return cls(RestoringUNet(networks, prediction_type=layout.prediction_type), vae.to(device), base, layout)

    def with_layout(self, **changes: Any) -> CCSR:
        """The same networks run in another way, for example with other `num_steps`."""
        layout, canvas = replace(self.layout, **changes), self.canvas
        return CCSR(self.model, canvas.vae.vae, self.base, layout, exact_px=canvas.exact_px)

    def __call__(
        self, image: Tensor, size: tuple[int, int], on_tile: Callable[[], None] = nothing, *, seed: int = 0
    ) -> Tensor:
        """Enlarge and restore an image; see `PreStage`."""
        return self._restored(image, size, on_tile, seed)[..., :, :]

    def bands(
        self, image: Pixels, size: tuple[int, int], on_tile: Callable[[], None] = nothing, *, seed: int = 0
    ) -> Iterator[Tensor]:
        """Enlarge and restore an image; see `BandedPreStage`."""
        yield from rows_of(self._restored(image, size, on_tile, seed))

    @torch.inference_mode()
    def _restored(self, image: Pixels, size: tuple[int, int], on_tile: Callable[[], None], seed: int) -> Pixels:
        """The restored picture, in a `Spool` if it is large."""
        padded = self.canvas.pad_bands(self.base.bands(image, size, on_tile, seed=seed), size)
        vae = self.canvas.vae
        if isinstance(padded, Tensor):
            condition = vae.encode(padded, on_tile).float()
        else:
            condition = StreamedVAE(vae).encode(padded, on_tile)
        grid = fit_grid(*condition.shape[-2:], max_tile=self.layout.max_tile, overlap=self.layout.tile_overlap)
        clean = restore(
            self.model,
            condition,
            self.layout,
            grid=grid,
            tile_batch=self.tile_batch,
            generator=torch.Generator("cpu").manual_seed(seed),
            on_tile=on_tile,
        )
        clean = above_noise(clean, condition, self.layout.noise_floor)
        try:
            return self._picture(vae, condition, clean, padded, size, on_tile)
        except NonFiniteResult:
            if vae.dtype == torch.float32:
                raise
            return self._picture(vae.in_float32(), condition, clean, padded, size, on_tile)

    def _picture(
        self,
        vae: TiledVAE,
        condition: Tensor,
        clean: Tensor,
        padded: Pixels,
        size: tuple[int, int],
        on_tile: Callable[[], None],
    ) -> Pixels:
        """Decode the clean latents and give them the colours of the enlarged picture."""
        levels = WAVELET_LEVELS if self.layout.color_fix == "wavelet" else 0

        def match(rows: Tensor, reference: Tensor) -> Tensor:
            return wavelet_match(rows, reference, levels=levels, amount=1.0) if levels else rows

        weight = 1.0 if self.layout.round_trip_compensation else 0.0
        decode: Any = compensated if isinstance(padded, Tensor) else compensated_in_bands
        pairs = decode(vae, condition, clean, padded, weight=weight, on_tile=on_tile)
        decoded = cut(filter_bands(pairs, match, halo=halo_rows(levels)), *size)
        if isinstance(padded, Tensor):
            restored: Pixels = torch.cat(list(decoded), dim=-2).to(padded.device)
        else:
            restored = Spool.of(decoded, *size)
        if self.layout.color_fix == "adain":
            restored = self._adain(restored, padded, size)
        return restored.clamp(0, 1) if isinstance(restored, Tensor) else restored

    @staticmethod
    def _adain(restored: Pixels, padded: Pixels, size: tuple[int, int]) -> Pixels:
        found, wanted = moments(rows_of(restored)), moments(cut(rows_of(padded), *size))
        bands = (adain(rows, found, wanted) for rows in rows_of(restored))
        return torch.cat(list(bands), dim=-2) if isinstance(restored, Tensor) else Spool.of(bands, *size)
