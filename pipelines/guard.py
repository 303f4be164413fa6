"""The safety checker's place in a recipe: it sees the result on its way into the file, and has the last word.

A result is never whole in memory, so what the checker looks at is put together, much smaller, from the bands that are
written. Where it objects the file is written again, black and of the same size: fal does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.delivery import deliver, write_picture
from pipelines.images import Picture
from pipelines.progress import Stages
from pipelines.redraw import Bands
from pipelines.safety import SafetyChecker
from pipelines.vae import TiledVAE

LOOKOUT_SIDE_PX = 896
"""Shorter side of what is kept: the checker looks at windows of half the sides, on twice its 224 pixels."""
BLACK_ROWS = 512
REPLACED = "The safety checker objected: the picture was replaced by a black one."


class Lookout:
    """Collects bands of rows into a smaller picture by averaging blocks; memory is that of the small picture.

    Args:
        width: Of the whole picture in px.
        height: Likewise.
    """

    def __init__(self, width: int, height: int) -> None:
        self.factor = max(1, min(width, height) // LOOKOUT_SIDE_PX)
        self._height = height
        self.begin()

    def begin(self) -> None:
        """Forget what was seen: the picture comes from the top, maybe again."""
        self._seen = 0
        self._waiting: NDArray[np.uint8] = np.empty((0, 0, 3), np.uint8)
        self._reduced: list[NDArray[np.uint8]] = []

    def __call__(self, rows: NDArray[np.uint8]) -> None:
        """Take the next rows (N, W, 3)."""
        self._seen += len(rows)
        rows = np.concatenate([self._waiting, rows]) if len(self._waiting) else rows
        whole = len(rows) // self.factor * self.factor
        if whole:
            self._reduced.append(self._averaged(rows[:whole]))
        self._waiting = rows[whole:].copy() if self._seen < self._height else rows[:0]

    def picture(self) -> Image.Image:
        """What was seen so far, RGB; a remainder of fewer pixels than a block at the right or bottom is left out."""
        return Image.fromarray(np.concatenate(self._reduced))

    def _averaged(self, rows: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self.factor == 1:
            return rows.copy()
        side = self.factor
        width = rows.shape[1] // side * side
        blocks = rows[:, :width].reshape(len(rows) // side, side, width // side, side, 3)
        return np.rint(blocks.mean(axis=(1, 3), dtype=np.float32)).astype(np.uint8)


def may_show(checker: SafetyChecker | None) -> Callable[[Image.Image], bool]:
    """Whether a preview may be seen: none that the checker would not let through at the end."""
    return lambda image: checker is None or not checker.is_unsafe(image)


def deliver_checked(
    bands: Bands,
    vae: TiledVAE,
    picture: Picture,
    recipe: dict[str, Any],
    output: BinaryIO,
    stages: Stages,
    checker: SafetyChecker | None,
) -> bool:
    """As `delivery.deliver`, with the result replaced by a black picture where `checker` finds it unsafe.

    Returns:
        Whether it was replaced; always False without a checker.
    """
    if checker is None:
        deliver(bands, vae, picture, recipe, output, stages)
        return False
    start = output.tell()
    lookout = Lookout(recipe["output"]["width"], recipe["output"]["height"])

    def watched(decoder: TiledVAE) -> Iterator[Tensor]:
        # A decode that overflows may have shown any number of rows before it is repeated.
        lookout.begin()
        return bands(decoder)

    deliver(watched, vae, picture, recipe, output, stages, watch=lookout)
    with stages.stage("safety"):
        unsafe = checker.is_unsafe(lookout.picture())
    if unsafe:
        output.truncate(output.seek(start))
        deliver_black(picture, recipe, output, stages)
    return unsafe


def deliver_black(picture: Picture, recipe: dict[str, Any], output: BinaryIO, stages: Stages) -> None:
    """Write an opaque black picture of the recipe's size, and say why."""
    stages.remark("safety", REPLACED)
    size = recipe["output"]["width"], recipe["output"]["height"]
    write_picture(_black(*size), replace(picture, alpha=None), recipe, output)


def _black(width: int, height: int) -> Iterator[Tensor]:
    """Bands of a black picture."""
    for top in range(0, height, BLACK_ROWS):
        yield torch.zeros(1, 3, min(BLACK_ROWS, height - top), width)
