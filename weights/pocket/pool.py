"""Training samples of the denoiser: pictures already degraded, enlarged and encoded, kept for many steps.

Encoding costs as much as a training step, and one picture serves many of them with other noise, other noise levels
and another ControlNet strength. A part of the pool is replaced every so often.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from weights.compact import Compact, load_compact
from weights.pocket.captions import FAULTS
from weights.pocket.data import Corpus
from weights.pocket.degrade import enlarge_lanczos, reduce, spoil, to_tensor, wear
from weights.pocket.text import blame, praise


@dataclass(frozen=True, kw_only=True)
class Samples:
    """A batch of N samples; latents are scaled to a deviation of about 1.

    target: (N, C, h, w) latents that the denoiser should arrive at.
    start: (N, C, h, w) latents of the pre-stage picture, where the service starts.
    hint: (N, 3, H, W) uint8, the pre-stage picture for the ControlNet.
    tokens: (N, L) int64, the caption in the tokens of the family's text encoders, one after the other.
    """

    target: Tensor
    start: Tensor
    hint: Tensor
    tokens: Tensor

    def pick(self, indices: Tensor) -> "Samples":
        """The samples at `indices`, copied."""
        return Samples(
            target=self.target[indices],
            start=self.start[indices],
            hint=self.hint[indices],
            tokens=self.tokens[indices],
        )

    def put(self, where: int, other: "Samples") -> None:
        """Overwrite the samples from `where` on with all of `other`."""
        end = where + len(other.target)
        self.target[where:end] = other.target
        self.start[where:end] = other.start
        self.hint[where:end] = other.hint
        self.tokens[where:end] = other.tokens

    @staticmethod
    def joined(parts: "list[Samples]") -> "Samples":
        """All samples of `parts` as one batch."""
        return Samples(
            target=torch.cat([part.target for part in parts]),
            start=torch.cat([part.start for part in parts]),
            hint=torch.cat([part.hint for part in parts]),
            tokens=torch.cat([part.tokens for part in parts]),
        )


class Kitchen:
    """Makes samples from the corpus with the trained codec and pre-upscaler.

    Args:
        models: Folder of the trained parts.
        corpus: Where the crops come from.
        tokenize: Turns N captions into (N, L) int64 tokens.
        device: Where the samples are made and stay.
        side_px: Side of a sample's picture.
    """

    # A spoilt target goes at most this share of the way to the spoilt picture: at the service's default, guidance
    # multiplies the difference between good and bad by 6.5, and fully spoilt targets would make it overshoot.
    max_spoilt_share = 0.4
    spoilt_share = 0.33
    # Mostly blur: block edges, artefacts and noise have more edges than the sharp picture, and guidance away from them
    # alone would smooth.
    fault_shares = (0.6, 0.12, 0.14, 0.14)

    def __init__(
        self,
        models: Path,
        corpus: Corpus,
        tokenize: Callable[[list[str]], Tensor],
        *,
        device: str,
        side_px: int = 128,
    ) -> None:
        self.vae: Any = AutoencoderKL.from_pretrained(models / "vae").to(device).eval().requires_grad_(False)
        self.compact: Compact = load_compact(models / "upscaler-compact-x2", device=device)
        self.corpus = corpus
        self.tokenize = tokenize
        self.device = device
        self.side_px = side_px

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Latents (N, C, h, w), scaled, of pictures (N, 3, H, W) in 0..1."""
        return self.vae.encode(image.contiguous() * 2 - 1).latent_dist.mean * self.vae.config.scaling_factor

    @torch.no_grad()
    def prestage(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """Reduce by 2, or by 4 every fourth time, wear a little, and enlarge as the service would; 0..1."""
        factor = 2 if rng.random() < 0.75 else 4
        small = reduce(image, factor, "area" if rng.random() < 0.75 else "bicubic")
        small = wear(small, rng, noise_share=0.15, jpeg_share=0.12)
        if rng.random() < 0.35:
            return enlarge_lanczos(small, factor)
        while factor > 1:
            small, factor = self.compact(small).clamp(0, 1), factor // 2
        return small

    def cook(self, count: int, rng: np.random.Generator) -> Samples:
        """`count` samples with one kind of reduction; some have a spoilt target, and a caption that says so."""
        pixels, words = self.corpus.batch(rng, count, self.side_px)
        sharp = to_tensor(pixels, self.device)
        target, source = sharp.clone(), sharp.clone()
        captions = []
        for index in range(count):
            if rng.random() >= self.spoilt_share:
                captions.append(praise(words[index], rng))
                continue
            fault = int(rng.choice(len(FAULTS), p=self.fault_shares))
            share = float(rng.uniform(0, self.max_spoilt_share))
            target[index] += share * (spoil(sharp[index], fault, rng) - sharp[index])
            # Mostly the hint is that of the sharp picture: then only the caption tells what to arrive at.
            if rng.random() < 0.25:
                source[index] = target[index]
            captions.append(blame(words[index], fault, rng))
        hint = self.prestage(source, rng)
        return Samples(
            target=self.encode(target),
            start=self.encode(hint),
            hint=(hint * 255).round().byte(),
            tokens=self.tokenize(captions).to(self.device),
        )


class Pool:
    """A store of samples, of which one portion is made anew every `steps_per_portion` steps."""

    def __init__(self, kitchen: Kitchen, seed: int, *, num_portions: int = 64, portion: int = 32) -> None:
        self.kitchen = kitchen
        self.seed = seed
        self.num_portions = num_portions
        self.portion = portion
        self.steps_per_portion = 40
        self.store = Samples.joined([self.make(number) for number in range(num_portions)])

    def make(self, number: int) -> Samples:
        """The portion with that number, always the same."""
        return self.kitchen.cook(self.portion, np.random.default_rng([self.seed, 77, number]))

    def draw(self, count: int, rng: np.random.Generator, step: int) -> Samples:
        """`count` samples at random; replaces the oldest portion first when its time has come."""
        if step % self.steps_per_portion == self.steps_per_portion - 1:
            number = self.num_portions + step // self.steps_per_portion
            self.store.put(number % self.num_portions * self.portion, self.make(number))
        return self.store.pick(torch.from_numpy(rng.integers(len(self.store.tokens), size=count)))
