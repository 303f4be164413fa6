"""The losses of the pocket set: how far two pictures are apart, in values and in edges."""

from torch import Tensor
from torch.nn import functional as F


def edge_loss(result: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error of the horizontal and vertical differences of two pictures (N, C, H, W)."""
    error = result - target
    return error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def picture_loss(result: Tensor, target: Tensor, *, edge_weight: float = 0.5) -> Tensor:
    """Mean absolute error plus `edge_weight` times that of the edges; scalar."""
    return F.l1_loss(result, target) + edge_weight * edge_loss(result, target)
