"""Noise schedules: how strength becomes a start noise level, and stock diffusers schedulers that run from there.

A noise level σ is the ratio of noise to signal, as in k-diffusion and Karras et al. (arXiv:2206.00364): the noised
latents are `x = x₀ + σ·noise`. That is the variance-exploding form. The two families of schedulers store it
differently, and `sample_scale` is the factor between them:

=================== ============================= ===================== =======================
kind                scheduler                     sample it steps       `sample_scale`
=================== ============================= ===================== =======================
euler               EulerDiscreteScheduler        x                     1
dpmpp_2m            DPMSolverMultistepScheduler   x / √(1 + σ²)         1 / √(1 + σ²)
dpmpp_3m_sde        DPMSolverMultistepScheduler   x / √(1 + σ²)         1 / √(1 + σ²)
=================== ============================= ===================== =======================

Either way the model is fed `x / √(1 + σ²)`. A loop that feeds the model a slightly lower level σ' (`detail_bump`)
therefore does, for a model that predicts noise::

    x = sample / sample_scale(kind, sigma)
    prediction = model(x / (1 + lower**2) ** 0.5, timestep_of_sigma(alphas_cumprod, lower)) * lower / sigma
    sample = scheduler.step(prediction, scheduler.timesteps[i], sample).prev_sample
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

Kind = Literal["euler", "dpmpp_2m", "dpmpp_3m_sde"]

# The part of a model's scheduler config that says what it was trained on; the rest belongs to the solver.
_TRAINED = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
)
_SOLVERS: dict[Kind, tuple[type, dict[str, Any]]] = {
    "euler": (EulerDiscreteScheduler, {}),
    "dpmpp_2m": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpmpp_3m_sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
}

# The part of the schedule in which a lower noise level adds detail without moving the composition.
_DETAIL_WINDOW = (0.1, 0.8)
_MAX_DETAIL_FACTOR = 0.2


def alphas_cumprod(config: Mapping[str, Any]) -> Tensor:
    """Return ᾱ of every training timestep, (num_train_timesteps,) float32, for a model's scheduler config."""
    cumulative: Tensor = _stock("dpmpp_2m", config).alphas_cumprod
    return cumulative


def sigma_bounds(config: Mapping[str, Any]) -> tuple[float, float]:
    """Return the lowest and the highest noise level that a model with this scheduler config was trained on."""
    sigmas = _training_sigmas(alphas_cumprod(config))
    return float(sigmas[0]), float(sigmas[-1])


def start_sigma(strength: float, sigma_min: float, sigma_max: float, rho: float = 7.0) -> float:
    """Return the noise level that an img2img strength starts from: σmin at 0, σmax at 1, strictly increasing.

    The curve is the one on which Karras et al. (equation 5) place their steps, so that a strength means the same start
    level for every scheduler and every number of steps.
    """
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return float((low + strength * (high - low)) ** rho)


def sigma_ramp(
    strength: float, num_inference_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0
) -> Tensor:
    """Lay the steps of an img2img run from `start_sigma` down to σmin on Karras' curve, then to zero.

    Args:
        strength: 0 to 1. 0 runs no step at all, any other value at least one.
        num_inference_steps: For strength 1; lower strengths run `round(strength · num_inference_steps) + 1`.
        sigma_min: The lowest trained noise level.
        sigma_max: The highest trained noise level.
        rho: Curvature of the ramp.

    Returns:
        (n + 1,) float32, strictly decreasing, 0 at the end; empty for strength 0.
    """
    if strength == 0:
        return torch.empty(0)
    num_steps = min(max(round(strength * num_inference_steps) + 1, 1), num_inference_steps)
    start = start_sigma(strength, sigma_min, sigma_max, rho)
    roots = np.linspace(start ** (1 / rho), sigma_min ** (1 / rho), num_steps)
    return torch.tensor([*(roots**rho), 0.0], dtype=torch.float32)


