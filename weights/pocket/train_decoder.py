"""Trains the picture codec's decoder on: on what the trained denoiser makes, not on what the encoder does.

Denoised latents lack the finest components, which noise has drowned and which can only be guessed. The decoder of exact
latents makes the pixels of a 4 x 4 block too much alike then, and the edges of the blocks show as a mesh. Here it sees
latents as img2img leaves them, and the result is judged as the service delivers it: less what the round trip does to
the pre-stage picture. The encoder, and so what latents mean, stays as it is.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import (
    ControlNetModel,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from weights.pocket.captions import QUALITY
from weights.pocket.data import Corpus
from weights.pocket.denoising import SCHEDULE
from weights.pocket.loop import Options
from weights.pocket.losses import balance_loss, picture_loss, texture_loss
from weights.pocket.pool import Kitchen
from weights.pocket.text import ALL_FAULTS, OTHER_BLAME, OTHER_PRAISE, token_ids
from weights.pocket.train_vae import build_vae

log = logging.getLogger(__name__)

CROPS = 16
STEPS = 20


class Way(NamedTuple):
    """How a service redraws, near its defaults; noise levels and the ControlNet's strength vary around them."""

    prompt: str
    negative_prompt: str
    guidance_scale: float
    controlnet_scale: float
    soft_control: bool
    scheduler: Callable[..., Any]


WAYS = (
    Way(
        ", ".join(["photograph", *QUALITY]),
        ", ".join(ALL_FAULTS),
        *(7.5, 0.25, False),
        EulerDiscreteScheduler,
    ),
    Way(
        OTHER_PRAISE,
        OTHER_BLAME,
        *(4.0, 0.6, True),
        partial(DPMSolverMultistepScheduler, algorithm_type="sde-dpmsolver++", solver_order=2),
    ),
)
TEXTURE_WEIGHT, BALANCE_WEIGHT = 0.5, 6.0
BLOCK = 4


