"""Trains a denoiser that predicts the noise: the recipe that the SD 1.5-shaped and the SDXL-shaped set share.

Samples resemble what the service does with the networks: noise levels crowd where image-to-image works, the noisy
latents are often those of the pre-stage picture while the target stays sharp, and the ControlNet counts for as little
or as much as its strength may be set to.
"""

import json
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from weights.pocket.data import Corpus
from weights.pocket.loop import Options
from weights.pocket.pool import Kitchen, Pool

SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}

# Errors at low noise hardly move the picture, so they count less: min-SNR weighting (arXiv 2303.09556), equation 4.
MIN_SNR_GAMMA = 5.0

NOISE_FLOOR = 0.22
"""What networks of this size miss clean latents by, of their deviation of 1: such changes are left out of results."""


def write_noise_floor(folder: Path) -> None:
    """Say beside a family's networks how exact they are; `pipelines.redraw.above_noise` goes by it."""
    (folder / "denoiser.json").write_text(json.dumps({"noise_floor": NOISE_FLOOR}) + "\n")


def draw_timesteps(sigmas: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """(count,) int64 timesteps: two of three evenly in log sigma between 0.04 and 4, the others anywhere."""
    levels = np.exp(rng.uniform(np.log(0.04), np.log(4.0), count))
    crowded = np.searchsorted(sigmas.numpy(), levels)
    anywhere = rng.integers(len(sigmas), size=count)
    return torch.from_numpy(np.where(rng.random(count) < 0.67, crowded, anywhere))


class DenoiserTrainee(ABC):
    """Networks that predict the noise, on its weighted mean squared error.

    A family names itself, builds its networks, turns captions into tokens, predicts and exports.
    """

    name: str
    learning_rate = 1.2e-3

    def __init__(self, options: Options, *, side_px: int = 128, num_portions: int = 64) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.modules = self.build()
        corpus = Corpus(options.seed + 2, num_drawings=options.num_drawings, photo_share=0.6, plain_share=0.12)
        kitchen = Kitchen(options.models, corpus, self.tokenize, device=options.device, side_px=side_px)
        self.pool = Pool(kitchen, options.seed, num_portions=num_portions)
        scheduler: Any = DDIMScheduler(**SCHEDULE)
        self.scheduler = scheduler
        self.alphas = scheduler.alphas_cumprod.sqrt()
        self.deviations = (1 - scheduler.alphas_cumprod).sqrt()
        self.no_tokens = self.tokenize([""]).to(options.device)

    @abstractmethod
    def build(self) -> nn.ModuleDict:
        """The untrained networks; called once, with torch's generator seeded."""

    @abstractmethod
    def tokenize(self, captions: list[str]) -> Tensor:
        """(len(captions), L) int64."""

    @abstractmethod
    def predict(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, hint: Tensor, strength: Tensor) -> Tensor:
        """The predicted noise (N, C, h, w), float32.

        Args:
            noisy: (N, C, h, w) latents.
            timesteps: (N,) int64.
            tokens: (N, L) int64.
            hint: (N, 3, H, W) uint8.
            strength: (N,) factor on what the ControlNet adds.
        """

    @abstractmethod
    def export(self, modules: nn.ModuleDict, models: Path) -> None:
        """Write the part; see `loop.Trainee`."""

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        """One batch; the target is the noise that leads from the noisy latents to the sharp ones."""
        count, device = self.options.batch, self.options.device
        samples = self.pool.draw(count, rng, step)
        timesteps = draw_timesteps(self.deviations / self.alphas, count, rng)
        alpha = self.alphas[timesteps].view(-1, 1, 1, 1).to(device)
        deviation = self.deviations[timesteps].view(-1, 1, 1, 1).to(device)
        # How much of the pre-stage picture the noisy latents still are: less as the noise that hides it fades.
        remains = torch.from_numpy(rng.random(count) * (rng.random(count) < 0.5)).float().view(-1, 1, 1, 1)
        unresolved = remains.to(device) * (deviation / alpha / 0.3).clamp(max=1)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(samples.target.shape, generator=generator).to(device)
        noisy = alpha * (samples.target + unresolved * (samples.start - samples.target)) + deviation * noise
        wanted = (noisy - alpha * samples.target) / deviation
        strengths = np.exp(rng.uniform(np.log(0.2), np.log(1.3), count)) * (rng.random(count) >= 0.08)
        strength = torch.from_numpy(strengths).to(device)
        without_text = torch.from_numpy(rng.random(count) < 0.1).to(device)
        tokens = torch.where(without_text[:, None], self.no_tokens, samples.tokens)
        predicted = self.predict(noisy, timesteps.to(device), tokens, samples.hint, strength)
        weight = (MIN_SNR_GAMMA * (deviation / alpha) ** 2).clamp(0.05, 1)
        return (weight * F.mse_loss(predicted, wanted, reduction="none")).mean()