def make_scheduler(
    config: Mapping[str, Any], sigmas: Tensor, kind: Kind
) -> EulerDiscreteScheduler | DPMSolverMultistepScheduler:
    """Make a stock diffusers scheduler that steps through `sigmas`, once.

    It is fresh and holds the state of one run: never share it. Pass `scheduler.timesteps[i]` to step `i`; `step` raises
    after the last. For "dpmpp_3m_sde" pass `variance_noise=` to `step`, so that the noise comes from the caller's seed.
    For "euler" the model input may come from `scale_model_input` or be computed as the module docstring says.

    Args:
        config: The model's scheduler config, of any scheduler class; only what the model was trained on is read.
        sigmas: (n + 1,) strictly decreasing noise levels, 0 at the end.
        kind: The solver.

    Raises:
        ValueError: `sigmas` are not strictly decreasing to 0.
    """
    if len(sigmas) < 2 or float(sigmas[-1]) != 0.0 or bool((sigmas.diff() >= 0).any()):
        raise ValueError(f"Expected strictly decreasing noise levels that end at 0; got {sigmas.tolist()}.")
    scheduler = _stock(kind, config)
    scheduler.sigmas = sigmas.to(device="cpu", dtype=torch.float32)
    scheduler.timesteps = timestep_of_sigma(scheduler.alphas_cumprod, scheduler.sigmas[:-1])
    scheduler.num_inference_steps = len(sigmas) - 1
    scheduler.set_begin_index(0)
    scheduler.is_scale_input_called = True  # EulerDiscreteScheduler warns if a loop scales the input itself.
    return scheduler


def timestep_of_sigma(alphas_cumprod: Tensor, sigma: Tensor | float) -> Tensor:
    """Return the fractional training timestep of noise levels, interpolating in log σ.

    Args:
        alphas_cumprod: (num_train_timesteps,) as diffusers' schedulers hold it.
        sigma: One level or several; levels outside the trained range get its first or last timestep.

    Returns:
        float32 of the shape of `sigma`, on the CPU.
    """
    levels = torch.as_tensor(sigma, dtype=torch.float64).clamp_min(1e-10).log()
    trained = _training_sigmas(alphas_cumprod).log()
    timesteps = np.interp(levels.numpy(), trained.numpy(), np.arange(len(trained)))
    return torch.as_tensor(timesteps, dtype=torch.float32)


def sample_scale(kind: Kind, sigma: float) -> float:
    """Return the factor from variance-exploding latents `x₀ + σ·noise` to the sample that a scheduler steps."""
    return 1.0 if kind == "euler" else 1.0 / math.sqrt(1.0 + sigma**2)


def detail_factor(detail: float, strength: float) -> float:
    """Return how far below the true noise level the model is told to work, at most 0.2; 0 for detail 0.

    The same reduction adds about four times as much texture at strength 0.7 as at 0.35; dividing by the square of the
    strength evens that out.

    Args:
        detail: 0 to 5.
        strength: 0 to 1.
    """
    if detail <= 0 or strength <= 0:
        return 0.0
    at_half = 0.12 * (1 - math.exp(-detail / 2.5)) / (1 - math.exp(-2))
    return min(at_half * (0.5 / strength) ** 2, _MAX_DETAIL_FACTOR)


def detail_bump(step: int, num_steps: int) -> float:
    """Return the share of `detail_factor` that applies at a step, 0 to 1: the model works at σ·(1 − factor·bump).

    It rises and falls smoothly in the middle of the run: composition is settled by then, and the last steps stay clean.
    """
    first, last = _DETAIL_WINDOW
    position = step / (num_steps - 1) if num_steps > 1 else 0.0
    if not first <= position <= last:
        return 0.0
    return math.sin(math.pi * (position - first) / (last - first)) ** 2


def _stock(kind: Kind, config: Mapping[str, Any]) -> Any:
    scheduler, solver = _SOLVERS[kind]
    return scheduler(**{name: config[name] for name in _TRAINED if name in config}, **solver)


def _training_sigmas(alphas_cumprod: Tensor) -> Tensor:
    cumulative = alphas_cumprod.double().cpu()
    return ((1 - cumulative) / cumulative).sqrt()
