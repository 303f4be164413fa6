"""Encode and decode pictures of any size in bounded memory, with an unmodified diffusers `AutoencoderKL`.

`TiledVAE` is exact, but all tiles wait for each other at every normalisation, so all of them are in memory. Here the
statistics of the normalisations are measured once, on tiles spread over the picture that run in lockstep, and are kept
(as finegrain's refiners keep those of a reduced picture; tiles at full size have the right texture). With them every
tile is computed by itself, from top to bottom, and nothing but latents and one band is held. All tiles use the same
statistics, so no tile can differ in colour from its neighbour; that they are a sample's and not the whole picture's
shifts the whole picture alike, and the compensation for the VAE's round trip (`redraw`) takes most of that away.

A middle block with attention attends within the tile and its halo, which is as far as such VAEs were trained to look.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from pipelines.spool import Pixels
from pipelines.tiling import Tile
from pipelines.vae import (
    Crop,
    OnTile,
    Program,
    TiledVAE,
    decoder_halo,
    down_path,
    encoder_halo_px,
    normalise,
    nothing,
    pooled_statistics,
    resnet_path,
    rows_of_crops,
    up_path,
)

TILE_PX = {"cpu": 768, "cuda": 1024}
"""Longest side of the area that a tile owns."""
BAND_PX = 2**22
"""Most pixels in a band, where that leaves it `LEAST_BAND_PX` high."""
LEAST_BAND_PX = 256
SAMPLE_TILES = 8
"""Tiles on which the statistics are measured, and their side in px: half a megapixel in all."""
SAMPLE_PX = 256
_MIDDLE_RADIUS = 5  # two blocks of two convolutions, and the convolution between latents and features

Statistics = Sequence[tuple[Tensor, Tensor]]
"""Mean and variance (1, groups) of every normalisation, in the order in which a tile meets them."""


class StreamedVAE:
    """The network of a `TiledVAE`, with statistics measured on a sample of the picture."""

    def __init__(self, vae: TiledVAE, *, tile_px: int | None = None) -> None:
        self.vae, self.scale_factor = vae.vae, vae.scale_factor
        self.latent_channels = vae.latent_channels
        self.tile_px = tile_px or TILE_PX[self.vae.device.type]

    def encode(self, image: Pixels, on_tile: OnTile = nothing) -> Tensor:
        """Encode pixels to the scaled mean of the posterior.

        Args:
            image: (1, 3, H, W), 0..1; H and W multiples of `scale_factor`. Read tile by tile.
            on_tile: Called after each piece of work; may raise to stop.

        Returns:
            (1, C, H / f, W / f), float32, on the VAE's device, times `scaling_factor`.
        """
        vae, factor = self.vae, self.scale_factor
        height, width = image.shape[-2:]
        halo = encoder_halo_px(vae) + _MIDDLE_RADIUS * factor

        def program(crop: Crop) -> Program:
            tile = crop.padded
            pixels = image[..., tile.top : tile.bottom, tile.left : tile.right]
            return _encoder_path(vae, pixels.to(vae.device, vae.dtype) * 2 - 1)

        sample = _sample(height, width, side=SAMPLE_PX, halo=halo, multiple=factor)
        statistics = _measured([program(crop) for crop in sample], sample, on_tile)
        latents = torch.empty(1, self.latent_channels, height // factor, width // factor, device=vae.device)
        for row in rows_of_crops(height, width, max_side=self.tile_px, halo=halo, multiple=factor):
            for crop in row:
                moments = _run(program(crop), statistics)
                moments = vae.quant_conv(moments) if vae.quant_conv is not None else moments
                top, left, bottom, right = (side // factor for side in crop.own)
                latents[..., top:bottom, left:right] = crop.own_part(moments)[:, : self.latent_channels]
                on_tile()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def decode_bands(self, latents: Tensor, on_tile: OnTile = nothing) -> Iterator[Tensor]:
        """Decode to pixels, from top to bottom.

        Args:
            latents: (1, C, h, w), scaled as `encode` returns them.
            on_tile: Called after each piece of work; may raise to stop.

        Yields:
            Bands (1, 3, rows, W) that follow each other, float32 on the VAE's device, about 0..1 and not clamped.
            Bands of two latents of equal size have equal heights.
        """
        vae, factor = self.vae, self.scale_factor
        height, width = latents.shape[-2:]
        halo = decoder_halo(vae) + _MIDDLE_RADIUS

        def program(crop: Crop) -> Program:
            tile = crop.padded
            z = latents[..., tile.top : tile.bottom, tile.left : tile.right].to(vae.device, vae.dtype)
            return _decoder_path(vae, z / vae.config.scaling_factor + (vae.config.shift_factor or 0.0))

        sample = _sample(height, width, side=SAMPLE_PX // factor, halo=halo, multiple=1)
        statistics = _measured([program(crop) for crop in sample], sample, on_tile)
        rows = max(LEAST_BAND_PX, min(self.tile_px, BAND_PX // (width * factor))) // factor
        for row in rows_of_crops(height, width, max_side=self.tile_px // factor, halo=halo, multiple=1, max_rows=rows):
            pieces = []
            for crop in row:
                pieces.append(crop.own_part(_run(program(crop), statistics)).float() / 2 + 0.5)
                on_tile()
            yield torch.cat(pieces, dim=-1)


def _encoder_path(vae: AutoencoderKL, x: Tensor) -> Program:
    """The whole encoder for one tile."""
    x = yield from down_path(vae, x, _stay)
    x = yield from _middle(vae.encoder.mid_block, x)
    x = yield vae.encoder.conv_norm_out, x
    return vae.encoder.conv_out(vae.encoder.conv_act(x))


def _decoder_path(vae: AutoencoderKL, z: Tensor) -> Program:
    """The whole decoder for one tile."""
    z = vae.post_quant_conv(z) if vae.post_quant_conv is not None else z
    x = yield from _middle(vae.decoder.mid_block, vae.decoder.conv_in(z))
    return (yield from up_path(vae, x, _stay))


def _middle(block: Any, x: Tensor) -> Program:
    """`UNetMidBlock2D` without time embedding, stopping at its normalisations."""
    x = yield from resnet_path(block.resnets[0], x, _stay)
    for attention, following in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            normalised = yield attention.group_norm, x
            x = (x + _attended(attention, normalised)) / attention.rescale_output_factor
        x = yield from resnet_path(following, x, _stay)
    return x


def _attended(attention: Any, x: Tensor) -> Tensor:
    """Self-attention of diffusers' `Attention` on normalised features (B, C, h, w), as its default processor does."""
    batch, channels, height, width = x.shape
    tokens = x.flatten(2).transpose(1, 2)  # (B, h * w, C)
    query, key, value = (
        project(tokens).view(batch, height * width, attention.heads, -1).transpose(1, 2)
        for project in (attention.to_q, attention.to_k, attention.to_v)
    )
    mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(batch, height * width, -1)
    return attention.to_out[0](mixed).transpose(1, 2).reshape(batch, channels, height, width)


