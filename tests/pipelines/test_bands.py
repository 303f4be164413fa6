"""Pictures in bands equal whole pictures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pipelines.bands import cut, filter_bands
from pipelines.colour import halo_rows, wavelet_match
from pipelines.errors import NonFiniteResult


def in_bands(picture: Tensor, heights: list[int]) -> Iterator[Tensor]:
    yield from torch.split(picture, heights, dim=-2)


@pytest.mark.parametrize("heights", [[64], [1] * 64, [5, 40, 19], [60, 4]])
def test_filtered_bands_equal_the_filtered_picture(heights: list[int]) -> None:
    """A filter with a reach gives the same rows whatever bands the picture comes in."""
    result, reference, levels = torch.rand(1, 3, 64, 20), torch.rand(1, 3, 64, 20), 3

    def match(rows: Tensor, other: Tensor) -> Tensor:
        return wavelet_match(rows, other, levels=levels, amount=0.7)

    pairs = zip(in_bands(result, heights), in_bands(reference, heights), strict=True)
    filtered = torch.cat(list(filter_bands(pairs, match, halo=halo_rows(levels))), dim=-2)

    assert torch.allclose(filtered, match(result, reference), atol=1e-6)


def test_filtering_keeps_few_rows() -> None:
    """What waits for its neighbours is bounded by the reach and a band, not by the picture."""
    most = 0

    def remember(rows: Tensor, other: Tensor) -> Tensor:
        nonlocal most
        most = max(most, rows.shape[-2])
        return rows

    picture = torch.rand(1, 3, 400, 4)
    pairs = zip(in_bands(picture, [20] * 20), in_bands(picture, [20] * 20), strict=True)

    assert torch.equal(torch.cat(list(filter_bands(pairs, remember, halo=7)), dim=-2), picture)
    assert most <= 20 + 2 * 7


def test_cut_drops_the_padding() -> None:
    """Rows and columns beyond the size are dropped, whole bands too."""
    picture = torch.rand(1, 3, 30, 12)

    assert torch.equal(torch.cat(list(cut(in_bands(picture, [10, 10, 10]), 15, 9)), dim=-2), picture[..., :15, :9])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_never_passed_on(value: float) -> None:
    """A broken decode is an error, not a black picture."""
    picture = torch.rand(1, 3, 8, 8)
    picture[0, 1, 3, 3] = value

    with pytest.raises(NonFiniteResult):
        list(cut([picture], 8, 8))
