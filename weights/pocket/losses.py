"""The losses of the pocket set: how far two pictures are apart, in values, in edges and in texture."""

import torch
from torch import Tensor
from torch.nn import functional as F


def edge_loss(result: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the horizontal and vertical differences of two pictures (N, C, H, W)."""
    error = result - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def texture_loss(result: Tensor, target: Tensor, *, window: int = 16, period: int = 2) -> Tensor:
    """How much more or less texture two pictures (N, C, H, W) have, place by place; scalar.

    The mean absolute differences of neighbours are compared over windows, those at each place of a `period` of pixels
    apart from the others. What is lost by halving a picture, or by noise on latents of 4 x 4 pixels, can only be
    guessed, and a guess that minimises the error is too small: the pixels of one block come out alike, and a fine mesh
    shows. This asks for the right amount.

    Args:
        result: Sides are multiples of `window`.
        target: Of the same shape.
        window: Side of the squares over which amounts are compared, a multiple of `period`.
        period: Of the blocks that could show.
    """
    loss = result.new_zeros(())
    for dim in (-1, -2):
        for first in range(period):
            length = (result.shape[dim] - 1 - first) // period * period
            amounts = []
            for image in (result, target):
                steps = image.diff(dim=dim).abs().narrow(dim, first, length + 1 - first)
                steps = steps[..., ::period] if dim == -1 else steps[..., ::period, :]
                amounts.append(
                    F.avg_pool2d(steps, (window, window // period) if dim == -1 else (window // period, window))
                )
            loss = loss + F.l1_loss(amounts[0], amounts[1])
    return loss


def balance_loss(result: Tensor, target: Tensor, *, period: int = 2) -> Tensor:
    """How much more of the edges fall on some places of a `period` of pixels than in the target; scalar.

    Both pictures are (N, C, H, W); the mean absolute differences of neighbours over all of them count, not where they
    are. Against `texture_loss` it asks for no amount of texture, and costs less error.
    """
    loss = result.new_zeros(())
    for dim in (-1, -2):
        steps, wanted = (
            torch.stack([image.diff(dim=dim).transpose(dim, -1)[..., i::period].abs().mean() for i in range(period)])
            for image in (result, target)
        )
        loss = loss + (steps * wanted.mean() - wanted * steps.mean()).abs().mean() / wanted.mean()
    return loss


def picture_loss(result: Tensor, target: Tensor, *, edge_weight: float = 0.5) -> Tensor:
    """Mean absolute error plus `edge_weight` times that of the edges; scalar."""
    return F.l1_loss(result, target) + edge_weight * edge_loss(result, target)
