"""How a sample is noised, shown to the model and moved one step on, behind one interface for every family of models.

The denoising loop knows neither noise levels nor schedulers: it asks a `Sampler`. One run has one sampler; it holds
the solver's memory of earlier steps and, for stochastic solvers, the random generator.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pipelines.schedules import Kind, detail_bump, make_scheduler, sample_scale, timestep_of_sigma


class Sampler(Protocol):
    """The steps of one run; each step is taken once, in order from 0."""

    @property
    def num_steps(self) -> int:
        """Calls of the model."""
        ...

    def start(self, latents: Tensor, noise: Tensor) -> Tensor:
        """The sample at the first step: clean latents and standard normal noise of the same shape, mixed."""
        ...

    def model_input(self, step: int, sample: Tensor) -> tuple[Tensor, float]:
        """What the model is shown at a step, scaled as it expects, and its timestep, which need not be whole."""
        ...

    def advance(self, step: int, prediction: Tensor, sample: Tensor) -> Tensor:
        """The sample after a step, given what the model answered to `model_input` of that step."""
        ...

    def estimate(self, step: int, prediction: Tensor, sample: Tensor) -> Tensor:
        """The clean latents that the model's answer at a step amounts to."""
        ...


class NoiseSampler:
    """For models that predict noise on a discrete schedule: Stable Diffusion 1.5 and XL.

    Args:
        config: The model's scheduler config, of any scheduler class.
        sigmas: (n + 1,) strictly decreasing noise levels, 0 at the end.
        kind: The solver.
        detail: The model is told a noise level lower by up to this fraction in the middle steps, so that it leaves
            more fine structure ("detail daemon"); 0 is the unchanged schedule.
        generator: On the CPU; a stochastic solver draws its noise here, once per step for the whole picture.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        sigmas: Tensor,
        kind: Kind,
        *,
        detail: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        self._scheduler = make_scheduler(config, sigmas, kind)
        self._sigmas = [float(sigma) for sigma in sigmas]
        self._kind, self._detail, self._generator = kind, detail, generator

    @property
    def num_steps(self) -> int:
        """See `Sampler`."""
        return len(self._sigmas) - 1

    def start(self, latents: Tensor, noise: Tensor) -> Tensor:
        """See `Sampler`."""
        sigma = self._sigmas[0]
        return (latents + sigma * noise) * sample_scale(self._kind, sigma)

    def model_input(self, step: int, sample: Tensor) -> tuple[Tensor, float]:
        """See `Sampler`."""
        sigma, seen = self._sigmas[step], self._seen(step)
        shown = sample / (sample_scale(self._kind, sigma) * (1 + seen**2) ** 0.5)
        if seen == sigma:
            return shown, float(self._scheduler.timesteps[step])
        return shown, float(timestep_of_sigma(self._scheduler.alphas_cumprod, seen))

    def advance(self, step: int, prediction: Tensor, sample: Tensor) -> Tensor:
        """See `Sampler`."""
        noise: dict[str, Tensor] = {}
        if self._kind == "dpmpp_3m_sde":
            drawn = torch.randn(sample.shape, generator=self._generator, dtype=torch.float32)
            noise = {"variance_noise": drawn.to(sample.device)}
        scaled = prediction * (self._seen(step) / self._sigmas[step])
        moved: Tensor = self._scheduler.step(scaled, self._scheduler.timesteps[step], sample, **noise).prev_sample
        return moved

    def estimate(self, step: int, prediction: Tensor, sample: Tensor) -> Tensor:
        """See `Sampler`."""
        sigma = self._sigmas[step]
        return sample / sample_scale(self._kind, sigma) - self._seen(step) * prediction

    def _seen(self, step: int) -> float:
        """The noise level that the model is told."""
        return self._sigmas[step] * (1 - self._detail * detail_bump(step, self.num_steps))


class ProtectingSampler:
    """Another sampler that keeps part of the picture closer to what it was (differential diffusion, arXiv 2306.00950).

    Where the mask is 1 the start latents, noised anew to each step's level with the same noise, take the sample's
    place until the level is below `until`: there the run begins later, as if its strength were lower.

    Args:
        sampler: The run.
        latents: (1, C, H, W): the clean start.
        noise: Of the same shape: what the run was started with.
        mask: (1, 1, H, W), 0..1, on the same device; in between the two are mixed.
        sigmas: (n + 1,) noise levels of the run.
        until: The level at which the protected part starts.
        kind: The solver, which decides how samples are scaled.
    """

    def __init__(
        self,
        sampler: Sampler,
        latents: Tensor,
        noise: Tensor,
        mask: Tensor,
        sigmas: Tensor,
        *,
        until: float,
        kind: Kind,
    ) -> None:
        self._sampler, self._latents, self._noise, self._mask = sampler, latents, noise, mask
        self._sigmas, self._until, self._kind = [float(sigma) for sigma in sigmas], until, kind

    @property
    def num_steps(self) -> int:
        """See `Sampler`."""
        return self._sampler.num_steps

    def start(self, latents: Tensor, noise: Tensor) -> Tensor:
        """See `Sampler`."""
        return self._sampler.start(latents, noise)

    def model_input(self, step: int, sample: Tensor) -> tuple[Tensor, float]:
        """See `Sampler`."""
        return self._sampler.model_input(step, sample)

    def advance(self, step: int, prediction: Tensor, sample: Tensor) -> Tensor:
        """See `Sampler`."""
        moved, level = self._sampler.advance(step, prediction, sample), self._sigmas[step + 1]
        if level < self._until:
            return moved
        kept = (self._latents + level * self._noise) * sample_scale(self._kind, level)
        return torch.lerp(moved, kept, self._mask)

    def estimate(self, step: int, prediction: Tensor, sample: Tensor) -> Tensor:
        """See `Sampler`."""
        found = self._sampler.estimate(step, prediction, sample)
        return found if self._sigmas[step + 1] < self._until else torch.lerp(found, self._latents, self._mask)
