"""One diffusion pass over a picture, whatever the family: encode, denoise, decode in bands, put back what was known.

A recipe decides how latents are denoised; everything around it is here. What small networks change by their own error,
and what the VAE alone does to the picture, is taken away from the result, and its tones are those of the input
(`colour`), as far as the strength leaves them.

Pictures of up to `exact_px` pixels pass through the VAE exactly (`vae`), larger ones in bounded memory
(`streamed_vae`): then only what lies on the latent grid grows with the picture, and the pixels may lie in a `Spool`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from pipelines.bands import cut, filter_bands
from pipelines.colour import halo_rows, wavelet_match
from pipelines.preview import Painter, lazily
from pipelines.progress import Stages
from pipelines.spool import Pixels, Spool
from pipelines.streamed_vae import StreamedVAE
from pipelines.tiling import Grid, fit_grid
from pipelines.vae import OnTile, TiledVAE, pad_to_multiple

TILE_OVERLAP_LATENTS = 8
"""Least overlap of tiles; with ramp weights and moving edges more buys tone, not thinner seams."""
FAITHFUL_STRENGTH, FREE_STRENGTH = 0.5, 0.8
"""Up to the first, what the input determines is kept: its tones, and what the VAE's round trip would take away. From
the second on nothing is: where structure moves, the old one would show as a ghost."""
MOST_DETAIL = 5.0
"""At this much wanted detail every change stays, at 1 those that stand out of the networks' error."""
BYTES_PER_PX = 40
"""Pictures that are in memory at once: source, pre-stage picture, its padded copy (float32) and the VAE's residue."""

LATENT_COPIES = 7
"""Tensors of the latents' size in 32 bits at once: start, sample, what the model sees, predictions and the hint."""
STREAMED_BYTES = 2**29
"""What the tiles and bands of a streamed picture take at once, whatever its size."""
EXACT_PX = 2048 * 2048
"""Largest picture, in pixels, that passes through the VAE exactly."""
MATCHED_ROWS = 256
"""Rows that get their tones at once."""
NOISE_WINDOW = 5
"""Latents on each side over which a change is compared with the noise."""

Bands = Callable[[TiledVAE], Iterator[Tensor]]
"""Decodes a finished picture with a VAE: bands (1, 3, rows, W), float32, about 0..1, from top to bottom."""


def faithfulness(strength: float) -> float:
    """How much of what the input determines is put back after diffusion: 1 up to strength 0.5, falling to 0 at 0.8."""
    return min(1.0, max(0.0, (FREE_STRENGTH - strength) / (FREE_STRENGTH - FAITHFUL_STRENGTH)))


@dataclass(frozen=True, kw_only=True)
class Tones:
    """What of the input a result keeps.

    `amount` (0..1) is how much of the input's tones, and of what the VAE's round trip takes away, is put back;
    structures above about 2^`levels` px are tones of light, above 2^`chroma_levels` px tones of colour. Changes below
    `noise` (0..) times the networks' own error are left out.
    """

    amount: float
    levels: int
    chroma_levels: int
    noise: float

    @classmethod
    def of(cls, strength: float, scale: float, detail: float = 0.0) -> Tones:
        """For a pass that enlarges by `scale`: structures of about two pixels of the input are known, not imagined.

        `detail` (0..5) is how much imagined fine structure is wanted, and with it how much of the noise may stay.
        """
        levels, amount = 1 + round(math.log2(scale)), faithfulness(strength)
        return cls(
            amount=amount, levels=levels, chroma_levels=max(1, levels - 1), noise=amount * (MOST_DETAIL - detail) / 4
        )


