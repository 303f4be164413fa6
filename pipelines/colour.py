"""Give a result back the colours of its reference: diffusion and VAE shift tones, mostly towards mid-grey.

`wavelet_match` replaces the coarse part of the result by that of the reference, as SUPIR and StableSR do
(arXiv:2305.07015); `adain` gives it the reference's mean and contrast as a whole (arXiv:1703.06868).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_LEAST_VARIANCE = 1e-5
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def halo_rows(levels: int) -> int:
    """Return how many pixels around a pixel `wavelet_match` looks at, in each direction."""
    return 2**levels - 1


def wavelet_match(
    result: Tensor, reference: Tensor, *, levels: int, amount: float, chroma_levels: int | None = None
) -> Tensor:
    """Keep the detail of `result` and take the tones of `reference`.

    The coarse part is the low band of an à-trous wavelet transform: smoothing with [1 2 1] / 4 along both axes, the
    taps 1, 2, 4, … px apart. The transform is linear, so the low band of the difference is all that is needed. Borders
    are continued with their last pixel.

    A band of rows gives the same pixels as the whole picture if both inputs have `halo_rows(levels)` more rows above
    and below, where the picture has them, which are cut off afterwards.

    Args:
        result: (1, 3, H, W) floating point, 0..1.
        reference: Of the same shape, dtype and device.
        levels: Octaves that count as detail; structures above about 2^levels px are tones.
        amount: 0 returns the result, 1 has the tones of the reference alone.
        chroma_levels: Octaves that count as detail of colour, at most `levels`, which is the default. Eyes see colour
            more coarsely than light: fewer take coloured speckle away that luma detail does not need.

    Returns:
        (1, 3, H, W), clamped to 0..1, same dtype and device; `result` itself for amount 0.
    """
    if amount == 0:
        return result
    chroma_levels = levels if chroma_levels is None else chroma_levels
    low = _low_band(reference - result, range(chroma_levels))
    if chroma_levels < levels:
        luma = (low * low.new_tensor(_LUMA)[:, None, None]).sum(dim=1, keepdim=True)
        low = low + (_low_band(luma, range(chroma_levels, levels)) - luma)
    return (result + amount * low).clamp_(0, 1)


class Moments(NamedTuple):
    """Of each channel of a picture, (1, 3, 1, 1) float32."""

    mean: Tensor
    variance: Tensor


def moments(bands: Iterable[Tensor]) -> Moments:
    """The moments of a picture whose bands (1, 3, rows, W) follow each other."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for band in bands:
        values = band.double()
        count += band.shape[-2] * band.shape[-1]
        total = total + values.sum(dim=(-2, -1), keepdim=True).cpu()
        squares = squares + values.square().sum(dim=(-2, -1), keepdim=True).cpu()
    mean = total / count
    return Moments(mean.float(), (squares / count - mean.square()).clamp_min(0).float())


def adain(band: Tensor, found: Moments, wanted: Moments, *, max_gain: float = 2.0) -> Tensor:
    """Give a picture, or a band of it, other moments in each channel.

    Args:
        band: (1, 3, rows, W) floating point, 0..1.
        found: Of the whole picture.
        wanted: Of its reference.
        max_gain: Contrast is raised at most this often: of a flat picture nothing but noise would be raised.

    Returns:
        (1, 3, rows, W), clamped to 0..1, same dtype and device.
    """
    ratio = (wanted.variance + _LEAST_VARIANCE) / (found.variance + _LEAST_VARIANCE)
    gain = ratio.sqrt().clamp(max=max_gain)
    offset = wanted.mean - found.mean * gain
    return torch.addcmul(offset.to(band.device), band.float(), gain.to(band.device)).clamp_(0, 1).to(band.dtype)


def _low_band(image: Tensor, levels: range) -> Tensor:
    """Smooth with taps 2^level px apart, for each of the levels."""
    for level in levels:
        image = _smoothed(_smoothed(image, 2**level, dim=-1), 2**level, dim=-2)
    return image


def _smoothed(image: Tensor, distance: int, *, dim: int) -> Tensor:
    """Smooth along one axis with [1 2 1] / 4, taps `distance` px apart."""
    padding = (distance, distance, 0, 0) if dim == -1 else (0, 0, distance, distance)
    padded = F.pad(image, padding, mode="replicate")
    length = image.shape[dim]
    outer = padded.narrow(dim, 0, length) + padded.narrow(dim, 2 * distance, length)
    return outer.mul_(0.25).add_(image, alpha=0.5)
