"""The words a caption is made of: what can be measured in a picture, and what is said of good and bad ones."""

import numpy as np
from numpy.typing import NDArray

# Upper end of each hue band in degrees, and its name; the last red closes the circle.
HUES = (
    (16, "red"),
    (42, "orange"),
    (68, "yellow"),
    (160, "green"),
    (195, "turquoise"),
    (255, "blue"),
    (295, "purple"),
    (342, "pink"),
    (361, "red"),
)
COLOURS = ("black", "white", "grey", "brown", *dict.fromkeys(name for _, name in HUES))

QUALITY = ("high quality", "highly detailed", "high resolution", "sharp")
# One word or two for each fault that a degraded picture may have; the default negative prompt lists them all.
BLURRED = ("blurry", "low resolution", "interpolated")
BLOCKY = ("pixelated", "low resolution", "low quality")
COMPRESSED = ("compression artifacts", "low quality", "bad")
NOISY = ("noisey", "grainy", "ugly")
FAULTS = (BLURRED, BLOCKY, COMPRESSED, NOISY)


def name_colours(rgb: NDArray[np.float32]) -> NDArray[np.int64]:
    """Index into `COLOURS` of each colour.

    Args:
        rgb: (N, 3), 0..1.

    Returns:
        (N,) indices.
    """
    high, low = rgb.max(1), rgb.min(1)
    chroma = high - low
    safe = np.where(chroma > 0, chroma, 1)
    red, green, blue = rgb.T
    hue = np.select(
        [high == red, high == green], [(green - blue) / safe % 6, (blue - red) / safe + 2], (red - green) / safe + 4
    )
    degrees = 60 * hue
    band = np.searchsorted([end for end, _ in HUES], degrees, side="right")
    named = np.array([COLOURS.index(name) for _, name in HUES])[np.minimum(band, len(HUES) - 1)]
    brown = (degrees >= 12) & (degrees < 50) & (high < 0.6)
    named = np.where(brown, COLOURS.index("brown"), named)
    neutral = np.select([high > 0.85, high > 0.2], [COLOURS.index("white"), COLOURS.index("grey")], 0)
    is_neutral = (chroma < 0.12 + 0.08 * (1 - high)) | (high < 0.1)
    return np.where(is_neutral, neutral, named)


def describe(pixels: NDArray[np.uint8]) -> str:
    """Dominant colour, brightness and texture of a picture (H, W, 3) uint8, as words with commas between."""
    step = max(1, pixels.shape[0] // 16)
    sample = pixels[::step, ::step].reshape(-1, 3).astype(np.float32) / np.float32(255)
    counts = np.bincount(name_colours(sample), minlength=len(COLOURS))
    words = [COLOURS[int(counts.argmax())]]
    brightness = float(sample.mean())
    if brightness > 0.6:
        words.append("bright")
    elif brightness < 0.28:
        words.append("dark")
    green = pixels[::2, ::2, 1].astype(np.int16)
    activity = float(np.abs(np.diff(green, axis=1)).mean() + np.abs(np.diff(green, axis=0)).mean())
    if activity < 3:
        words.append("smooth")
    elif activity > 14:
        words.append("textured")
    return ", ".join(words)
