"""FLUX.1 and models of its shape with an upscaler ControlNet, behind the `Denoiser` interface; flow matching.

Papers: rectified flow (arXiv 2209.03003), its shifted schedule and the transformer (arXiv 2403.03206), rotary position
embedding (arXiv 2104.09864). The networks are diffusers' own classes. Noisy latents are `(1 - sigma) * z0 + sigma *
noise`; the transformer predicts the velocity `noise - z0`, seen on tokens of 2 x 2 latent positions.

What every tile of a request shares is encoded once: texts, and the latents that the ControlNet is given. Tiles are told
positions counted from their own corner: rotary attention sees distances only, and distances from the text that are
larger than in training help nobody. The grid of tokens moves from step to step (`token_offsets`); it would print
through as a mesh of two latents, 16 px with the published weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from pipelines.tiling import Tile, gather
from weights.flux_tokens import TOKEN_LATENTS, pack, position_ids, unpack

MAX_SHIFT = 1.15
"""The shift of the largest pictures that FLUX.1 was trained on, 1024 x 1024 px."""


class FlowSampler:
    """Euler's method along the flow; see `samplers.Sampler`. The timestep is the noise level.

    Args:
        sigmas: (n + 1,) strictly decreasing noise levels, at most 1, 0 at the end.
    """

    def __init__(self, sigmas: Sequence[float]) -> None:
        self._sigmas = tuple(sigmas)

    @property
    def num_steps(self) -> int:
        """See `Sampler`."""
        return len(self._sigmas) - 1

    def start(self, latents: Tensor, noise: Tensor) -> Tensor:
        """See `Sampler`."""
        return (1 - self._sigmas[0]) * latents + self._sigmas[0] * noise

    def model_input(self, step: int, sample: Tensor) -> tuple[Tensor, float]:
        """See `Sampler`."""
        return sample, self._sigmas[step]

    def advance(self, step: int, prediction: Tensor, sample: Tensor) -> Tensor:
        """See `Sampler`."""
        return sample + (self._sigmas[step + 1] - self._sigmas[step]) * prediction

    def estimate(self, step: int, prediction: Tensor, sample: Tensor) -> Tensor:
        """See `Sampler`."""
        return sample - self._sigmas[step] * prediction


def shift_for(num_tokens: int, config: Mapping[str, Any]) -> float:
    """The shift mu of the schedule for a tile, at most that of the largest training picture.

    It follows the tile, never the whole picture: for a picture of 4096 px it would be 11.6, and the weakest creativity
    would start from pure noise.

    Args:
        num_tokens: Of one tile, text apart.
        config: Of the model's `FlowMatchEulerDiscreteScheduler`; without dynamic shifting its fixed shift counts.
    """
    if not config.get("use_dynamic_shifting", False):
        return math.log(config.get("shift", 1.0))
    least, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    low, high = config.get("base_shift", 0.5), config.get("max_shift", MAX_SHIFT)
    return min(low + (num_tokens - least) * (high - low) / (most - least), high)


def flow_sigmas(strength: float, num_steps: int, shift: float) -> list[float]:
    """Noise levels of an img2img run that starts at the share `strength` of the schedule: `num_steps` + 1, the last 0.

    Args:
        strength: 0..1; 0 makes no step at all.
        num_steps: All of them are made, whatever the strength.
        shift: mu of the time shift `e^mu / (e^mu + 1 / t - 1)` (arXiv 2403.03206, equation 23).
    """
    if strength == 0:
        return []
    times = [strength * (1 - step / num_steps) for step in range(num_steps)]
    factor = math.exp(shift)
    return [*(factor * time / (factor * time + (1 - time)) for time in times), 0.0]


def token_offsets(num_steps: int, seed: int) -> list[tuple[int, int]]:
    """By how many latents, 0 or 1 down and to the right, the grid of tokens is moved at each step.

    All four positions occur once in any four steps, in an order that the seed decides.
    """
    order = [(0, 0), (1, 1), (0, 1), (1, 0)]
    random.Random(seed).shuffle(order)
    return [order[step % 4] for step in range(num_steps)]


@dataclass(frozen=True, kw_only=True)
class Text:
    """One encoded text: (1, tokens, D) for attention, and (1, P) for the modulation of every block."""

    prompt_embeds: Tensor
    pooled_prompt_embeds: Tensor


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the model knows of one picture.

    Attributes:
        texts: One for the whole picture, or one for each of `regions`.
        regions: Boxes of the latent that have a text of their own; empty where one text serves all.
        negative: What true guidance leads away from; `None` runs the texts alone.
        guidance_scale: Weight of text against negative text, or, for models distilled with guidance, an input.
        control: (1, C, H, W) latents of the picture that the result shall follow; `None` for no ControlNet.
        controlnet_conditioning_scale: Factor on what the ControlNet adds.
        control_until: The ControlNet rests below this noise level.
        offsets: Position of the grid of tokens (latents down, right) by noise level; (0, 0) for levels not named.
    """

    texts: tuple[Text, ...]
    regions: tuple[Tile, ...] = ()
    negative: Text | None = None
    guidance_scale: float = 1.0
    control: Tensor | None = None
    controlnet_conditioning_scale: float = 1.0
    control_until: float = 0.0
    offsets: Mapping[float, tuple[int, int]] = field(default_factory=dict)

    def texts_for(self, places: Sequence[Tile]) -> Text:
        """The texts of tiles at `places` as a batch: those of the regions whose middles are nearest."""
        if not self.regions:
            return repeated(self.texts[0], len(places))
        chosen = [self.texts[_nearest(place, self.regions)] for place in places]
        return Text(
            prompt_embeds=torch.cat([text.prompt_embeds for text in chosen]),
            pooled_prompt_embeds=torch.cat([text.pooled_prompt_embeds for text in chosen]),
        )


