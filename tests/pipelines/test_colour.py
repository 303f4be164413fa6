"""Colour matching moves tones and keeps detail."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.colour import adain, halo_rows, moments, wavelet_match


def texture(height: int = 96, width: int = 80) -> Tensor:
    """Fine detail around mid-grey: one pixel up, one pixel down."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (0.5 + 0.05 * (-1.0) ** (x + y)).expand(1, 3, -1, -1)


def test_an_equal_reference_changes_nothing() -> None:
    """A result that has its reference's tones stays as it is."""
    image = torch.rand(1, 3, 40, 50)

    assert torch.allclose(wavelet_match(image, image, levels=5, amount=1.0), image)


def test_a_colour_cast_is_taken_off() -> None:
    """A shift of a whole channel disappears, and the detail stays."""
    cast = texture() + torch.tensor([0.1, 0.0, -0.1])[:, None, None]
    reference = torch.full_like(cast, 0.5)

    matched = wavelet_match(cast, reference, levels=5, amount=1.0)

    assert torch.allclose(matched, texture(), atol=3e-3)


def test_amount_fades_the_correction_in() -> None:
    """Half the amount takes half the cast off; none returns the result itself."""
    cast, reference = torch.full((1, 3, 20, 20), 0.6), torch.full((1, 3, 20, 20), 0.4)

    assert torch.allclose(wavelet_match(cast, reference, levels=3, amount=0.5), torch.full_like(cast, 0.5))
    assert wavelet_match(cast, reference, levels=3, amount=0) is cast


def test_detail_of_the_reference_is_not_taken() -> None:
    """Structures finer than the levels stay the result's own; coarser ones come from the reference."""
    flat = torch.full((1, 3, 96, 80), 0.5)
    gradient = torch.linspace(0.2, 0.8, 80).expand(1, 3, 96, 80)

    assert torch.allclose(wavelet_match(flat, texture(), levels=4, amount=1.0), flat, atol=3e-3)
    middle = (wavelet_match(flat, gradient, levels=3, amount=1.0) - gradient)[..., 8:-8]
    assert middle.abs().max() < 1e-5


def test_coloured_speckle_goes_where_grey_detail_stays() -> None:
    """With fewer levels for colour, specks of colour come from the reference and specks of light from the result."""
    reference = torch.full((1, 3, 64, 64), 0.5)
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    specks = F.interpolate(0.1 * torch.randn(1, 3, 16, 16), scale_factor=4)
    luma = (specks * weights).sum(dim=1, keepdim=True)

    matched = wavelet_match(reference + specks, reference, levels=4, chroma_levels=1, amount=1.0) - 0.5

    kept_luma = (matched * weights).sum(dim=1, keepdim=True)
    assert kept_luma.std() > 0.8 * luma.std()
    assert (matched - kept_luma).std() < 0.6 * (specks - luma).std()


@pytest.mark.parametrize("levels", [1, 2, 5])
def test_bands_with_a_halo_equal_the_whole_picture(levels: int) -> None:
    """Matching band by band gives the pixels of the whole picture."""
    result, reference, halo = torch.rand(1, 3, 130, 24), torch.rand(1, 3, 130, 24), halo_rows(levels)
    whole = wavelet_match(result, reference, levels=levels, amount=0.8)

    for top in range(0, 130, 32):
        upper, lower = max(top - halo, 0), min(top + 32 + halo, 130)
        band = wavelet_match(result[..., upper:lower, :], reference[..., upper:lower, :], levels=levels, amount=0.8)
        bottom = min(top + 32, 130)
        assert torch.allclose(band[..., top - upper : bottom - upper, :], whole[..., top:bottom, :], atol=1e-6)


def test_the_low_band_is_the_published_kernel() -> None:
    """One level smooths with [1 2 1]⊗[1 2 1] / 16 over a border of repeated pixels."""
    reference = torch.rand(1, 3, 9, 9) * 0.2 + 0.4
    row = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (row[:, None] * row)[None, None].expand(3, 1, 3, 3)

    low = wavelet_match(torch.zeros_like(reference), reference, levels=1, amount=1.0)

    assert torch.allclose(low, F.conv2d(F.pad(reference, (1, 1, 1, 1), mode="replicate"), kernel, groups=3), atol=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (1, 200), (3, 2)])
def test_pictures_smaller_than_the_reach(size: tuple[int, int]) -> None:
    """A picture of a few pixels is matched, not refused."""
    matched = wavelet_match(torch.rand(1, 3, *size), torch.full((1, 3, *size), 0.5), levels=7, amount=1.0)

    assert matched.shape == (1, 3, *size)
    assert bool(matched.isfinite().all())


def test_results_stay_in_range() -> None:
    """Corrections beyond black and white are clamped."""
    matched = wavelet_match(torch.rand(1, 3, 30, 30), torch.ones(1, 3, 30, 30), levels=4, amount=1.0)

    assert 0 <= matched.min() <= matched.max() <= 1


def normalised(result: Tensor, reference: Tensor) -> Tensor:
    """The result with the moments of its reference, taken from bands of 7 rows."""
    found, wanted = (moments(picture.split(7, dim=-2)) for picture in (result, reference))
    return torch.cat([adain(rows, found, wanted) for rows in result.split(7, dim=-2)], dim=-2)


def test_mean_and_contrast_become_those_of_the_reference() -> None:
    """As a whole and channel by channel; shape, type and range stay."""
    result = 0.35 + 0.2 * torch.rand(1, 3, 50, 60)
    reference = torch.tensor([0.4, 0.5, 0.6])[:, None, None] + 0.2 * torch.rand(1, 3, 50, 60)

    matched = normalised(result, reference)

    assert torch.allclose(matched.mean((2, 3)), reference.mean((2, 3)), atol=1e-6)
    assert torch.allclose(matched.std((2, 3)), reference.std((2, 3)), atol=1e-3)
    assert normalised(result.half(), reference.half()).dtype == torch.float16


def test_the_noise_of_a_flat_result_is_not_raised_to_contrast() -> None:
    """Without a limit, a gain of 27 would make a picture of what was noise."""
    flat = 0.5 + 0.001 * torch.randn(1, 3, 50, 60)

    matched = normalised(flat, torch.rand(1, 3, 50, 60))

    assert bool((matched.std((2, 3)) < 2.1 * flat.std((2, 3))).all())


def test_one_pixel_takes_the_colour_of_the_reference() -> None:
    """It has no contrast; nothing is divided by it."""
    assert torch.allclose(normalised(torch.rand(1, 3, 1, 1), torch.full((1, 3, 1, 1), 0.3)), torch.tensor(0.3))
