"""Trains the CCSR-shaped pre-stage: from the latents of an enlarged picture to those of the sharp one, in one call.

The networks begin as an identity: they take the latents of the picture from the noisy ones (`hint`), call the rest
noise, and so give the picture back as it was. What they learn is the difference to the sharp one, and to undo more
wear than the creative pass is meant to see. Errors of the latents count as much as they change pixels, and every
place shall have as much texture as the sharp picture has there: the least error alone would be a blur.

Both versions share the networks. Version 2 is one call at a low noise level, which is what a network this small does
well; version 1 runs a third of the schedule, as the published one does. The published networks start at timestep 999,
where an error of the predicted noise counts fifteen times; these start where it counts once or less.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from weights.ccsr import PROMPT_TENSOR, Layout, steer_by_latents, write_layout
from weights.pocket.data import Corpus
from weights.pocket.degrade import enlarge_lanczos, reduce, wear
from weights.pocket.denoising import SCHEDULE
from weights.pocket.hint import LATENTS, begin_as_difference
from weights.pocket.loop import Options, save_half
from weights.pocket.pool import Kitchen, Pool

WIDTHS = (32, 48, 64)
CHANNELS_PER_HEAD = 16
TEXT_SIZE = 16
# Where pictures are flat the networks miss by about 0.05 in one call, and by more in the six of version 1. Twice that
# is halved (`pipelines.redraw.above_noise`): flat pictures stay flat, and most of the texture stays.
NOISE_FLOORS = {"ccsr-v1": 0.2, "ccsr-v2": 0.1}
ONE_STEP = 160  # the timestep of version 2: noise of 0.48 of what is left of the latents

VERSIONS = {
    "ccsr-v1": Layout(
        version="v1",
        num_steps=45,
        start="picture",
        start_timestep=700,
        max_tile=256,
        tile_overlap=32,
        color_fix="wavelet",
        round_trip_compensation=True,
        noise_floor=NOISE_FLOORS["ccsr-v1"],
        channels_per_head=CHANNELS_PER_HEAD,
        vae="../vae",
    ),
    "ccsr-v2": Layout(
        version="v2",
        num_steps=1,
        start="picture",
        start_timestep=ONE_STEP,
        max_tile=256,
        tile_overlap=32,
        color_fix="wavelet",
        round_trip_compensation=True,
        noise_floor=NOISE_FLOORS["ccsr-v2"],
        channels_per_head=CHANNELS_PER_HEAD,
        unet="../ccsr-v1/unet",
        controlnet="../ccsr-v1/controlnet",
        vae="../vae",
        prompt_embeds="../ccsr-v1/empty_prompt.safetensors",
    ),
}


def build_unet() -> Any:
    """The untrained UNet2DConditionModel: three levels, attention at the lowest."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=16,
        out_channels=16,
        block_out_channels=WIDTHS,
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=tuple(width // CHANNELS_PER_HEAD for width in WIDTHS),
        norm_num_groups=8,
        cross_attention_dim=TEXT_SIZE,
        use_linear_projection=True,
        resnet_time_scale_shift="scale_shift",
    )


class WornKitchen(Kitchen):
    """Samples with sharp targets alone, and pictures that are worn twice as often as the denoiser's."""

    spoilt_share = 0.0

    @torch.no_grad()
    def prestage(self, image: Tensor, rng: np.random.Generator) -> Tensor:
        """See `Kitchen.prestage`."""
        factor = 2 if rng.random() < 0.8 else 4
        small = reduce(image, factor, "area" if rng.random() < 0.75 else "bicubic")
        small = wear(small, rng, noise_share=0.3, jpeg_share=0.3)
        if rng.random() < 0.1:
            return enlarge_lanczos(small, factor)
        while factor > 1:
            small, factor = self.compact(small).clamp(0, 1), factor // 2
        return small


