"""The losses of the pocket set: how far two pictures are apart, in values, in edges and in texture."""

from torch import Tensor
from torch.nn import functional as F


def edge_loss(result: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the horizontal and vertical differences of two pictures (N, C, H, W)."""
    error = result - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def texture_loss(result: Tensor, target: Tensor, *, window: int = 16) -> Tensor:
    """How much more or less texture two pictures (N, C, H, W) of even sides have, place by place; scalar.

    The mean absolute differences of neighbours are compared over windows, those inside pairs of pixels apart from
    those between pairs. What is lost by halving a picture can only be guessed, and a guess that minimises the error
    is too small: pairs come out alike, and a fine mesh of twice the pixel shows. This asks for the right amount.
    """
    loss = result.new_zeros(())
    for dim in (-1, -2):
        for first in (0, 1):
            length = (result.shape[dim] - 1 - first) // 2 * 2
            amounts = []
            for image in (result, target):
                steps = image.diff(dim=dim).abs().narrow(dim, first, length + 1 - first)
                steps = steps[..., ::2] if dim == -1 else steps[..., ::2, :]
                amounts.append(F.avg_pool2d(steps, (window, window // 2) if dim == -1 else (window // 2, window)))
            loss = loss + F.l1_loss(amounts[0], amounts[1])
    return loss


def picture_loss(result: Tensor, target: Tensor, *, edge_weight: float = 0.5) -> Tensor:
    """Mean absolute error plus `edge_weight` times that of the edges; scalar."""
    return F.l1_loss(result, target) + edge_weight * edge_loss(result, target)
