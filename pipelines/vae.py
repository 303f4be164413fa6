"""Exact tiled encoding and decoding with an unmodified diffusers `AutoencoderKL`.

A VAE tiled naively changes colour from tile to tile, because its GroupNorm layers take their statistics from one tile
alone and its middle block attends to one tile alone. Here the middle block runs on the whole latent; the convolutional
path runs tile by tile, all tiles in lockstep: at every GroupNorm each tile stops, the sums over the tiles' own areas
are pooled (law of total variance, 64-bit accumulators), and all tiles go on with the same statistics. Tiles carry a
halo as wide as the path's receptive radius, so the result equals the untiled one to round-off whatever the tile size.

The last normalisation is the last point where tiles wait for each other: after it rows of tiles are finished one by
one, which is what lets `decode_bands` stream pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from pipelines.tiling import Tile

Program = Generator[tuple[nn.GroupNorm, Tensor], Tensor, Tensor]
"""A tile's way through the network: yields (norm, its input), is sent the normalised tensor, returns the output."""


Park = Callable[[Tensor], Tensor]
"""Puts a tensor where it can wait."""

OnTile = Callable[[], None]
"""Hears that a piece of work is done; raises to stop."""


def nothing() -> None:
    """Nobody listens."""


@dataclass(frozen=True, kw_only=True)
class Crop:
    """A tile's own area and the larger area that is computed for it, in the coordinates of the path's input."""

    own: Tile
    padded: Tile

    def own_part(self, x: Tensor) -> Tensor:
        """The own area of `x` (B, C, h, w), which shows the padded area at any scale."""
        height, width = self.padded.bottom - self.padded.top, self.padded.right - self.padded.left

        def at(position: int, origin: int, length: int, size: int) -> int:
            return (position - origin) * size // length

        top = at(self.own.top, self.padded.top, height, x.shape[-2])
        bottom = at(self.own.bottom, self.padded.top, height, x.shape[-2])
        left = at(self.own.left, self.padded.left, width, x.shape[-1])
        right = at(self.own.right, self.padded.left, width, x.shape[-1])
        return x[..., top:bottom, left:right]


RESIDENT_TILES = 4
"""As many tiles wait on the device itself: about 4 GB for Stable Diffusion's decoder and tiles of 1024 px."""
WORKING_COPIES = 3
"""Of a tile's widest activations, in 32 bits whatever the network computes in: normalising takes them. Measured with
the pocket VAE: 330 MB at 1024 px and 780 MB at 2048 px in 16 bits, 560 MB at 1024 px in 32."""