class Flux:
    """Text encoders, transformer and upscaler ControlNet of the FLUX.1 family.

    Args:
        transformer: On its device.
        controlnet: Likewise.
        text_encoder: CLIP, for its pooled vector.
        text_encoder_2: T5, whose every token is attended to, padding included.
        tokenizer: CLIP's.
        tokenizer_2: T5's.
        scheduler_config: Of a `FlowMatchEulerDiscreteScheduler`.
        max_text_tokens: Tokens that T5 encodes; each tile pays for them.
    """

    size_multiple = TOKEN_LATENTS

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        controlnet: FluxControlNetModel,
        text_encoder: CLIPTextModel,
        text_encoder_2: T5EncoderModel,
        tokenizer: CLIPTokenizer,
        tokenizer_2: T5Tokenizer,
        scheduler_config: dict[str, Any],
        *,
        max_text_tokens: int,
    ) -> None:
        self.transformer, self.controlnet = transformer.eval(), controlnet.eval()
        self.text_encoder, self.text_encoder_2 = text_encoder.eval(), text_encoder_2.eval()
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
        self.scheduler_config = scheduler_config
        self.max_text_tokens = max_text_tokens

    @classmethod
    def load(
        cls, folder: Path, controlnet_folder: Path, *, device: torch.device, dtype: torch.dtype, max_text_tokens: int
    ) -> Flux:
        """Load from a folder in diffusers' layout and the ControlNet's own folder; nothing is downloaded."""
        options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True}
        text_options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
        return cls(
            FluxTransformer2DModel.from_pretrained(folder / "transformer", **options).to(device),
            FluxControlNetModel.from_pretrained(controlnet_folder, **options).to(device),
            CLIPTextModel.from_pretrained(folder / "text_encoder", **text_options).to(device),
            T5EncoderModel.from_pretrained(folder / "text_encoder_2", **text_options).to(device),
            CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
            T5Tokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True),
            FlowMatchEulerDiscreteScheduler.load_config(folder / "scheduler", local_files_only=True),
            max_text_tokens=max_text_tokens,
        )

    @property
    def embeds_guidance(self) -> bool:
        """Whether guidance is an input of the network, which was distilled with it, instead of a second pass."""
        return bool(self.transformer.config.guidance_embeds)

    @property
    def takes_negative(self) -> bool:
        """Whether guidance is a second pass with another text."""
        return not self.embeds_guidance

    def shift(self, num_tokens: int) -> float:
        """The shift mu of the schedule for a tile of so many tokens."""
        return shift_for(num_tokens, self.scheduler_config)

    def enter(self, latents: Tensor) -> Tensor:
        """What is denoised and tiled: the latents themselves."""
        return latents

    def leave(self, field: Tensor) -> Tensor:
        """The inverse of `enter`."""
        return field

    def encode(self, text: str) -> Text:
        """Encode one text; what exceeds the encoders' lengths is left out."""
        device = self.transformer.device
        short = self.tokenizer(
            text, padding="max_length", max_length=self.tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        long = self.tokenizer_2(
            text, padding="max_length", max_length=self.max_text_tokens, truncation=True, return_tensors="pt"
        )
        pooled = self.text_encoder(short.input_ids.to(device)).pooler_output
        embeds = self.text_encoder_2(long.input_ids.to(device))[0]
        return Text(
            prompt_embeds=embeds.to(self.transformer.dtype), pooled_prompt_embeds=pooled.to(self.transformer.dtype)
        )

    def predict(self, tiles: Tensor, places: Sequence[Tile], timestep: float, conditioning: Conditioning) -> Tensor:
        """See `Denoiser.predict`: the velocity; tiles and guidance halves run as one batch."""
        offset = conditioning.offsets.get(timestep, (0, 0))
        shown = moved(tiles, offset)
        height, width = shown.shape[-2:]
        sample = pack(shown).to(self.transformer.device, self.transformer.dtype)
        control = None
        if conditioning.control is not None and timestep >= conditioning.control_until:
            control = pack(moved(gather(conditioning.control, places), offset)).to(sample)
        text = conditioning.texts_for(places)
        guided = conditioning.negative is not None and not self.embeds_guidance
        if conditioning.negative is not None and guided:
            text = joined(repeated(conditioning.negative, len(places)), text)
            sample = sample.repeat(2, 1, 1)
            control = None if control is None else control.repeat(2, 1, 1)
        tokens = self._velocity(sample, control, text, timestep, position_ids(height, width).to(sample), conditioning)
        velocity = stayed(unpack(tokens.to(tiles.device, torch.float32), height, width), offset)
        if not guided:
            return velocity
        negative, positive = velocity.chunk(2)
        return negative + conditioning.guidance_scale * (positive - negative)

    def _velocity(
        self, sample: Tensor, control: Tensor | None, text: Text, sigma: float, ids: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """One call of the networks on packed tokens (N, tokens, 4 C)."""
        count = sample.shape[0]
        shared: dict[str, Any] = {
            "encoder_hidden_states": text.prompt_embeds,
            "pooled_projections": text.pooled_prompt_embeds,
            "timestep": sample.new_full((count,), sigma),
            "img_ids": ids,
            "txt_ids": ids.new_zeros(text.prompt_embeds.shape[1], 3),
            "return_dict": False,
        }
        guidance = sample.new_full((count,), conditioning.guidance_scale, dtype=torch.float32)
        residuals: dict[str, Any] = {}
        if control is not None:
            blocks, single_blocks = self.controlnet(
                sample,
                controlnet_cond=control,
                conditioning_scale=conditioning.controlnet_conditioning_scale,
                guidance=guidance if self.controlnet.config.guidance_embeds else None,
                **shared,
            )
            residuals = {"controlnet_block_samples": blocks, "controlnet_single_block_samples": single_blocks}
        velocity: Tensor = self.transformer(
            sample, guidance=guidance if self.embeds_guidance else None, **residuals, **shared
        )[0]
        return velocity


def moved(tiles: Tensor, offset: tuple[int, int]) -> Tensor:
    """Tiles (N, C, h, w) for a grid of tokens that is moved by (down, right) latents.

    They are continued by as much, mirrored, on all sides, which stay even: every latent remains inside a token.
    """
    down, right = offset
    return F.pad(tiles, (right, right, down, down), mode="reflect")


def stayed(tiles: Tensor, offset: tuple[int, int]) -> Tensor:
    """The inverse of `moved`: what was added is cut off."""
    down, right = offset
    return tiles[..., down : tiles.shape[-2] - down, right : tiles.shape[-1] - right]


def repeated(text: Text, count: int) -> Text:
    """One text as a batch of `count`."""
    return Text(
        prompt_embeds=text.prompt_embeds.expand(count, -1, -1),
        pooled_prompt_embeds=text.pooled_prompt_embeds.expand(count, -1),
    )


def joined(first: Text, second: Text) -> Text:
    """Two batches of texts as one."""
    return Text(
        prompt_embeds=torch.cat([first.prompt_embeds, second.prompt_embeds]),
        pooled_prompt_embeds=torch.cat([first.pooled_prompt_embeds, second.pooled_prompt_embeds]),
    )


def _nearest(place: Tile, regions: Sequence[Tile]) -> int:
    """Index of the region whose middle is nearest to that of `place`; the first of equals."""

    def distance(region: Tile) -> int:
        vertical = region.top + region.bottom - place.top - place.bottom
        horizontal = region.left + region.right - place.left - place.right
        return vertical**2 + horizontal**2

    return min(range(len(regions)), key=lambda index: distance(regions[index]))
