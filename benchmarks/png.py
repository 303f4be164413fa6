"""Megapixels per CPU second of the PNG writer and of Pillow, on a picture like a photograph.

    python benchmarks/png.py [side in px, default 2048]

Each row is the best of several runs in process CPU time, so that other work on the machine does not count.
"""

from __future__ import annotations

import io
import sys
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.png import PngWriter

RUNS = 5
# The amplitude spectrum falls with this power of the frequency; with the noise it makes files as large as photographs'.
SPECTRUM = 1.4
NOISE = 0.7
BAR_MP_PER_CPU_S = 50.0


def photograph(side: int) -> NDArray[np.uint8]:
    """Make a (side, side, 3) picture with the 1/f spectrum of photographs, correlated channels and sensor noise."""
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) ** SPECTRUM
    frequency[0, 0] = np.inf
    layers = [np.fft.irfft2(np.fft.rfft2(random.normal(size=(side, side))) / frequency, (side, side)) for _ in range(3)]
    luma, *chroma = [layer / layer.std() for layer in layers]
    channels = np.stack([luma + 0.15 * chroma[0], luma, luma + 0.15 * chroma[1]], axis=-1)
    pixels = 128 + 45 * channels + random.normal(scale=NOISE, size=channels.shape)
    return pixels.clip(0, 255).astype(np.uint8)


def measure(encode: Callable[[], bytes], pixels: NDArray[np.uint8]) -> tuple[float, float]:
    """Return (megapixels per CPU second of the best run, bytes per pixel), after checking the decoded pixels."""
    seconds = []
    for _ in range(RUNS):
        started = time.process_time()
        data = encode()
        seconds.append(time.process_time() - started)
    if not np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels):
        raise SystemExit("The encoded picture does not decode to its pixels.")
    area = pixels.shape[0] * pixels.shape[1]
    return area / 1e6 / min(seconds), len(data) / area


def ours(pixels: NDArray[np.uint8], level: int) -> bytes:
    """Encode with `PngWriter`, in bands of 256 rows."""
    stream = io.BytesIO()
    with PngWriter(stream, pixels.shape[1], pixels.shape[0], level=level) as png:
        for top in range(0, len(pixels), 256):
            png.write(pixels[top : top + 256])
    return stream.getvalue()


def pillow(pixels: NDArray[np.uint8], level: int) -> bytes:
    """Encode with Pillow."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", compress_level=level)
    return stream.getvalue()


def main(side: int) -> int:
    """Print the table; return 0 if the writer clears its bar."""
    pixels = photograph(side)
    encoders: dict[str, Callable[[], bytes]] = {
        "Pillow, level 6 (its default)": lambda: pillow(pixels, 6),
        "Pillow, level 1": lambda: pillow(pixels, 1),
        "PngWriter, level 1": lambda: ours(pixels, 1),
        "PngWriter, level 2": lambda: ours(pixels, 2),
    }
    figures = {name: measure(encode, pixels) for name, encode in encoders.items()}
    default = figures["Pillow, level 6 (its default)"][0]
    lines = [f"PNG of {side} x {side} px, best of {RUNS} runs", ""]
    lines += ["| encoder | MP per CPU second | ratio | bytes per px |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| {name} | {speed:.1f} | {speed / default:.1f} | {size:.2f} |" for name, (speed, size) in figures.items()
    ]
    speed = figures["PngWriter, level 1"][0]
    lines += ["", f"PngWriter, level 1: {speed:.1f} MP per CPU second; the bar is {BAR_MP_PER_CPU_S:.0f}."]
    sys.stdout.write("\n".join(lines) + "\n")
    return int(speed < BAR_MP_PER_CPU_S)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2048))