class TiledVAE:
    """`AutoencoderKL` for pictures of any size; equal to the untiled network to round-off.

    Args:
        vae: The network; its weights are never changed.
        max_tile_px: Longest side (px) of the area a tile owns. Activations of one tile are on the device at a time.
        park_device: Where the activations of more than `RESIDENT_TILES` tiles wait; `None`: on the VAE's device.
    """

    def __init__(self, vae: AutoencoderKL, *, max_tile_px: int = 1024, park_device: torch.device | None = None) -> None:
        self.vae = vae
        self.scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.max_tile_px = max_tile_px
        self.park_device = park_device

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.vae.config.latent_channels)

    @property
    def dtype(self) -> torch.dtype:
        """What the network computes in."""
        return self.vae.dtype

    def in_float32(self) -> TiledVAE:
        """A copy of this VAE that computes in 32 bits; this one stays as it is."""
        return TiledVAE(copy.deepcopy(self.vae).float(), max_tile_px=self.max_tile_px, park_device=self.park_device)

    @property
    def bytes_per_px(self) -> int:
        """Memory of what waits while a picture is decoded, per pixel: 1.5 times the widest activations at full size."""
        return int(1.5 * self._widest * self.dtype.itemsize)

    def bytes_at_work(self, num_px: int) -> int:
        """Host memory that the tile at work takes besides, for a picture of `num_px` pixels; none on a GPU."""
        if self.vae.device.type != "cpu":
            return 0
        return min(num_px, self.max_tile_px**2) * WORKING_COPIES * 4 * self._widest

    @property
    def _widest(self) -> int:
        """Channels of the widest activations at full size: the last upsampling keeps its input's."""
        channels: Sequence[int] = self.vae.config.block_out_channels
        return channels[1] if len(channels) > 1 else channels[0]

    def encode(self, image: Tensor, on_tile: OnTile = nothing) -> Tensor:
        """Encode pixels to the scaled mean of the posterior (no sampling: the same picture gives the same latents).

        Args:
            image: (1, 3, H, W), 0..1, any device; H and W multiples of `scale_factor`.
            on_tile: Called after each piece of work; may raise to stop.

        Returns:
            (1, C, H / f, W / f) in the VAE's dtype on its device, times `scaling_factor`.
        """
        vae, factor = self.vae, self.scale_factor
        height, width = image.shape[-2:]
        crops = rows_of_crops(height, width, max_side=self.max_tile_px, halo=encoder_halo_px(vae), multiple=factor)
        tiles = [crop for row in crops for crop in row]
        park = self._park(len(tiles))
        programs = [down_path(vae, self._pixels(image, crop), park) for crop in tiles]
        features = list(_lockstep(programs, tiles, park, on_tile))
        rows = [torch.cat([crop.own_part(features.pop(0)) for crop in row], dim=-1) for row in crops]
        whole = torch.cat(rows, dim=-2).to(vae.device)  # (1, C_mid, H / f, W / f)
        encoder = vae.encoder
        whole = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(encoder.mid_block(whole))))
        moments = vae.quant_conv(whole) if vae.quant_conv is not None else whole
        mean = moments[:, : self.latent_channels]
        return (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def decode_bands(self, latents: Tensor, on_tile: OnTile = nothing) -> Iterator[Tensor]:
        """Decode to pixels, from top to bottom.

        Args:
            latents: (1, C, h, w), scaled as `encode` returns them.
            on_tile: Called after each piece of work; may raise to stop.

        Yields:
            Bands (1, 3, rows, W) that follow each other, float32 on the VAE's device, about 0..1 and not clamped.
            Bands of two latents of equal size have equal heights.
        """
        vae = self.vae
        z = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        z = vae.post_quant_conv(z) if vae.post_quant_conv is not None else z
        middle = vae.decoder.mid_block(vae.decoder.conv_in(z))
        crops = rows_of_crops(
            *latents.shape[-2:], max_side=self.max_tile_px // self.scale_factor, halo=decoder_halo(vae), multiple=1
        )
        tiles = [crop for row in crops for crop in row]
        park = self._park(len(tiles))
        programs = [up_path(vae, _cut(middle, crop.padded), park) for crop in tiles]
        finished = _lockstep(programs, tiles, park, on_tile)
        for row in crops:
            band = torch.cat([crop.own_part(next(finished)) for crop in row], dim=-1)
            yield band.float() / 2 + 0.5

    def decode(self, latents: Tensor) -> Tensor:
        """Decode to one picture (1, 3, H, W), float32, about 0..1 and not clamped."""
        return torch.cat(list(self.decode_bands(latents)), dim=-2)

    def _pixels(self, image: Tensor, crop: Crop) -> Tensor:
        return _cut(image, crop.padded).to(self.vae.device, self.vae.dtype) * 2 - 1

    def _park(self, num_tiles: int) -> Park:
        device = self.park_device
        return (lambda x: x) if device is None or num_tiles <= RESIDENT_TILES else (lambda x: x.to(device))


def _cut(x: Tensor, tile: Tile) -> Tensor:
    return x[..., tile.top : tile.bottom, tile.left : tile.right]


def rows_of_crops(
    height: int, width: int, *, max_side: int, halo: int, multiple: int, max_rows: int | None = None
) -> list[list[Crop]]:
    """Cut a picture into nearly equal tiles on multiples of `multiple`, each with a halo that ends at the border.

    No tile is longer than `max_side`, nor higher than `max_rows` where that is given.
    """
    halo = -(-halo // multiple) * multiple

    def spans(length: int, longest: int) -> list[tuple[int, int]]:
        count = -(-length // longest)
        edges = [length * i // count // multiple * multiple for i in range(count)] + [length]
        return list(zip(edges[:-1], edges[1:], strict=True))

    return [
        [
            Crop(
                own=Tile(top, left, bottom, right),
                padded=Tile(
                    max(0, top - halo), max(0, left - halo), min(height, bottom + halo), min(width, right + halo)
                ),
            )
            for left, right in spans(width, max_side)
        ]
        for top, bottom in spans(height, min(max_side, max_rows or max_side))
    ]


def decoder_halo(vae: AutoencoderKL) -> int:
    """Receptive radius of the decoder's up path in latents: 12.25, so 13, for the four levels of Stable Diffusion."""
    radius = 0.0
    for level, block in enumerate(vae.decoder.up_blocks):
        radius += 2 * len(block.resnets) / 2**level
        radius += 0.5 / 2**level if block.upsamplers else 0.0
    radius += 1 / 2 ** (len(vae.decoder.up_blocks) - 1)
    return int(-(-radius // 1))


def encoder_halo_px(vae: AutoencoderKL) -> int:
    """Receptive radius of the encoder's down path in pixels, an upper bound."""
    radius = 1
    for level, block in enumerate(vae.encoder.down_blocks):
        radius += 2 * len(block.resnets) * 2**level
        radius += 2 * 2**level if block.downsamplers else 0
    return radius


def resnet_path(block: Any, x: Tensor, park: Park) -> Program:
    """`ResnetBlock2D` without time embedding, stopping at its two normalisations."""
    residual = park(x)
    del x
    h = yield block.norm1, residual
    h = block.conv1(block.nonlinearity(h))
    h = yield block.norm2, h
    h = block.conv2(block.nonlinearity(h))
    residual = residual.to(h.device)
    if block.conv_shortcut is not None:
        residual = block.conv_shortcut(residual)
    return (residual + h) / block.output_scale_factor


def up_path(vae: AutoencoderKL, x: Tensor, park: Park) -> Program:
    """The decoder after its middle block."""
    for block in vae.decoder.up_blocks:
        for resnet in block.resnets:
            x = yield from resnet_path(resnet, x, park)
        for upsampler in block.upsamplers or ():
            x = upsampler(x)
    x = yield vae.decoder.conv_norm_out, x
    return vae.decoder.conv_out(vae.decoder.conv_act(x))


def down_path(vae: AutoencoderKL, x: Tensor, park: Park) -> Program:
    """The encoder before its middle block."""
    x = vae.encoder.conv_in(x)
    for block in vae.encoder.down_blocks:
        for resnet in block.resnets:
            x = yield from resnet_path(resnet, x, park)
        for downsampler in block.downsamplers or ():
            x = downsampler(x)
    return x


def _lockstep(programs: Sequence[Program], crops: Sequence[Crop], park: Park, on_tile: OnTile) -> Iterator[Tensor]:
    """Run all tiles from normalisation to normalisation; yields the outputs in order, each computed when asked for."""
    waiting = []
    for program in programs:
        norm, x = next(program)
        waiting.append((norm, park(x)))
        on_tile()
    device = norm.weight.device
    while True:
        norm = waiting[0][0]
        mean, variance = pooled_statistics(
            norm, [crop.own_part(x) for (_, x), crop in zip(waiting, crops, strict=True)]
        )
        done = False
        for i, program in enumerate(programs):
            try:
                norm_next, x = program.send(normalise(norm, waiting[i][1].to(device), mean, variance))
                waiting[i] = (norm_next, park(x))
            except StopIteration as stop:
                done = True
                yield stop.value
            on_tile()
        if done:
            return


def pooled_statistics(norm: nn.GroupNorm, areas: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and biased variance (B, groups) of the union of `areas` (B, C, h, w): sums over tiles in 64 bits."""
    means, counts, variances = [], [], []
    for area in areas:
        grouped = area.reshape(area.shape[0], norm.num_groups, -1).float()
        # Two passes take a sixth of torch.var_mean's time, which is not vectorised on a CPU.
        mean = grouped.mean(dim=-1)
        variance = (grouped - mean[..., None]).square_().mean(dim=-1)
        means.append(mean.double())
        variances.append(variance.double())
        counts.append(grouped.shape[-1])
    shares = torch.tensor(counts, dtype=torch.float64, device=means[0].device)[:, None, None] / sum(counts)
    stacked = torch.stack(means)
    mean = (shares * stacked).sum(0)
    return mean, (shares * (torch.stack(variances) + (stacked - mean) ** 2)).sum(0)


def normalise(norm: nn.GroupNorm, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """GroupNorm of `x` (B, C, h, w) with given statistics, one 32-bit multiply-add per channel, as in torch."""
    repeats = norm.num_channels // norm.num_groups
    scale = (variance.to(x.device) + norm.eps).rsqrt().repeat_interleave(repeats, dim=1) * norm.weight.double()
    shift = norm.bias.double() - mean.to(x.device).repeat_interleave(repeats, dim=1) * scale
    return torch.addcmul(shift[..., None, None].float(), x.float(), scale[..., None, None].float()).to(x.dtype)


def pad_to_multiple(image: Tensor, multiple: int) -> Tensor:
    """Pad (1, C, H, W) on the right and at the bottom to multiples of `multiple`, by reflection where possible."""
    bottom, right = -image.shape[-2] % multiple, -image.shape[-1] % multiple
    reflectable = bottom < image.shape[-2] and right < image.shape[-1]
    return F.pad(image, (0, right, 0, bottom), mode="reflect" if reflectable else "replicate")
