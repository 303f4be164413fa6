"""The tiled loop by its properties, on models whose answer is known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from pipelines.errors import Cancelled
from pipelines.multidiffusion import batches, tiled_denoise
from pipelines.samplers import NoiseSampler
from pipelines.schedules import sigma_ramp
from pipelines.tiling import Tile, fit_grid

CONFIG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
}
SIGMAS = sigma_ramp(0.5, 10, 0.029, 14.61)


class Pointwise:
    """A model whose prediction at a latent depends on that latent alone, so tiling must be invisible."""

    def __init__(self) -> None:
        self.batch_sizes: list[int] = []

    def predict(self, tiles: Tensor, places: Sequence[Tile], timestep: float, conditioning: None) -> Tensor:
        self.batch_sizes.append(len(places))
        return torch.tanh(tiles * 0.7 + timestep / 1000)


class Place(Pointwise):
    """A model that predicts a linear function of the place on the whole latent."""

    def predict(self, tiles: Tensor, places: Sequence[Tile], timestep: float, conditioning: None) -> Tensor:
        rows = [torch.arange(tile.top, tile.bottom).float()[:, None] for tile in places]
        columns = [torch.arange(tile.left, tile.right).float()[None] for tile in places]
        fields = [0.01 * row - 0.02 * column for row, column in zip(rows, columns, strict=True)]
        return torch.stack(fields)[:, None].expand_as(tiles)


def run(model: Pointwise, latents: Tensor, *, max_tile: int, tile_batch: int = 4, detail: float = 0.0) -> Tensor:
    return tiled_denoise(
        model,
        latents,
        NoiseSampler(CONFIG, SIGMAS, "euler", detail=detail),
        None,
        grid=fit_grid(*latents.shape[-2:], max_tile=max_tile, overlap=8),
        tile_batch=tile_batch,
        seed=3,
    )


@pytest.mark.parametrize("detail", [0.0, 0.1])
def test_tiles_are_invisible_to_a_pointwise_model(detail: float) -> None:
    """Where a prediction needs no neighbours, tiled equals untiled."""
    latents = torch.randn(1, 4, 96, 136)

    tiled = run(Pointwise(), latents, max_tile=48, detail=detail)
    whole = run(Pointwise(), latents, max_tile=512, detail=detail)

    assert torch.allclose(tiled, whole, atol=1e-5)


def test_fused_prediction_of_a_linear_field_is_that_field() -> None:
    """A prediction that is a linear function of the place comes out of the tiles as that function."""
    latents = torch.zeros(1, 4, 96, 136)

    tiled, whole = run(Place(), latents, max_tile=48), run(Place(), latents, max_tile=512)

    assert torch.allclose(tiled, whole, atol=1e-4)


@pytest.mark.parametrize("tile_batch", [1, 2, 5, 100])
def test_result_does_not_depend_on_the_tile_batch(tile_batch: int) -> None:
    """The batch is a matter of memory and speed alone."""
    latents = torch.randn(1, 4, 120, 120)

    assert torch.allclose(
        run(Pointwise(), latents, max_tile=48, tile_batch=tile_batch),
        run(Pointwise(), latents, max_tile=48, tile_batch=3),
        atol=1e-5,
    )


def test_detail_zero_is_the_unchanged_schedule_and_more_detail_changes_more() -> None:
    """The sigma scaling is the identity at 0 and its effect grows."""
    latents = torch.randn(1, 4, 64, 64)

    plain = run(Pointwise(), latents, max_tile=512)
    moved = [(run(Pointwise(), latents, max_tile=512, detail=d) - plain).abs().mean().item() for d in (0, 0.05, 0.1)]

    assert moved[0] == 0
    assert moved[0] < moved[1] < moved[2]


def test_every_step_reports_and_may_stop_the_loop() -> None:
    """A cancelled request computes nothing after the step in which it was cancelled."""
    model, seen = Pointwise(), []

    def stop_after_two(step: int) -> None:
        seen.append(step)
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        tiled_denoise(
            model,
            torch.randn(1, 4, 32, 32),
            NoiseSampler(CONFIG, SIGMAS, "euler"),
            None,
            grid=fit_grid(32, 32, max_tile=64, overlap=8),
            tile_batch=1,
            seed=0,
            on_step=stop_after_two,
        )

    assert seen == [1, 2]
    assert len(model.batch_sizes) == 2


def test_batches_are_even() -> None:
    """Nine tiles at four a batch run as three threes: few shapes, no sliver."""
    assert [s.stop - s.start for s in batches(9, 4)] == [3, 3, 3]
    assert [s.stop - s.start for s in batches(4, 16)] == [4]
