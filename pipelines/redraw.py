"""One diffusion pass over a picture, whatever the family: encode, denoise, decode in bands, put back what was known.

A recipe decides how latents are denoised; everything around it is here. What the VAE alone does to the picture is
taken away from the result, and its tones are those of the input (`colour`), as far as the strength leaves them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from pipelines.bands import cut, filter_bands
from pipelines.colour import halo_rows, wavelet_match
from pipelines.progress import Stages
from pipelines.tiling import Grid, fit_grid
from pipelines.vae import OnTile, TiledVAE, pad_to_multiple

TILE_OVERLAP_LATENTS = 8
"""Least overlap of tiles; with ramp weights and moving edges more buys tone, not thinner seams."""
FAITHFUL_STRENGTH, FREE_STRENGTH = 0.5, 0.8
"""Up to the first, what the input determines is kept: its tones, and what the VAE's round trip would take away. From
the second on nothing is: where structure moves, the old one would show as a ghost."""
BYTES_PER_PX = 40
"""Pictures that are in memory at once: source, pre-stage picture, its padded copy (float32) and the VAE's residue."""

Bands = Callable[[TiledVAE], Iterator[Tensor]]
"""Decodes a finished picture with a VAE: bands (1, 3, rows, W), float32, about 0..1, from top to bottom."""


def faithfulness(strength: float) -> float:
    """How much of what the input determines is put back after diffusion: 1 up to strength 0.5, falling to 0 at 0.8."""
    return min(1.0, max(0.0, (FREE_STRENGTH - strength) / (FREE_STRENGTH - FAITHFUL_STRENGTH)))


@dataclass(frozen=True, kw_only=True)
class Tones:
    """What of the input a result keeps.

    `amount` (0..1) is how much of the input's tones, and of what the VAE's round trip takes away, is put back;
    structures above about 2^`levels` px are tones of light, above 2^`chroma_levels` px tones of colour.
    """

    amount: float
    levels: int
    chroma_levels: int

    @classmethod
    def of(cls, strength: float, scale: float) -> Tones:
        """For a pass that enlarges by `scale`: structures of about four pixels of the input are known, not imagined."""
        levels = 2 + round(math.log2(scale))
        return cls(amount=faithfulness(strength), levels=levels, chroma_levels=max(1, levels - 2))


class Canvas:
    """The VAE of a family and the tile grid that fits a picture in its latent space.

    Args:
        vae: On its device.
        size_multiple: Latent sides must be multiples of this for the family's denoiser.
    """

    def __init__(self, vae: AutoencoderKL, *, size_multiple: int) -> None:
        self.vae = TiledVAE(vae.eval(), park_device=torch.device("cpu") if vae.device.type == "cuda" else None)
        self.padding_multiple = self.vae.scale_factor * max(8, size_multiple)

    @property
    def bytes_per_px(self) -> int:
        """Memory that a pass takes per pixel of the result."""
        return BYTES_PER_PX + self.vae.bytes_per_px

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

    def redraw(
        self,
        padded: Tensor,
        size: tuple[int, int],
        denoise: Callable[[Tensor], Tensor],
        tones: Tones,
        stages: Stages,
    ) -> Bands:
        """Run a diffusion pass.

        Args:
            padded: What `pad` returned: (1, 3, H, W) float32, 0..1.
            size: (height, width) that the result is cut to.
            denoise: From start latents (1, C, h, w), float32, to finished ones; noises them itself.
            tones: What of the picture is put back.
            stages: Told of `vae_encode`, and of every tile of `vae_decode`.

        Returns:
            What decodes the finished picture, as often as it is called.
        """
        with stages.stage("vae_encode"):
            start = self.vae.encode(padded, on_tile=lambda: stages.beat("vae_encode")).float()
        final = denoise(start)

        def match(rows: Tensor, reference: Tensor) -> Tensor:
            return wavelet_match(
                rows, reference, levels=tones.levels, chroma_levels=tones.chroma_levels, amount=tones.amount
            )

        def bands(vae: TiledVAE) -> Iterator[Tensor]:
            pairs = compensated(
                vae, start, final, padded, weight=tones.amount, on_tile=lambda: stages.beat("vae_decode")
            )
            return cut(filter_bands(pairs, match, halo=halo_rows(tones.levels)), *size)

        return bands


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