class Canvas:
    """The VAE of a family and the tile grid that fits a picture in its latent space.

    Args:
        vae: On its device.
        size_multiple: Latent sides must be multiples of this for the family's denoiser.
        exact_px: Pictures of more pixels are streamed.
        noise_floor: How far the family's networks miss clean latents by themselves; see `above_noise`.
    """

    def __init__(
        self, vae: AutoencoderKL, *, size_multiple: int, exact_px: int = EXACT_PX, noise_floor: float = 0.0
    ) -> None:
        self.vae = TiledVAE(vae.eval(), park_device=torch.device("cpu") if vae.device.type == "cuda" else None)
        self.exact_px = exact_px
        self.noise_floor = noise_floor
        self.padding_multiple = self.vae.scale_factor * max(8, size_multiple)

    @property
    def bytes_per_px(self) -> int:
        """Memory that a pass takes per pixel of the result, besides that of the tile at work."""
        return BYTES_PER_PX + self.vae.bytes_per_px

    def bytes_needed(self, height: int, width: int, *, pictures: int = 3) -> int:
        """Memory that a pass to `height` x `width` px takes at its peak.

        Args:
            height: Of the result.
            width: Of the result.
            pictures: Copies of the picture (float32) that the recipe holds in memory; those in a `Spool` do not count.
        """
        pixels = height * width
        if pixels <= self.exact_px:
            return pixels * self.bytes_per_px + self.vae.bytes_at_work(pixels)
        per_px = 12 * pictures + 4 * LATENT_COPIES * self.vae.latent_channels / self.vae.scale_factor**2
        return max(STREAMED_BYTES, self.vae.bytes_at_work(pixels)) + int(pixels * per_px)

    def grid(self, height: int, width: int, *, max_tile_px: int, overlap: int = TILE_OVERLAP_LATENTS) -> Grid:
        """Tiles for a picture of `height` x `width` px, padded to what VAE and denoiser can halve."""
        factor, multiple = self.vae.scale_factor, self.padding_multiple
        return fit_grid(
            -(-height // multiple) * multiple // factor,
            -(-width // multiple) * multiple // factor,
            max_tile=max_tile_px // factor,
            overlap=overlap,
        )

    def pad(self, image: Tensor) -> Tensor:
        """A picture (1, 3, H, W) with sides padded to what VAE and denoiser can halve."""
        return pad_to_multiple(image, self.padding_multiple)

    def pad_bands(self, bands: Iterable[Tensor], size: tuple[int, int]) -> Pixels:
        """The picture (height, width) of the bands that follow each other, padded; in a `Spool` where it is large."""
        height, width = (-(-side // self.padding_multiple) * self.padding_multiple for side in size)
        if height * width <= self.exact_px:
            return self.pad(torch.cat(list(bands), dim=-2))
        return Spool.of(_padded(bands, height - size[0], width - size[1]), height, width)

    def redraw(
        self,
        padded: Pixels,
        size: tuple[int, int],
        denoise: Callable[[Tensor], Tensor],
        tones: Tones,
        stages: Stages,
    ) -> Bands:
        """Run a diffusion pass.

        Args:
            padded: What `pad` or `pad_bands` returned: (1, 3, H, W) float32, 0..1.
            size: (height, width) that the result is cut to.
            denoise: From start latents (1, C, h, w), float32, to finished ones; noises them itself.
            tones: What of the picture is put back.
            stages: Told of `vae_encode`, and of every tile of `vae_decode`.

        Returns:
            What decodes the finished picture, as often as it is called.
        """
        streamed = padded.shape[-2] * padded.shape[-1] > self.exact_px or not isinstance(padded, Tensor)
        with stages.stage("vae_encode"):
            start = self._encode(padded, lambda: stages.beat("vae_encode"), streamed=streamed)
        with stages.painting(lazily(lambda: Painter(start, padded, size))):
            final = above_noise(denoise(start), start, tones.noise * self.noise_floor)

        def match(rows: Tensor, reference: Tensor) -> Tensor:
            return wavelet_match(
                rows, reference, levels=tones.levels, chroma_levels=tones.chroma_levels, amount=tones.amount
            )

        def bands(vae: TiledVAE) -> Iterator[Tensor]:
            options: Any = {"weight": tones.amount, "on_tile": lambda: stages.beat("vae_decode")}
            if streamed or not isinstance(padded, Tensor):
                pairs = compensated_in_bands(vae, start, final, padded, **options)
            else:
                pairs = compensated(vae, start, final, padded, **options)
            return cut(filter_bands(pairs, match, halo=halo_rows(tones.levels)), *size)

        return bands

    def _encode(self, padded: Pixels, on_tile: OnTile, *, streamed: bool) -> Tensor:
        if streamed:
            return StreamedVAE(self.vae).encode(padded, on_tile)
        assert isinstance(padded, Tensor)
        return self.vae.encode(padded, on_tile).float()


def above_noise(clean: Tensor, condition: Tensor, noise_floor: float) -> Tensor:
    """Keep of what a network changed the part that stands out of its own noise, place by place.

    Of changes as strong as the network's error, as in flat areas, a seventeenth is kept, of those twice as strong half,
    of those four times as strong 16 parts of 17: a Wiener filter for a known noise, made steeper.

    Args:
        clean: (1, C, H, W), what the network made.
        condition: Of the same shape, what it was given.
        noise_floor: Standard deviation of the network's own error; 0 keeps everything.
    """
    if noise_floor == 0:
        return clean
    change = clean - condition
    energy = change.square().mean(dim=1, keepdim=True)
    energy = F.avg_pool2d(energy, NOISE_WINDOW, stride=1, padding=NOISE_WINDOW // 2, count_include_pad=False)
    return condition + change * (energy**2 / (energy**2 + (4 * noise_floor**2) ** 2))


def compensated(
    vae: TiledVAE, start: Tensor, final: Tensor, before: Tensor, *, weight: float, on_tile: OnTile
) -> Iterator[tuple[Tensor, Tensor]]:
    """Decoded bands, less what the VAE alone does to the pre-stage picture, each with its rows of that picture.

    The two decodes run one after the other: together they would need twice the memory. What waits between them is
    small, so 16 bits hold it to 1e-4.
    """
    lost: list[Tensor] = []
    if weight:
        top = 0
        for band in vae.decode_bands(start, on_tile):
            lost.append((before[..., top : top + band.shape[-2], :] - band.to(before.device)).half())
            top += band.shape[-2]
    top = 0
    for i, band in enumerate(vae.decode_bands(final, on_tile)):
        reference = before[..., top : top + band.shape[-2], :].to(band.device)
        if weight:
            band = band + weight * lost[i].to(band)
        top += band.shape[-2]
        yield band, reference


def compensated_in_bands(
    vae: TiledVAE, start: Tensor, final: Tensor, before: Pixels, *, weight: float, on_tile: OnTile
) -> Iterator[tuple[Tensor, Tensor]]:
    """What `compensated` yields, in bounded memory: both decodes go on band by band, side by side."""
    streamed = StreamedVAE(vae)
    finished = streamed.decode_bands(final, on_tile)
    round_trips = streamed.decode_bands(start, on_tile) if weight else repeat(None)
    top = 0
    for band, round_trip in zip(finished, round_trips, strict=False):
        for first in range(0, band.shape[-2], MATCHED_ROWS):
            rows = band[..., first : first + MATCHED_ROWS, :]
            reference = before[..., top : top + rows.shape[-2], :].to(band.device)
            if round_trip is not None:
                rows = rows + weight * (reference - round_trip[..., first : first + MATCHED_ROWS, :])
            top += rows.shape[-2]
            yield rows, reference


def _padded(bands: Iterable[Tensor], bottom: int, right: int) -> Iterator[Tensor]:
    """Bands continued at the right and at the bottom with their last pixels."""
    last = None
    for band in bands:
        last = F.pad(band, (0, right, 0, 0), mode="replicate") if right else band
        yield last
    if bottom and last is not None:
        yield last[..., -1:, :].expand(-1, -1, bottom, -1)
