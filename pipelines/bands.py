"""Pictures that pass from top to bottom in bands, so that no stage needs the whole result in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from pipelines.errors import NonFiniteResult


def cut(bands: Iterable[Tensor], height: int, width: int) -> Iterator[Tensor]:
    """Cut bands (1, C, rows, W) to the upper left `height` x `width` px.

    Raises:
        NonFiniteResult: A band holds NaN or infinity.
    """
    left = height
    for band in bands:
        if left <= 0:
            continue
        band = band[..., : min(left, band.shape[-2]), :width]
        if not torch.isfinite(band).all():
            raise NonFiniteResult("The decoded picture has values that are not finite.")
        left -= band.shape[-2]
        yield band


def filter_bands(
    pairs: Iterable[tuple[Tensor, Tensor]], apply: Callable[[Tensor, Tensor], Tensor], *, halo: int
) -> Iterator[Tensor]:
    """Apply a filter with a vertical reach to bands, as if to the whole picture.

    Args:
        pairs: Bands (1, C, rows, W) and the same rows of a reference picture.
        apply: Takes rows of both, returns the filtered rows; a row depends on at most `halo` rows above and below.
        halo: Reach of `apply` in rows.

    Yields:
        Filtered bands, of other heights than they came but the same rows in the same order.
    """
    rows: Tensor | None = None
    reference: Tensor | None = None
    done = 0  # rows of the buffer that have been yielded; at most `halo` of them are kept for their successors

    def emit(upto: int) -> Tensor:
        assert rows is not None and reference is not None
        bottom = min(rows.shape[-2], upto + halo)
        return apply(rows[..., :bottom, :], reference[..., :bottom, :])[..., done:upto, :]

    for band, band_reference in pairs:
        rows = band if rows is None else torch.cat([rows, band], dim=-2)
        reference = band_reference if reference is None else torch.cat([reference, band_reference], dim=-2)
        upto = rows.shape[-2] - halo
        if upto > done:
            yield emit(upto)
            drop = max(0, upto - halo)
            rows, reference, done = rows[..., drop:, :], reference[..., drop:, :], upto - drop
    if rows is not None and rows.shape[-2] > done:
        yield emit(rows.shape[-2])