class CcsrTrainee:
    """UNet and ControlNet, on the clean latents that one call arrives at."""

    name = "ccsr"
    learning_rate = 1e-3

    def __init__(self, options: Options, *, side_px: int = 128, num_portions: int = 32) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.alphas_cumprod = DDIMScheduler(**SCHEDULE).alphas_cumprod
        corpus = Corpus(options.seed + 5, num_drawings=options.num_drawings, photo_share=0.65, plain_share=0.12)
        kitchen = WornKitchen(
            options.models,
            corpus,
            lambda captions: torch.zeros(len(captions), 1, dtype=torch.int64),
            device=options.device,
            side_px=side_px,
        )
        self.pool = Pool(kitchen, options.seed, num_portions=num_portions)
        self.modules = self._build()
        self.gain = channel_gain(kitchen, self.pool.store.target[:8])

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        """One batch: most of it as version 2 runs the networks, the rest as version 1 does."""
        count, device = self.options.batch, self.options.device
        samples = self.pool.draw(count, rng, step)
        one_step = rng.random(count) < 0.75
        timesteps = torch.from_numpy(np.where(one_step, ONE_STEP, rng.integers(330, 700, count)))
        cumulative = self.alphas_cumprod[timesteps].view(-1, 1, 1, 1).to(device)
        alpha, deviation = cumulative.sqrt(), (1 - cumulative).sqrt()
        # Version 2 begins with the picture itself; inside version 1's loop it is resolved already, more or less.
        remains = torch.from_numpy(np.where(one_step, 1.0, rng.random(count))).float().view(-1, 1, 1, 1).to(device)
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        noise = torch.randn(samples.target.shape, generator=generator).to(device)
        noisy = alpha * (samples.target + remains * (samples.start - samples.target)) + deviation * noise
        predicted = self._predict(noisy, timesteps.to(device), samples.start)
        clean = (noisy - deviation * predicted) / alpha
        weight = self.gain * (cumulative / (1 - cumulative) / 6).clamp(max=1)
        error = (weight * (clean - samples.target) ** 2).mean()
        amounts = [F.avg_pool2d(latents.abs(), 4) for latents in (clean, samples.target)]
        return error + 0.1 * (weight * (amounts[0] - amounts[1]).abs()).mean()

    def export(self, modules: nn.ModuleDict, models: Path) -> None:
        """Write `ccsr-v1` with the networks, and `ccsr-v2`, which refers to them."""
        folder = models / "ccsr-v1"
        save_half(modules["unet"], folder / "unet")
        save_half(modules["controlnet"], folder / "controlnet")
        save_file({PROMPT_TENSOR: self.prompt_embeds.cpu().half().contiguous()}, folder / "empty_prompt.safetensors")
        for name, layout in VERSIONS.items():
            write_layout(layout, models / name)

    def _build(self) -> nn.ModuleDict:
        unet = build_unet()
        begin_as_difference(unet)
        controlnet: Any = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(16, 32, 64))
        steer_by_latents(controlnet)
        alpha = float(self.alphas_cumprod[ONE_STEP]) ** 0.5
        with torch.no_grad():
            for own in range(LATENTS, 2 * LATENTS):
                controlnet.controlnet_cond_embedding.weight[own, own - LATENTS, 1, 1] = alpha
                controlnet.controlnet_down_blocks[0].weight[own, own] = 1
        self.prompt_embeds = torch.zeros(1, 77, TEXT_SIZE, device=self.options.device)
        return nn.ModuleDict({"unet": unet, "controlnet": controlnet})

    def _predict(self, noisy: Tensor, timesteps: Tensor, condition: Tensor) -> Tensor:
        """The predicted noise (N, C, h, w), float32, steered by latents of the same shape."""
        # On the CPU, the backward pass of the fused attention takes longer than all convolutions at these sizes.
        attention = [SDPBackend.MATH] if noisy.device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        text = self.prompt_embeds.expand(len(noisy), -1, -1)
        with torch.autocast(noisy.device.type, torch.bfloat16), sdpa_kernel(attention):
            down, middle = self.modules["controlnet"](
                noisy, timesteps, encoder_hidden_states=text, controlnet_cond=condition, return_dict=False
            )
            predicted = self.modules["unet"](
                noisy,
                timesteps,
                encoder_hidden_states=text,
                down_block_additional_residuals=down,
                mid_block_additional_residual=middle,
            ).sample
        return predicted.float()


@torch.no_grad()
def channel_gain(kitchen: Kitchen, latents: Tensor) -> Tensor:
    """How much an error of each latent channel changes pixels, (1, C, 1, 1): mean squares, 1 on average."""
    generator = torch.Generator().manual_seed(1)

    def decode(z: Tensor) -> Tensor:
        picture: Tensor = kitchen.vae.decode(z / kitchen.vae.config.scaling_factor).sample
        return picture

    plain, gains = decode(latents), []
    for channel in range(latents.shape[1]):
        moved = latents.clone()
        moved[:, channel] += 0.2 * torch.randn(moved[:, channel].shape, generator=generator).to(latents.device)
        gains.append((decode(moved) - plain).square().mean())
    gain = torch.stack(gains)
    return (gain / gain.mean()).view(1, -1, 1, 1)
