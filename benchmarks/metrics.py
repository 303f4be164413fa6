"""What "faithful", "detailed" and "seamless" mean in figures. Pictures are float arrays (H, W, 3), 0..255."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

Array = np.ndarray


def as_array(image: Image.Image) -> Array:
    """An RGB picture as float64 (H, W, 3), 0..255."""
    return np.asarray(image.convert("RGB"), dtype=np.float64)


def psnr(found: Array, wanted: Array) -> float:
    """Peak signal-to-noise ratio in dB over all channels; infinite for equal pictures."""
    error = float(np.mean((found - wanted) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def area_reduced(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Reduced by averaging the area under each pixel, (width, height) in px."""
    return image.resize(size, Image.Resampling.BOX)


def fidelity(result: Image.Image, source: Image.Image) -> float:
    """PSNR in dB between the area-reduced result and the picture it was made from."""
    return psnr(as_array(area_reduced(result, source.size)), as_array(source))


def luma(pixels: Array) -> Array:
    """Rec. 601 luma (H, W)."""
    return pixels @ np.array([0.299, 0.587, 0.114])


def detail(image: Image.Image) -> float:
    """Mean absolute Laplacian of luma (4-neighbour), in 1/255."""
    y = luma(as_array(image))
    laplacian = 4 * y[1:-1, 1:-1] - y[:-2, 1:-1] - y[2:, 1:-1] - y[1:-1, :-2] - y[1:-1, 2:]
    return float(np.abs(laplacian).mean())


def colour_shift(result: Image.Image, source: Image.Image) -> float:
    """Largest difference of the mean of a channel, in 1/255."""
    means = as_array(result).mean(axis=(0, 1)) - as_array(source).mean(axis=(0, 1))
    return float(np.abs(means).max())


def border_gradient(result: Image.Image, reference: Image.Image, rows: Sequence[int], columns: Sequence[int]) -> float:
    """Gradient across tile borders over the gradient beside them; 1 where the borders cannot be told.

    What the picture itself has at these places is divided out with a reference that was made without tiles.

    Args:
        result: The tiled picture.
        reference: The same scene of the same size without tiles.
        rows: First pixel rows after horizontal borders.
        columns: First pixel columns after vertical borders.
    """
    return _border_ratio(result, rows, columns) / _border_ratio(reference, rows, columns)


def _border_ratio(image: Image.Image, rows: Sequence[int], columns: Sequence[int], reach: int = 12) -> float:
    y = luma(as_array(image))
    across, beside = [], []
    for lines, positions in ((np.abs(np.diff(y, axis=0)), rows), (np.abs(np.diff(y, axis=1)).T, columns)):
        for position in positions:
            border = position - 1
            near = [i for i in range(border - reach, border + reach + 1) if abs(i - border) > 2 and 0 <= i < len(lines)]
            across.append(lines[border].mean())
            beside.append(lines[near].mean())
    return float(np.mean(across) / np.mean(beside)) if across else 1.0