def _stay(x: Tensor) -> Tensor:
    return x


def _sample(height: int, width: int, *, side: int, halo: int, multiple: int) -> list[Crop]:
    """Up to `SAMPLE_TILES` tiles, evenly spread over the picture and not overlapping, each with its halo."""
    side_y, side_x = min(side, height), min(side, width)
    columns = max(1, min(SAMPLE_TILES, width // side_x, round(math.sqrt(SAMPLE_TILES * width / height))))
    rows = max(1, min(SAMPLE_TILES // columns, height // side_y))
    halo = -(-halo // multiple) * multiple

    def starts(length: int, own: int, count: int) -> list[int]:
        return [round((length - own) * (i + 0.5) / count) // multiple * multiple for i in range(count)]

    return [
        Crop(
            own=Tile(top, left, top + side_y, left + side_x),
            padded=Tile(
                max(0, top - halo),
                max(0, left - halo),
                min(height, top + side_y + halo),
                min(width, left + side_x + halo),
            ),
        )
        for top in starts(height, side_y, rows)
        for left in starts(width, side_x, columns)
    ]


def _measured(programs: Sequence[Program], crops: Sequence[Crop], on_tile: OnTile) -> Statistics:
    """Run tiles from normalisation to normalisation; returns the statistics that their own areas have in common."""
    waiting = [next(program) for program in programs]
    statistics = []
    while True:
        norm = waiting[0][0]
        areas = [crop.own_part(x) for (_, x), crop in zip(waiting, crops, strict=True)]
        mean, variance = pooled_statistics(norm, areas)
        statistics.append((mean, variance))
        for i, program in enumerate(programs):
            try:
                waiting[i] = program.send(normalise(norm, waiting[i][1], mean, variance))
            except StopIteration:
                return statistics
            on_tile()


def _run(program: Program, statistics: Statistics) -> Tensor:
    """Run one tile through, with given statistics."""
    norm, x = next(program)
    for mean, variance in statistics:
        try:
            norm, x = program.send(normalise(norm, x, mean, variance))
        except StopIteration as stop:
            return stop.value
    raise AssertionError("the network has more normalisations than were measured")
