"""The two ends of every recipe: pictures become tensors, and bands of pixels a PNG that tells how it was made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.errors import NonFiniteResult
from pipelines.images import Picture, bleed_edges, restore_profile, upscale_alpha
from pipelines.png import PngWriter
from pipelines.progress import Stages
from pipelines.redraw import Bands
from pipelines.tiff import BigTiffWriter
from pipelines.tiling import Grid
from pipelines.vae import TiledVAE

RECIPE_KEYWORD = "creative-upscaler"
"""The PNG text under which the recipe is found, whatever the pipeline."""

ROWS_AT_ONCE = 128
"""Rows that are made into bytes together, as many as the PNG compresses together."""

PNG, BIG_TIFF = "image/png", "image/tiff"
_WRITERS: Mapping[str, type[PngWriter | BigTiffWriter]] = {PNG: PngWriter, BIG_TIFF: BigTiffWriter}

Watch = Callable[[NDArray[np.uint8]], None]
"""Sees the finished rows (rows, W, 3) on their way into the file; told again from the top when a decode is repeated."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What was made, next to the PNG in `output`."""

    width: int
    height: int
    seed: int
    timings: dict[str, float]
    recipe: dict[str, Any]
    content_type: str = PNG


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture as (1, 3, H, W), float32, 0..1, on the CPU."""
    return torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)[None].contiguous()


def to_pixels(band: Tensor) -> NDArray[np.uint8]:
    """A band (1, 3, rows, W), about 0..1, as uint8 (rows, W, 3), clamped and rounded."""
    return (band[0].clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()


def opaque(picture: Picture) -> Tensor:
    """The colours of a picture as (1, 3, H, W), float32, 0..1; invisible pixels continue the visible ones."""
    return to_tensor(picture.rgb if picture.alpha is None else bleed_edges(picture.rgb, picture.alpha))


def recipe_of(
    pipeline: str, picture: Picture, params: Any, size: tuple[int, int], weights: dict[str, Any], **more: Any
) -> dict[str, Any]:
    """Everything that decides the pixels: it can be read back from the PNG and run again.

    Args:
        pipeline: Name of the recipe.
        picture: The input.
        params: The recipe's dataclass of parameters.
        size: Output (width, height) in px.
        weights: Which models, with their hashes.
        more: What else a reader may want to know, such as `tiles`.
    """
    return {
        "pipeline": pipeline,
        "params": asdict(params),
        "input": {"width": picture.width, "height": picture.height, "format": picture.format},
        "output": {"width": size[0], "height": size[1]},
        **more,
        "weights": weights,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }


def describe_tiles(grid: Grid, factor: int) -> dict[str, Any]:
    """A grid in px, as recipes tell it."""
    return {
        "height": grid.tile_height * factor,
        "width": grid.tile_width * factor,
        "tops": [top * factor for top in grid.tops],
        "lefts": [left * factor for left in grid.lefts],
    }


def deliver(
    bands: Bands,
    vae: TiledVAE,
    picture: Picture,
    recipe: dict[str, Any],
    output: BinaryIO,
    stages: Stages,
    *,
    watch: Watch | None = None,
    content_type: str = PNG,
) -> None:
    """Decode a finished picture into a PNG, as stage `vae_decode`; in 32 bits where fewer overflow.

    Args:
        bands: What decodes it.
        vae: Its VAE.
        picture: The input, whose alpha channel and colour profile the result carries.
        recipe: Written into the file; its `output` is the size.
        output: Seekable binary stream.
        stages: Told of the stage.
        watch: Sees the pixels before the picture's own profile is applied.
        content_type: `PNG` or `BIG_TIFF`.

    Raises:
        NonFiniteResult: In 32 bits too the decoder produces values that are not finite.
    """
    with stages.stage("vae_decode"):
        start = output.tell()
        overflowed = False
        try:
            write_picture(bands(vae), picture, recipe, output, watch, content_type)
        except NonFiniteResult:
            overflowed = vae.dtype != torch.float32
            if not overflowed:
                raise
        if overflowed:
            stages.remark("vae_decode", "The 16-bit decode overflowed; decoding again in 32 bits.")
            output.truncate(output.seek(start))
            write_picture(bands(vae.in_float32()), picture, recipe, output, watch, content_type)


def write_picture(
    bands: Iterator[Tensor],
    picture: Picture,
    recipe: dict[str, Any],
    output: BinaryIO,
    watch: Watch | None = None,
    content_type: str = PNG,
) -> None:
    """Write bands as PNG or BigTIFF, with the picture's own alpha channel and colour profile, and the recipe."""
    width, height = recipe["output"]["width"], recipe["output"]["height"]
    alpha = None if picture.alpha is None else np.asarray(upscale_alpha(picture.alpha, (width, height)))
    mode = "RGB" if alpha is None else "RGBA"
    text = {RECIPE_KEYWORD: json.dumps(recipe)}
    writer = _WRITERS[content_type]
    with writer(output, width, height, mode=mode, icc_profile=picture.icc_profile, text=text) as file:
        top = 0
        for rows in (rows for band in bands for rows in band.split(ROWS_AT_ONCE, dim=-2)):
            pixels = to_pixels(rows)
            if watch is not None:
                watch(pixels)
            if picture.icc_profile is not None:
                pixels = np.asarray(restore_profile(Image.fromarray(pixels), picture.icc_profile))
            if alpha is not None:
                pixels = np.dstack([pixels, alpha[top : top + len(pixels)]])
            file.write(np.ascontiguousarray(pixels))
            top += len(pixels)
