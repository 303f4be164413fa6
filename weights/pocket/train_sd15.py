"""Trains the SD 1.5-shaped denoiser: UNet, tile ControlNet and text encoder together, on latents of the pocket codec.

The network predicts the noise (epsilon) on the schedule of SD 1.5; `denoising` has the recipe.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from weights.pocket.data import Corpus
from weights.pocket.degrade import to_tensor
from weights.pocket.denoising import DenoiserTrainee, write_noise_floor
from weights.pocket.hint import HINT_CHANNELS, begin_as_codec, begin_as_difference
from weights.pocket.loop import save_half
from weights.pocket.text import build_text_encoder, build_tokenizer, token_ids


def build_unet(text_size: int) -> Any:
    """The untrained UNet2DConditionModel: three levels, text at the lowest.

    A pooled copy of the text scales and shifts every residual block: cross-attention at the lowest level alone has no
    way to say how sharp the finest one should be, and at the finest it would cost more than all convolutions.
    """
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=16,
        out_channels=16,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=8,
        cross_attention_dim=text_size,
        addition_embed_type="text",
        resnet_time_scale_shift="scale_shift",
    )


class Sd15Trainee(DenoiserTrainee):
    """UNet, ControlNet and text encoder."""

    name = "sd15"
    learning_rate = 7e-4

    def build(self) -> nn.ModuleDict:
        """See `DenoiserTrainee.build`."""
        self.tokenizer = build_tokenizer()
        text_encoder = build_text_encoder(self.tokenizer)
        unet = build_unet(text_encoder.config.hidden_size)
        begin_as_difference(unet)
        controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_CHANNELS)
        corpus = Corpus(self.options.seed + 4, num_drawings=min(60, self.options.num_drawings), photo_share=0.6)
        pixels, _ = corpus.batch(np.random.default_rng(self.options.seed), 96, 64)
        vae = AutoencoderKL.from_pretrained(self.options.models / "vae")
        begin_as_codec(controlnet, vae, to_tensor(pixels))
        return nn.ModuleDict({"unet": unet, "controlnet": controlnet, "text_encoder": text_encoder})

    def tokenize(self, captions: list[str]) -> Tensor:
        """See `DenoiserTrainee.tokenize`."""
        return token_ids(self.tokenizer, captions)

    def predict(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, hint: Tensor, strength: Tensor) -> Tensor:
        """See `DenoiserTrainee.predict`."""
        factor = strength.float().view(-1, 1, 1, 1)
        # On the CPU, the backward pass of the fused attention takes longer than all convolutions at these sizes.
        attention = [SDPBackend.MATH] if noisy.device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with torch.autocast(noisy.device.type, torch.bfloat16), sdpa_kernel(attention):
            text = self.modules["text_encoder"](tokens).last_hidden_state
            down, middle = self.modules["controlnet"](
                noisy, timesteps, encoder_hidden_states=text, controlnet_cond=hint.float() / 255, return_dict=False
            )
            predicted = self.modules["unet"](
                noisy,
                timesteps,
                encoder_hidden_states=text,
                down_block_additional_residuals=[residual * factor for residual in down],
                mid_block_additional_residual=middle * factor,
            ).sample
        return predicted.float()

    def export(self, modules: nn.ModuleDict, models: Path) -> None:
        """Write `sd15` (UNet, text encoder, tokenizer, schedule) and `controlnet-tile-sd15`."""
        save_half(modules["unet"], models / "sd15" / "unet")
        save_half(modules["controlnet"], models / "controlnet-tile-sd15")
        # In 32 bits: transformers would load it as it is stored, diffusers loads the others in 32 bits.
        text_encoder: Any = modules["text_encoder"]
        text_encoder.save_pretrained(models / "sd15" / "text_encoder")
        self.tokenizer.save_pretrained(models / "sd15" / "tokenizer")
        self.scheduler.save_pretrained(models / "sd15" / "scheduler")
        write_noise_floor(models / "sd15")
