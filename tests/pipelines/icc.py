"""Colour profiles made by hand, byte by byte, as the ICC specification (v2.4) lays them out."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable

D50 = (0.9642, 1.0, 0.8249)
# Primaries of Display P3, adapted to D50.
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))


def display_p3(gamma: float = 2.2) -> bytes:
    """A monitor profile with a gamut wider than sRGB's."""
    primaries = {name: _xyz(value) for name, value in zip((b"rXYZ", b"gXYZ", b"bXYZ"), P3, strict=True)}
    curves = dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma))
    return _profile(b"mntr", b"RGB ", b"XYZ ", {b"wtpt": _xyz(D50), **primaries, **curves})


def grey(gamma: float) -> bytes:
    """A grey profile with a pure power curve."""
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": _xyz(D50), b"kTRC": _curve(gamma)})


def cmyk() -> bytes:
    """A press whose cyan, magenta, yellow and black inks take away lightness only."""
    return _profile(
        b"prtr", b"CMYK", b"Lab ", {b"wtpt": _xyz(D50), b"A2B0": _table(4, lambda inks: 255 - 60 * sum(inks))}
    )


def scanner() -> bytes:
    """An RGB device that can only be read from: there is no table back."""
    return _profile(b"scnr", b"RGB ", b"Lab ", {b"wtpt": _xyz(D50), b"A2B0": _table(3, lambda rgb: 80 * sum(rgb))})


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    place = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += b"\0" * (-len(data) % 4)
        table += struct.pack(">4sII", name, place + len(body), len(data))
        body += data
    header = struct.pack(
        ">I4sI4s4s4s6H4s", place + len(body), b"test", 0x02400000, kind, space, connection, 2000, 1, 1, 0, 0, 0, b"acsp"
    )
    header = header.ljust(68, b"\0") + struct.pack(">3i", *(round(value * 65536) for value in D50))
    return header.ljust(128, b"\0") + table + body


def _xyz(value: tuple[float, float, float]) -> bytes:
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(part * 65536) for part in value))


def _curve(gamma: float) -> bytes:
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))


def _table(channels: int, lightness: Callable[[tuple[int, ...]], int]) -> bytes:
    """An 8-bit table with two grid points per channel, to neutral Lab colours."""
    straight = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 if index % 4 == 0 else 0 for index in range(9)))
    grid = b"".join(
        bytes([max(lightness(corner), 0), 128, 128]) for corner in itertools.product((0, 1), repeat=channels)
    )
    return b"mft1\0\0\0\0" + bytes([channels, 3, 2, 0]) + matrix + straight * channels + grid + straight * 3