class Finals:
    """What img2img makes of crops: start and finished latents, pre-stage and sharp pictures, kept for the whole run.

    Args:
        options: Folder of the trained parts, seed, device.
        side_px: Side of a crop.
        num_batches: Of `CROPS` crops each.
    """

    def __init__(self, options: Options, *, side_px: int, num_batches: int) -> None:
        corpus = Corpus(options.seed + 6, num_drawings=options.num_drawings, photo_share=0.7, plain_share=0.05)
        models, device = options.models, options.device
        self.tokenizer = CLIPTokenizer.from_pretrained(models / "sd15" / "tokenizer")
        self.kitchen = Kitchen(
            models, corpus, lambda texts: token_ids(self.tokenizer, texts), device=device, side_px=side_px
        )
        load: Any = UNet2DConditionModel.from_pretrained
        self.unet = load(models / "sd15" / "unet", torch_dtype=torch.float32).to(device)
        load = ControlNetModel.from_pretrained
        self.controlnet = load(models / "controlnet-tile-sd15", torch_dtype=torch.float32).to(device)
        text_encoder: Any = CLIPTextModel.from_pretrained(models / "sd15" / "text_encoder")
        with torch.no_grad():
            self.texts = [
                text_encoder(token_ids(self.tokenizer, [way.negative_prompt, way.prompt])).last_hidden_state.to(device)
                for way in WAYS
            ]
        self.batches = []
        for number in range(num_batches):
            self.batches.append(self.make(number, np.random.default_rng([options.seed, 78, number])))
            if number % 8 == 7:
                log.info("decoder: %d of %d batches redrawn", number + 1, num_batches)

    @torch.no_grad()
    def make(self, number: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """One batch of crops, all redrawn from one noise level with one strength of the ControlNet."""
        way, text = WAYS[number % len(WAYS)], self.texts[number % len(WAYS)]
        pixels, _ = self.kitchen.corpus.batch(rng, CROPS, self.kitchen.side_px)
        sharp = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        before = self.kitchen.prestage(sharp.float() / 255, rng)
        start = self.kitchen.encode(before)
        betas = {name: SCHEDULE[name] for name in ("beta_start", "beta_end", "beta_schedule")}
        scheduler = way.scheduler(use_karras_sigmas=True, **betas)
        scheduler.set_timesteps(STEPS)
        first = round(STEPS * float(rng.uniform(0.4, 0.75)))  # strengths of 0.25 to 0.6 on Karras' curve
        scheduler.set_begin_index(first)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(start.shape, generator=generator).to(start.device)
        timesteps = scheduler.timesteps[first:]
        sample = scheduler.add_noise(start, noise, timesteps[:1])
        told = {"encoder_hidden_states": text.repeat_interleave(CROPS, 0), "return_dict": False}
        controlnet_scale = way.controlnet_scale * float(rng.uniform(0.7, 1.6))
        for timestep in timesteps:
            shown = scheduler.scale_model_input(sample, timestep).repeat(2, 1, 1, 1)
            down, middle = self.controlnet(
                shown,
                timestep,
                controlnet_cond=before.repeat(2, 1, 1, 1),
                conditioning_scale=controlnet_scale,
                guess_mode=way.soft_control,
                **told,
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            negative, positive = self.unet(shown, timestep, **residuals, **told)[0].chunk(2)
            guided = negative + way.guidance_scale * (positive - negative)
            sample = scheduler.step(guided, timestep, sample, generator=generator).prev_sample
        return {"start": start, "final": sample, "before": (before * 255).round().byte(), "sharp": sharp}


class DecoderTrainee:
    """The codec's decoder, on the delivered picture's values, edges and texture."""

    name = "decoder"
    learning_rate = 2e-4

    def __init__(self, options: Options, *, side_px: int = 128, num_batches: int = 32) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.finals = Finals(options, side_px=side_px, num_batches=num_batches)
        vae = build_vae()
        vae.load_state_dict(self.finals.kitchen.vae.state_dict())
        vae.requires_grad_(False)
        for part in (vae.post_quant_conv, vae.decoder):
            part.requires_grad_(True)
        self.modules = nn.ModuleDict({"vae": vae.to(options.device)})

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures (N, 3, H, W), 0..1, of scaled latents."""
        vae: Any = self.modules["vae"]
        with torch.autocast(latents.device.type, torch.bfloat16):
            decoded = vae.decode(latents / vae.config.scaling_factor).sample
        return decoded.float() / 2 + 0.5

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        """One batch: what is delivered at strengths up to 0.5, and the round trip that the encoder was made for."""
        batch = self.finals.batches[int(rng.integers(len(self.finals.batches)))]
        picked = torch.from_numpy(rng.choice(CROPS, self.options.batch, replace=False))
        samples = {name: values[picked].to(self.options.device) for name, values in batch.items()}
        before, sharp = samples["before"].float() / 255, samples["sharp"].float() / 255
        # Changes that do not stand out of the network's noise are made smaller by the service, see `write_noise_floor`.
        kept = torch.from_numpy(rng.uniform(0.3, 1.0, (len(picked), 1, 1, 1))).float().to(self.options.device)
        redrawn = torch.lerp(samples["start"], samples["final"], kept)
        exact = self.finals.kitchen.encode(sharp)
        final, start, round_trip = self.decode(torch.cat([redrawn, samples["start"], exact])).chunk(3)
        delivered = matched(final + before - start, before)
        texture, balance = (measure(delivered, sharp, period=BLOCK) for measure in (texture_loss, balance_loss))
        loss = picture_loss(delivered, sharp) + TEXTURE_WEIGHT * texture + BALANCE_WEIGHT * balance
        return loss + picture_loss(round_trip, sharp)

    def export(self, modules: nn.ModuleDict, models: Path) -> None:
        """Write `vae` again."""
        vae: Any = modules["vae"]
        vae.save_pretrained(models / "vae")


def matched(result: Tensor, reference: Tensor) -> Tensor:
    """The result with the tones of the reference: structures above about four pixels are those of the input."""
    kernel = torch.tensor([1.0, 2.0, 1.0], device=result.device) / 4
    low = reference - result
    for distance in (1, 2):
        for dim in (2, 3):
            taps = kernel.view(1, 1, -1, 1) if dim == 2 else kernel.view(1, 1, 1, -1)
            margin = (0, 0, distance, distance) if dim == 2 else (distance, distance, 0, 0)
            dilation = (distance, 1) if dim == 2 else (1, distance)
            padded = F.pad(low, margin, mode="replicate")
            low = F.conv2d(padded, taps.expand(3, 1, -1, -1).contiguous(), dilation=dilation, groups=3)
    return result + low
