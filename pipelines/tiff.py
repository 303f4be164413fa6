"""Write a BigTIFF band by band: for results that a PNG, or who reads it, cannot carry.

Strips of rows are compressed one by one (deflate, horizontal differences), so a reader can take any part of a picture
without what lies above it. BigTIFF has 64-bit offsets: files may be larger than 4 GB.
TIFF 6.0; BigTIFF: https://www.awaresystems.be/imaging/tiff/bigtiff.html.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from types import TracebackType
from typing import BinaryIO

import numpy as np
from isal import isal_zlib
from numpy.typing import NDArray

_CHANNELS = {"RGB": 3, "RGBA": 4}
_STRIP_ROWS = 128
_ASCII, _SHORT, _UNDEFINED, _LONG8 = 2, 3, 7, 16
_FORMATS = {_SHORT: "H", _LONG8: "Q"}


class BigTiffWriter:
    """Writes 8-bit RGB or RGBA rows to a stream as one BigTIFF; use as a context manager, or call `close`.

    Takes what `PngWriter` takes; the texts become the image description. The stream must be seekable.

    Raises:
        ValueError: The mode cannot be stored.
    """

    def __init__(
        self,
        stream: BinaryIO,
        width: int,
        height: int,
        *,
        mode: str = "RGB",
        icc_profile: bytes | None = None,
        text: Mapping[str, str] | None = None,
        level: int = 1,
    ) -> None:
        if mode not in _CHANNELS or min(width, height) < 1:
            raise ValueError(f"Expected RGB or RGBA and positive sides; got {mode!r}, {width} x {height}.")
        self._stream, self._width, self._height, self._level = stream, width, height, level
        self._channels = _CHANNELS[mode]
        self._icc_profile, self._text = icc_profile, dict(text or {})
        self._strips: list[tuple[int, int]] = []  # offset and length of each
        self._waiting = np.empty((0, width, self._channels), dtype=np.uint8)
        self._rows = 0
        self._start = stream.tell()
        stream.write(struct.pack("<2sHHHQ", b"II", 43, 8, 0, 0))

    def write(self, band: NDArray[np.uint8]) -> None:
        """Write rows (rows, width, channels) below those that are there.

        Raises:
            ValueError: They have another shape or type, or are too many.
        """
        if band.dtype != np.uint8 or band.shape[1:] != (self._width, self._channels):
            raise ValueError(f"Expected uint8 rows of {self._width} px; got {band.dtype} {band.shape}.")
        self._rows += len(band)
        if self._rows > self._height:
            raise ValueError(f"Expected {self._height} rows; got {self._rows}.")
        rows = np.concatenate([self._waiting, band])
        while len(rows) >= _STRIP_ROWS:
            self._write_strip(rows[:_STRIP_ROWS])
            rows = rows[_STRIP_ROWS:]
        self._waiting = rows.copy()

    def close(self) -> None:
        """Write what is left and the directory; the stream stays open.

        Raises:
            ValueError: Rows are missing.
        """
        if self._rows != self._height:
            raise ValueError(f"Expected {self._height} rows; got {self._rows}.")
        if len(self._waiting):
            self._write_strip(self._waiting)
        self._write_directory()

    def __enter__(self) -> BigTiffWriter:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if exc_type is None:
            self.close()

    def _write_strip(self, rows: NDArray[np.uint8]) -> None:
        differences = rows.copy()
        np.subtract(rows[:, 1:], rows[:, :-1], out=differences[:, 1:])
        data = isal_zlib.compress(differences.tobytes(), self._level)
        self._strips.append((self._position(), len(data)))
        self._stream.write(data)

    def _write_directory(self) -> None:
        description = "\n".join(f"{keyword}: {value}" for keyword, value in self._text.items())
        offsets, lengths = zip(*self._strips, strict=True)
        entries: list[tuple[int, int, tuple[int, ...] | bytes]] = [
            (256, _LONG8, (self._width,)),
            (257, _LONG8, (self._height,)),
            (258, _SHORT, (8,) * self._channels),
            (259, _SHORT, (8,)),  # deflate
            (262, _SHORT, (2,)),  # RGB
            (270, _ASCII, description.encode("utf-8") + b"\0"),
            (273, _LONG8, offsets),
            (277, _SHORT, (self._channels,)),
            (278, _LONG8, (_STRIP_ROWS,)),
            (279, _LONG8, lengths),
            (317, _SHORT, (2,)),  # horizontal differences
        ]
        if self._channels == 4:
            entries.append((338, _SHORT, (2,)))  # transparency that is not multiplied in
        if self._icc_profile is not None:
            entries.append((34675, _UNDEFINED, self._icc_profile))
        packed = []
        for tag, kind, values in entries:
            data = values if isinstance(values, bytes) else struct.pack(f"<{len(values)}{_FORMATS[kind]}", *values)
            if len(data) > 8:
                place = self._position()
                self._stream.write(data)
                data = struct.pack("<Q", place)
            packed.append(struct.pack("<HHQ8s", tag, kind, len(values), data))
        directory = self._position()
        self._stream.write(struct.pack("<Q", len(packed)) + b"".join(packed) + struct.pack("<Q", 0))
        end = self._stream.tell()
        self._stream.seek(self._start + 8)
        self._stream.write(struct.pack("<Q", directory))
        self._stream.seek(end)

    def _position(self) -> int:
        return self._stream.tell() - self._start
