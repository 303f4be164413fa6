"""Strength is a noise level, and the schedulers made here step exactly like the stock ones."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st

from pipelines.schedules import (
    Kind,
    alphas_cumprod,
    detail_bump,
    detail_factor,
    make_scheduler,
    sample_scale,
    sigma_bounds,
    sigma_ramp,
    start_sigma,
    timestep_of_sigma,
)

TRAINED = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# What the published SD 1.5 repositories hold: another scheduler's config, with keys that ours do not know.
CONFIG = {**TRAINED, "_class_name": "PNDMScheduler", "skip_prk_steps": True, "clip_sample": False, "steps_offset": 1}
BOUNDS = sigma_bounds(CONFIG)
KINDS: list[Kind] = ["euler", "dpmpp_2m", "dpmpp_3m_sde"]


def predict(sample: torch.Tensor) -> torch.Tensor:
    """Stand in for a model: smooth, bounded, not linear."""
    return torch.sin(3 * sample) * 0.7


def test_bounds_of_the_published_noise_schedule() -> None:
    """SD's schedule spans noise levels 0.029 to 14.61."""
    assert sigma_bounds(CONFIG) == pytest.approx((0.0292, 14.6146), abs=1e-3)


@pytest.mark.parametrize(
    ("strength", "sigma"), [(0.35, 0.500), (0.5, 1.28), (0.6, 2.23), (0.7, 3.75), (1.0, 14.6), (0.0, 0.029)]
)
def test_start_levels_of_known_strengths(strength: float, sigma: float) -> None:
    """Strengths start from the levels that the curve was published with."""
    assert start_sigma(strength, *BOUNDS) == pytest.approx(sigma, rel=0.01)


def test_start_level_rises_strictly() -> None:
    """More strength is always more noise, at a resolution of a thousandth."""
    levels = [start_sigma(index / 1000, *BOUNDS) for index in range(1001)]

    assert all(low < high for low, high in itertools.pairwise(levels))


def test_every_ramp_is_legal() -> None:
    """For 1 to 200 steps and any strength: start level, strictly down, lowest level, zero; empty for strength 0."""
    low, high = BOUNDS
    strengths = [0.0, 1e-6, 0.001, 0.0026, *(index / 20 for index in range(1, 21))]

    for steps, strength in itertools.product([*range(1, 51), 75, 100, 200], strengths):
        sigmas = sigma_ramp(strength, steps, low, high)
        if strength == 0:
            assert len(sigmas) == 0
            continue
        assert 2 <= len(sigmas) <= steps + 1
        assert sigmas[0].item() == pytest.approx(start_sigma(strength, low, high), rel=1e-6)
        assert bool((sigmas.diff() < 0).all())
        assert sigmas[-1] == 0
        assert len(sigmas) == 2 or sigmas[-2].item() == pytest.approx(low, rel=1e-5)


@pytest.mark.parametrize(
    ("strength", "steps", "evaluations"), [(0.35, 18, 7), (0.5, 20, 11), (1, 20, 20), (0.01, 4, 1)]
)
def test_number_of_evaluations(strength: float, steps: int, evaluations: int) -> None:
    """A strength runs its share of the steps and one more, at least one and at most all."""
    assert len(sigma_ramp(strength, steps, *BOUNDS)) - 1 == evaluations


@given(strength=st.floats(0.001, 1), steps=st.integers(1, 60), kind=st.sampled_from(KINDS))
def test_schedulers_step_exactly_n_times_and_end_finite(strength: float, steps: int, kind: Kind) -> None:
    """Any ramp is stepped to its end: n steps, noise level 0, a finite sample, and no step more."""
    sigmas = sigma_ramp(strength, steps, *BOUNDS)
    scheduler = make_scheduler(CONFIG, sigmas, kind)
    noise: dict[str, Any] = {"variance_noise": torch.ones(1, 1, 2, 2)} if kind == "dpmpp_3m_sde" else {}
    sample = torch.randn(1, 1, 2, 2, generator=torch.Generator().manual_seed(1))

    for timestep in scheduler.timesteps:
        sample = scheduler.step(predict(sample), timestep, sample, **noise).prev_sample

    assert len(scheduler.timesteps) == len(sigmas) - 1
    assert scheduler.sigmas[scheduler.step_index] == 0
    assert bool(sample.isfinite().all())
    with pytest.raises(IndexError):
        scheduler.step(sample, scheduler.timesteps[-1], sample, **noise)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 20])
def test_euler_equals_stock(num_steps: int) -> None:
    """The Euler scheduler gives the stock scheduler's samples, bit for bit, and its timesteps."""
    stock = EulerDiscreteScheduler(**TRAINED)
    sigmas = sigma_ramp(1.0, num_steps, *BOUNDS)
    stock.set_timesteps(sigmas=sigmas.tolist())
    ours = make_scheduler(CONFIG, sigmas, "euler")
    left = right = torch.randn(1, 4, 8, 8) * sigmas[0]

    for theirs, timestep in zip(stock.timesteps, ours.timesteps, strict=True):
        left = stock.step(predict(stock.scale_model_input(left, theirs)), theirs, left).prev_sample
        right = ours.step(predict(right / (1 + ours.sigmas[ours.step_index or 0] ** 2) ** 0.5), timestep, right)[0]

        assert theirs.item() == pytest.approx(timestep.item(), abs=2e-3)
        assert torch.equal(left, right)


