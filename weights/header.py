"""What a safetensors file says of itself, checked before anything in it is believed or read.

The format: eight bytes with the header's length (little endian), the header as JSON, then the tensors' bytes end to
end. Files come from strangers; every number of theirs is compared with the file that is really there.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

MAX_HEADER_BYTES = 100 * 2**20
"""The limit of the safetensors library itself."""
SNIFF_BYTES = 64
"""How much of a file's beginning `sniff` wants to see."""
MAX_DIMENSIONS = 8
MAX_NUMBER = 2**48
"""Of bytes or numbers along one side: far more than any file has, and products of them stay short."""
ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}

_PICKLE = re.compile(rb"\x80[\x02-\x05]")
_MARKUP = re.compile(rb"\s*(?:<!doctype|<html|<head|<\?xml|<!--)", re.IGNORECASE)


class UnsuitableFile(Exception):
    """A file of weights that is not used; the message completes "The file ..."."""


class TensorInfo(NamedTuple):
    """One tensor: `dtype` in the format's own words, its shape, and its first and last byte behind the header."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class Header:
    """The tensors of a file by name, and its texts."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str] = field(default_factory=dict)

    def matching(self, pattern: str) -> list[str]:
        """The names that contain a regular expression."""
        return [name for name in self.tensors if re.search(pattern, name)]


def sniff(head: bytes) -> None:
    """Refuse what cannot become a safetensors file, from its first `SNIFF_BYTES` bytes.

    Raises:
        UnsuitableFile: It is a web page, a pickle, or announces an impossible header.
    """
    if _MARKUP.match(head):
        raise UnsuitableFile("is a web page, not a file of weights: use the link that downloads the file itself")
    if is_pickle(head):
        raise UnsuitableFile(
            "is a pickle, which can run code when it is read; only safetensors are accepted unless the operator "
            "allows pickles"
        )
    if head.startswith(b"version https://git-lfs"):
        raise UnsuitableFile("is a Git LFS pointer, not the weights it stands for")
    if len(head) < 9:
        raise UnsuitableFile(f"has {len(head)} bytes, which is no safetensors file")
    if not _announces_header(head):
        raise UnsuitableFile("is not a safetensors file")


def is_pickle(head: bytes) -> bool:
    """Whether a file that begins so is what torch.save writes."""
    # The length of one header in 2048 looks like the beginning of a pickle.
    return head.startswith(b"PK\x03\x04") or (_PICKLE.match(head) is not None and not _announces_header(head))


def _announces_header(head: bytes) -> bool:
    return int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES and head[8:9] == b"{"


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file; no tensor is read.

    Raises:
        UnsuitableFile: It is none, is cut off, or says something of itself that is not so.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        sniff(file.read(SNIFF_BYTES))
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise UnsuitableFile(f"is cut off: it announces a header of {length} bytes and has {size} bytes in all")
        text = file.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UnsuitableFile("has a header that is not the JSON of a safetensors file") from error
    if not isinstance(entries, dict):
        raise UnsuitableFile("has a header that is not the JSON of a safetensors file")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UnsuitableFile("has metadata that are not texts")
    tensors = {name: _checked(name, entry) for name, entry in entries.items()}
    _check_places(tensors.values(), size - 8 - length)
    if not tensors:
        raise UnsuitableFile("holds no tensors")
    _check_library(path)
    return Header(tensors, metadata)


def _check_library(path: Path) -> None:
    """The library that reads the tensors later is stricter about the JSON than Python's own parser."""
    try:
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise UnsuitableFile("has a header that is not the JSON of a safetensors file") from error


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _checked(name: str, entry: Any) -> TensorInfo:
    """One entry of the header, whose size in bytes must follow from its shape."""
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        raise UnsuitableFile(f"describes the tensor {name[:80]!r} in no known form") from error
    numbers = (*shape, begin, end)
    if len(shape) > MAX_DIMENSIONS or not all(type(number) is int and 0 <= number <= MAX_NUMBER for number in numbers):
        raise UnsuitableFile(f"describes the tensor {name[:80]!r} in no known form")
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise UnsuitableFile(f"holds numbers of the kind {str(dtype)[:20]!r}, which are not read here")
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise UnsuitableFile(
            f"lies about the tensor {name[:80]!r}: {math.prod(shape) * ITEM_BYTES[dtype]} bytes by its shape and "
            f"{end - begin} by its place"
        )
    return TensorInfo(dtype, shape, begin, end)


def _check_places(tensors: Iterable[TensorInfo], data_bytes: int) -> None:
    """The tensors must lie end to end and fill the file: no gaps, no overlaps, nothing outside."""
    place = 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != place:
            raise UnsuitableFile("lies about where its tensors are: they overlap or leave gaps")
        place = tensor.end
    if place > data_bytes:
        raise UnsuitableFile(f"is cut off: its tensors take {place} bytes and {data_bytes} are there")
    if place < data_bytes:
        raise UnsuitableFile(f"has {data_bytes - place} bytes more than its tensors take")
