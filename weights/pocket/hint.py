"""Where UNet and ControlNet begin: with what is known without training.

The noise is about what is left when the hint's latents are taken from the noisy ones. Finding out takes a network
longer than everything else: it has to learn the codec from the outside and a way for exact values through
normalisations. So a part of the hint embedding's channels starts as the best linear map from a picture to its latents,
and the UNet starts as that difference, all other residual branches at zero. Values go through SiLU in both signs, as
silu(x) - silu(-x) = x; the last GroupNorm brings the difference to the deviation of noise, whatever the noise level.
"""

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor
from torch.nn import functional as F

LATENTS = 16
# At a strength of 0.4 the hint replaces the noisy latents exactly: services leave their strength at 0.25 and 0.6.
FULL_AT_04 = 2.5
HINT_CHANNELS = (24, 56, 96)
"""Channels of the embedding at full, half and a quarter of the picture's size."""
EXACT_CHANNELS = (6, 24, 32)
"""How many of them, the last ones, carry values in both signs: 3 colours, 12 of 2 x 2 pixels, 16 latents."""


@torch.no_grad()
def linear_latents(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """The best linear map from (N, 3, H, W) in 0..1 to scaled latents, as a convolution after 2 x 2 pixel blocks.

    Returns:
        Weight (16, 12, 3, 3) and bias (16,) of a convolution of stride 2 over blocks of 2 x 2 pixels in -1..1.
    """
    image = pixels.contiguous() * 2 - 1
    latents = vae.encode(image).latent_dist.mean * vae.config.scaling_factor
    blocks = F.pixel_unshuffle(image, 2)
    columns = F.unfold(blocks, 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1)
    columns = torch.cat([columns, torch.ones(len(columns), 1)], 1).double()
    wanted = latents.flatten(2).transpose(1, 2).flatten(0, 1).double()
    ridge = 1e-3 * len(columns) * torch.eye(columns.shape[1], dtype=torch.float64)
    solution = torch.linalg.solve(columns.T @ columns + 1e-3 * ridge, columns.T @ wanted).float()
    return solution[:-1].T.reshape(-1, blocks.shape[1], 3, 3), solution[-1]


@torch.no_grad()
def begin_as_difference(unet: Any) -> None:
    """Let a UNet of 16 latent channels and 32 first ones predict its input less what the ControlNet adds, in place."""
    unet.conv_in.weight.zero_()
    unet.conv_in.bias.zero_()
    unet.conv_in.weight[:LATENTS, :, 1, 1] = torch.eye(LATENTS)
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.conv2.weight.zero_()
            module.conv2.bias.zero_()
    last: Any = unet.up_blocks[-1].resnets[-1].conv_shortcut
    skip = last.in_channels - 2 * LATENTS
    last.weight.mul_(0.1)
    last.weight[:, skip:] = 0
    last.bias.zero_()
    unet.conv_out.weight.zero_()
    unet.conv_out.bias.zero_()
    for i in range(LATENTS):
        for sign, channel in ((1, 2 * i), (-1, 2 * i + 1)):
            last.weight[channel, skip + i] = sign
            last.weight[channel, skip + LATENTS + i] = -sign
            unet.conv_out.weight[i, channel, 1, 1] = sign


@torch.no_grad()
def begin_as_codec(controlnet: Any, vae: Any, pixels: Tensor) -> None:
    """Let a ControlNet, made of such a UNet with `HINT_CHANNELS`, add the latents of its hint, in place.

    Args:
        controlnet: See above.
        vae: The trained codec.
        pixels: (N, 3, H, W) in 0..1, what the linear map is fitted to.
    """
    embedding = controlnet.controlnet_cond_embedding
    weight, bias = linear_latents(vae, pixels)
    full, half, quarter = (HINT_CHANNELS[i] - EXACT_CHANNELS[i] for i in range(3))
    convs = [embedding.conv_in, *embedding.blocks]
    for conv, exact in zip(convs, (full, full, half, half, quarter), strict=True):
        conv.weight[exact:] = 0
        conv.bias[exact:] = 0
    for colour in range(3):
        _put(convs[0], full, colour, torch.eye(3)[colour][:, None, None] * _centre() * 2, -1.0)
        _put_pairs(convs[1], full, colour, full, torch.eye(3)[colour][:, None, None] * _centre())
    for value in range(12):
        colour, y, x = value // 4, value // 2 % 2, value % 2
        # With stride 2 and a margin of one, the kernel's second and third tap see the block's first and second pixel.
        taps = torch.zeros(3, 3, 3)
        taps[colour, 1 + y, 1 + x] = 1
        _put_pairs(convs[2], half, value, full, taps)
        _put_pairs(convs[3], half, value, half, torch.eye(12)[value][:, None, None] * _centre())
    for latent in range(LATENTS):
        _put_pairs(convs[4], quarter, latent, half, weight[latent], float(bias[latent]))
        for sign, channel in ((1, quarter + 2 * latent), (-1, quarter + 2 * latent + 1)):
            embedding.conv_out.weight[LATENTS + latent, channel, 1, 1] = sign
        controlnet.controlnet_down_blocks[0].weight[LATENTS + latent, LATENTS + latent] = FULL_AT_04


def _centre() -> Tensor:
    """A kernel (1, 3, 3) that sees its own place only."""
    kernel = torch.zeros(1, 3, 3)
    kernel[0, 1, 1] = 1
    return kernel


def _put(conv: Any, first: int, value: int, taps: Tensor, bias: float) -> None:
    """Let the pair of channels for `value` compute `taps` (C, 3, 3) of the input plus `bias`, in both signs."""
    for sign, channel in ((1, first + 2 * value), (-1, first + 2 * value + 1)):
        conv.weight[channel] = sign * taps
        conv.bias[channel] = sign * bias


def _put_pairs(conv: Any, first: int, value: int, first_in: int, taps: Tensor, bias: float = 0.0) -> None:
    """The same over an input whose channels from `first_in` on are such pairs after SiLU; taps (values, 3, 3)."""
    both = torch.zeros_like(conv.weight[0])
    both[first_in::2], both[first_in + 1 :: 2] = taps, -taps
    _put(conv, first, value, both, bias)
