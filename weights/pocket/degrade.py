"""How a training picture is made smaller and worse: reductions, noise and JPEG, each by a seeded draw."""

import io

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F


def to_tensor(pixels: NDArray[np.uint8], device: torch.device | str = "cpu") -> Tensor:
    """(N, H, W, 3) uint8 to (N, 3, H, W) float32 in 0..1, channels last in memory."""
    return torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255


def reduce(image: Tensor, factor: int, method: str) -> Tensor:
    """Reduce (N, 3, H, W) by a whole `factor`: "area" averages blocks, "bicubic" filters with a cubic."""
    if method == "area":
        return F.avg_pool2d(image, factor)
    size = (image.shape[2] // factor, image.shape[3] // factor)
    return F.interpolate(image, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)


def compress(image: Tensor, quality: int) -> Tensor:
    """A picture (3, H, W) in 0..1 as a JPEG file of that quality gives it back."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    stored = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(stored, "JPEG", quality=quality)
    return to_tensor(np.asarray(Image.open(stored))[None].copy(), image.device)[0]


def wear(images: Tensor, rng: np.random.Generator, *, noise_share: float, jpeg_share: float) -> Tensor:
    """Mild noise (up to 4/255) and JPEG (quality 60..95) on a share of the pictures (N, 3, h, w); a new tensor."""
    worn = images.clone()
    for index in range(len(worn)):
        if rng.random() < noise_share:
            grain = torch.from_numpy(rng.standard_normal(worn[index].shape, dtype=np.float32)).to(worn.device)
            worn[index] += grain * float(rng.uniform(0.5, 4)) / 255
        if rng.random() < jpeg_share:
            worn[index] = compress(worn[index], int(rng.integers(60, 96)))
    return worn.clamp(0, 1)


def blur(image: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of (3, H, W) with a deviation of `sigma` pixels; edges are mirrored."""
    reach = max(1, round(3 * sigma))
    places = torch.arange(-reach, reach + 1, device=image.device)
    kernel = torch.exp(-0.5 * (places / sigma) ** 2)
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    padded = F.pad(image[None], (reach,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(padded, kernel, groups=3), kernel.transpose(2, 3), groups=3)[0]


def spoil(image: Tensor, fault: int, rng: np.random.Generator) -> Tensor:
    """A picture (3, H, W) with one clear fault: blurred, blocky, compressed or noisy, as in `captions.FAULTS`."""
    if fault == 0:
        return blur(image, float(rng.uniform(0.7, 2.0)))
    if fault == 1:
        block = int(rng.choice([2, 4]))
        return F.interpolate(F.avg_pool2d(image[None], block), scale_factor=block, mode="nearest")[0]
    if fault == 2:
        return compress(image, int(rng.integers(10, 40)))
    grain = torch.from_numpy(rng.standard_normal(image.shape, dtype=np.float32)).to(image.device)
    return (image + grain * float(rng.uniform(4, 14)) / 255).clamp(0, 1)


def enlarge_lanczos(image: Tensor, factor: int) -> Tensor:
    """Enlarge (N, 3, h, w) in 0..1 by a whole `factor` with Pillow's Lanczos filter, on 8-bit values."""
    pixels = (image.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    size = (pixels.shape[2] * factor, pixels.shape[1] * factor)
    large = [np.asarray(Image.fromarray(each).resize(size, Image.Resampling.LANCZOS)) for each in pixels]
    return to_tensor(np.stack(large), image.device)