@pytest.mark.parametrize("num_steps", [1, 2, 7, 20])
@pytest.mark.parametrize(
    ("kind", "solver"),
    [
        ("dpmpp_2m", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
        ("dpmpp_3m_sde", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    ],
)
def test_dpm_solvers_equal_stock(kind: Kind, solver: dict[str, Any], num_steps: int) -> None:
    """On the sigmas of a stock Karras run the multistep solvers give its samples, bit for bit, noise included."""
    stock = DPMSolverMultistepScheduler(**TRAINED, **solver, use_karras_sigmas=True)
    stock.set_timesteps(num_steps)
    ours = make_scheduler(CONFIG, stock.sigmas, kind)
    left = right = torch.randn(1, 4, 8, 8)
    same, noise = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)

    for theirs, timestep in zip(stock.timesteps, ours.timesteps, strict=True):
        variance = {"variance_noise": torch.randn(1, 4, 8, 8, generator=noise)} if kind == "dpmpp_3m_sde" else {}
        left = stock.step(predict(left), theirs, left, generator=same).prev_sample
        right = ours.step(predict(right), timestep, right, **variance).prev_sample

        assert torch.equal(left, right)


def test_dpm_ramp_equals_stock_karras() -> None:
    """At strength 1 the ramp is the one a stock scheduler lays out with Karras sigmas."""
    stock = DPMSolverMultistepScheduler(**TRAINED, use_karras_sigmas=True)
    stock.set_timesteps(12)

    assert torch.allclose(sigma_ramp(1.0, 12, *BOUNDS), stock.sigmas, rtol=1e-4)


def test_prediction_type_is_kept() -> None:
    """A model trained on velocities gets a scheduler that reads velocities."""
    config = {**CONFIG, "prediction_type": "v_prediction"}

    assert all(
        make_scheduler(config, torch.tensor([1.0, 0.0]), kind).config.prediction_type == "v_prediction"
        for kind in KINDS
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_model_lands_on_the_picture(kind: Kind) -> None:
    """With the true noise as prediction every solver ends at the clean latents, in its own representation."""
    sigmas = sigma_ramp(0.5, 20, *BOUNDS)
    scheduler = make_scheduler(CONFIG, sigmas, kind)
    clean, noise = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    sample = (clean + sigmas[0] * noise) * sample_scale(kind, float(sigmas[0]))

    for timestep, sigma in zip(scheduler.timesteps, sigmas, strict=False):
        exploding = sample / sample_scale(kind, float(sigma))
        extra = {"variance_noise": noise} if kind == "dpmpp_3m_sde" else {}
        sample = scheduler.step((exploding - clean) / sigma, timestep, sample, **extra).prev_sample

    assert torch.allclose(sample, clean, atol=1e-4)


def test_sigmas_that_do_not_fall_to_zero_are_refused() -> None:
    """Empty, repeated or unfinished noise levels never reach a solver."""
    for sigmas in ([], [0.0], [1.0, 0.5], [1.0, 1.0, 0.0]):
        with pytest.raises(ValueError, match="strictly decreasing"):
            make_scheduler(CONFIG, torch.tensor(sigmas), "euler")


def test_timesteps_of_trained_levels_are_their_indices() -> None:
    """Trained noise levels map to their own timestep, levels outside to the first and the last."""
    cumulative = alphas_cumprod(CONFIG)
    sigmas = ((1 - cumulative.double()) / cumulative.double()).sqrt()

    assert torch.allclose(timestep_of_sigma(cumulative, sigmas), torch.arange(1000.0), atol=1e-3)
    assert timestep_of_sigma(cumulative, 1e-4) == 0
    assert timestep_of_sigma(cumulative, 100.0) == 999
    assert timestep_of_sigma(cumulative, 0.5).shape == ()


def test_detail_factors() -> None:
    """Detail 1, 3 and 5 at strength 0.5 give the calibrated factors; 0 is the identity, 0.2 the ceiling."""
    assert [round(detail_factor(detail, 0.5), 3) for detail in (0, 1, 3, 5)] == [0, 0.046, 0.097, 0.12]
    assert detail_factor(5, 0.1) == 0.2
    assert detail_factor(2, 0.7) < detail_factor(2, 0.5) < detail_factor(2, 0.35)
    assert detail_factor(3, 0) == 0


@pytest.mark.parametrize("num_steps", [1, 2, 7, 50])
def test_detail_bump_rises_and_falls_inside_the_run(num_steps: int) -> None:
    """The bump is 0 at both ends of a run, at most 1, and reaches its top in the middle."""
    bumps = [detail_bump(step, num_steps) for step in range(num_steps)]

    assert bumps[0] == bumps[-1] == 0
    assert all(0 <= bump <= 1 for bump in bumps)
    assert num_steps < 7 or max(bumps) > 0.9
