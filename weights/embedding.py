"""Textual inversion files (arXiv 2208.01618): vectors that a word in a prompt stands for.

| written by        | names                                                          |
|-------------------|----------------------------------------------------------------|
| A1111, one encoder | `emb_params`; in a pickle `string_to_param` with one entry     |
| diffusers         | one tensor, named after the word, such as `<cat-toy>`          |
| SDXL              | `clip_l` and `clip_g`, one for each text encoder; some trainers |
|                   | `text_encoders_0` and `text_encoders_1`                        |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from weights.detect import check_embedding
from weights.header import Header, UnsuitableFile, read_header

MAX_VECTORS = 750
"""Ten chunks of a prompt; published files have one to about a hundred."""
MAX_WIDTH = 8192
"""Numbers of a vector; the largest text encoder in use takes 4096."""
_PAIRS = (["clip_l", "clip_g"], ["text_encoders_0", "text_encoders_1"])
_BY_WIDTH = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 1280: "SDXL's second text encoder"}


@dataclass(frozen=True)
class Embedding:
    """Vectors (n, width), one tensor for each text encoder in its order, and the word in the file ("": none)."""

    vectors: tuple[Tensor, ...]
    word: str = ""


def read_embedding(path: Path) -> Embedding:
    """Read a textual inversion.

    Raises:
        UnsuitableFile: It is none, or its vectors are none.
    """
    header = read_header(path)
    check_embedding(header)
    names = next((pair for pair in _PAIRS if pair[1] in header.tensors), None) or _single(header)
    with safe_open(path, framework="pt") as tensors:
        if missing := [name for name in names if name not in header.tensors]:
            raise UnsuitableFile(f"lacks the vectors {missing[0]!r} of the other text encoder")
        for name in names:
            _check_shape(header.tensors[name].shape, name)  # before any of it is read: it may be huge
        vectors = tuple(_vectors(tensors.get_tensor(name)) for name in names)
    if len({len(rows) for rows in vectors}) > 1:
        raise UnsuitableFile("has different numbers of vectors for the two text encoders")
    return Embedding(vectors, word=names[0] if re.fullmatch(r"<[^<>\s]{1,100}>", names[0]) else "")


def fitting(embedding: Embedding, widths: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The vectors for text encoders of these widths, in their order.

    Raises:
        UnsuitableFile: The file was made for other text encoders.
    """
    found = tuple(rows.shape[1] for rows in embedding.vectors)
    if found != widths:
        family = "SDXL" if found == (768, 1280) else _BY_WIDTH.get(found[0], "")
        raise UnsuitableFile(
            f"has vectors of {_listing(found)} numbers{f' ({family})' if family else ''}; this model's text "
            f"encoder{'s take' if len(widths) > 1 else ' takes'} {_listing(widths)}"
        )
    return embedding.vectors


def _single(header: Header) -> list[str]:
    if "emb_params" in header.tensors:
        return ["emb_params"]
    if len(header.tensors) > 1:
        raise UnsuitableFile("holds several textual inversions; give the file of one")
    return list(header.tensors)


def _check_shape(shape: tuple[int, ...], name: str) -> None:
    rows = (1, *shape) if len(shape) == 1 else shape
    if len(rows) != 2 or not 1 <= rows[0] <= MAX_VECTORS or rows[1] > MAX_WIDTH:
        raise UnsuitableFile(f"has {name[:80]!r} in the shape {shape}; expected 1 to {MAX_VECTORS} vectors")


def _vectors(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise UnsuitableFile(
            f"holds numbers of the kind {tensor.dtype}; expected 1 to {MAX_VECTORS} vectors of real ones"
        )
    rows = (tensor[None] if tensor.ndim == 1 else tensor).float()
    if not bool(rows.isfinite().all()):
        raise UnsuitableFile("holds numbers that are not finite")
    return rows


def _listing(widths: tuple[int, ...]) -> str:
    return " and ".join(map(str, widths))
