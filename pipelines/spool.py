"""Pictures too large for memory: written once from top to bottom, read in pieces.

A `Spool` is used where a picture's tensor would be: it has a shape and can be sliced. Its pixels lie in an unnamed
temporary file in 16 bits a channel, which is 64 times finer than what is delivered.
"""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

_LEVELS = 65_535
_PIXEL_BYTES = 6
_ROWS_AT_ONCE = 64


class Pixels(Protocol):
    """A picture (1, 3, H, W), 0..1, of which pieces can be taken: a tensor or a `Spool`."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, key: Any, /) -> Tensor: ...


class Spool:
    """A picture (1, 3, H, W) in a file that vanishes with this object; slices are float32 on the CPU.

    The file lies in the system's folder for temporary files (TMPDIR), 6 bytes a pixel.
    """

    def __init__(self, height: int, width: int) -> None:
        self.shape = torch.Size((1, 3, height, width))
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  # it lives as long as this object
        weakref.finalize(self, self._file.close)
        self._rows = 0

    @classmethod
    def of(cls, bands: Iterable[Tensor], height: int, width: int) -> Spool:
        """A picture of the bands that follow each other."""
        spool = cls(height, width)
        for band in bands:
            spool.append(band)
        if spool._rows != height:
            raise ValueError(f"Expected {height} rows; got {spool._rows}.")
        return spool

    def append(self, band: Tensor) -> None:
        """Add rows (1, 3, rows, W), clamped to 0..1, below those that are there."""
        for rows in band[0].split(_ROWS_AT_ONCE, dim=-2):
            levels = (rows.float().clamp(0, 1) * _LEVELS).round_().permute(1, 2, 0)
            self._file.write(levels.cpu().numpy().astype(np.uint16).tobytes())
        self._rows += band.shape[-2]

    def __getitem__(self, key: Any, /) -> Tensor:
        """`spool[..., top:bottom, left:right]`, without steps; (1, 3, rows, columns) float32."""
        _, rows, columns = key if len(key) == 3 else (*key, slice(None))
        top, bottom, _ = rows.indices(self.shape[-2])
        left, right, _ = columns.indices(self.shape[-1])
        self._file.flush()
        pixels = np.empty((max(0, bottom - top), max(0, right - left), 3), dtype=np.uint16)
        for row, line in zip(range(top, bottom), pixels, strict=True):
            os.preadv(self._file.fileno(), [line], (row * self.shape[-1] + left) * _PIXEL_BYTES)
        return torch.from_numpy(pixels.astype(np.float32) / _LEVELS).permute(2, 0, 1)[None]


def rows_of(pixels: Pixels, rows: int = 512) -> Iterator[Tensor]:
    """A picture in bands of so many rows, (1, 3, rows, W); one that is a tensor comes whole."""
    if isinstance(pixels, Tensor):
        yield pixels
        return
    for top in range(0, pixels.shape[-2], rows):
        yield pixels[..., top : top + rows, :]
