"""How FLUX.1 sees a latent: as tokens of 2 x 2 positions, each with its row and column."""

import torch
from torch import Tensor

TOKEN_LATENTS = 2
"""Latent positions along each side of a token."""


def pack(latents: Tensor) -> Tensor:
    """(N, C, h, w) with even sides to tokens (N, h * w / 4, 4 * C), row by row."""
    count, channels, height, width = latents.shape
    cells = latents.reshape(count, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return cells.reshape(count, height * width // 4, 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack` for latents of `height` x `width`."""
    count, _, size = tokens.shape
    cells = tokens.reshape(count, height // 2, width // 2, size // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return cells.reshape(count, size // 4, height, width)


def position_ids(height: int, width: int) -> Tensor:
    """(h * w / 4, 3) float32: zero, row and column of every token of latents of `height` x `width`."""
    rows, columns = torch.arange(height // 2), torch.arange(width // 2)
    return torch.cartesian_prod(torch.zeros(1, dtype=rows.dtype), rows, columns).float()
