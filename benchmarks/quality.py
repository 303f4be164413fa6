"""Faithfulness and detail of every endpoint on photographs: reduce by 2, upscale by 2 at its defaults, compare.

    python -m benchmarks.quality [FOLDER ...] [--endpoint ID ...] [--creativity C ...] [--crop PX] [--save FOLDER]

Without a folder it measures the three photographs in tests/photos, on which nothing was trained, and three of
scikit-image's. Every row is a mean over the pictures; `detail` is relative to Lanczos, `original` is what the
photograph itself has. Noise rows: standard deviation added to a flat grey and a flat dark picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks import metrics
from benchmarks.local import Local
from server.endpoints import ENDPOINTS

HELD_OUT = Path(__file__).parent.parent / "tests" / "photos"
COLUMNS = ("dPSNR", "fidelity", "detail", "original", "colour", "border", "s / MP")


def photographs(folders: Iterable[Path], *, crop_px: int | None = None) -> dict[str, Image.Image]:
    """The pictures of the folders, or the six that were never trained on, or their middles; sides are even."""
    pictures: dict[str, Image.Image] = {}
    files = [
        file
        for folder in folders
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in Image.registered_extensions()
    ]
    if files:
        pictures = {file.stem: Image.open(file).convert("RGB") for file in files}
    else:
        from skimage import data

        pictures = {file.stem: Image.open(file).convert("RGB") for file in sorted(HELD_OUT.glob("*.png"))}
        pictures |= {name: Image.fromarray(getattr(data, name)()) for name in ("astronaut", "coffee", "chelsea")}
    return {name: middle(image, crop_px or max(image.size)) for name, image in pictures.items()}


def middle(image: Image.Image, most_px: int) -> Image.Image:
    """The middle of a picture, at most `most_px` a side and of even sides."""
    width, height = (min(side, most_px) // 2 * 2 for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def halved(image: Image.Image) -> Image.Image:
    """Reduced by 2 with area averaging."""
    return metrics.area_reduced(image, (image.width // 2, image.height // 2))


def borders(recipe: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """First pixel rows and columns after tile borders, from a picture's recipe."""
    tiles = recipe.get("tiles") or {"tops": [], "lefts": [], "height": 0, "width": 0}
    rows = [*tiles["tops"][1:], *(top + tiles["height"] for top in tiles["tops"][:-1])]
    columns = [*tiles["lefts"][1:], *(left + tiles["width"] for left in tiles["lefts"][:-1])]
    return rows, columns


def measure(original: Image.Image, result: Image.Image, recipe: Mapping[str, Any]) -> dict[str, float]:
    """Every figure of one picture but the time."""
    source = halved(original)
    lanczos = source.resize(original.size, Image.Resampling.LANCZOS)
    wanted = metrics.as_array(original)
    return {
        "dPSNR": metrics.psnr(metrics.as_array(result), wanted) - metrics.psnr(metrics.as_array(lanczos), wanted),
        "fidelity": metrics.fidelity(result, source),
        "detail": metrics.detail(result) / metrics.detail(lanczos),
        "original": metrics.detail(original) / metrics.detail(lanczos),
        "colour": metrics.colour_shift(result, source),
        "border": metrics.border_gradient(result, original, *borders(recipe)),
    }


def flat_noise(local: Local, endpoint: str, level: int, creativity: float) -> float:
    """Standard deviation (1/255) of what a flat picture of one grey level becomes."""
    made = local.make(endpoint, Image.new("RGB", (192, 192), (level,) * 3), creativity=creativity)
    return float(np.asarray(made.image, dtype=np.float64).std(axis=(0, 1)).max())


def main() -> None:
    """Measure and print a table for each endpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--endpoint", nargs="+", choices=list(ENDPOINTS), default=list(ENDPOINTS))
    parser.add_argument("--creativity", nargs="+", type=float, default=[0.1, 0.35, 0.5], help="0..1, of its range")
    parser.add_argument("--crop", type=int, help="measure only the middle of each picture, at most this many px a side")
    parser.add_argument("--save", type=Path, help="keep the pictures in this folder")
    parser.add_argument("--per-picture", action="store_true", help="print a row for each picture as well")
    arguments = parser.parse_args()
    local, console = Local(), Console(file=sys.stdout, width=110)
    pictures = photographs(arguments.folders, crop_px=arguments.crop)
    for endpoint in arguments.endpoint:
        table = Table("creativity", "picture", *COLUMNS, title=f"{endpoint}, pocket weights, x2")
        for creativity in arguments.creativity:
            rows = []
            for name, original in pictures.items():
                made = local.make(endpoint, halved(original), creativity=creativity)
                megapixels = original.width * original.height / 1e6
                figures = measure(original, made.image, made.recipe)
                figures["s / MP"] = made.timings["inference"] / megapixels
                rows.append(figures)
                if arguments.per_picture:
                    table.add_row(f"{creativity:g}", name, *(f"{figures[key]:.2f}" for key in COLUMNS))
                if arguments.save:
                    arguments.save.mkdir(parents=True, exist_ok=True)
                    made.image.save(arguments.save / f"{endpoint.split('/')[1]}-{name}-{creativity:g}.png")
            table.add_row(f"{creativity:g}", "mean", *(f"{np.mean([row[key] for row in rows]):.2f}" for key in COLUMNS))
        console.print(table)
        for label, level in (("grey", 128), ("dark", 16)):
            console.print(
                f"noise in a flat {label} picture at 0.5: {flat_noise(local, endpoint, level, 0.5):.2f} / 255"
            )


if __name__ == "__main__":
    main()
