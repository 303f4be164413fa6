"""Trains the SDXL-shaped denoiser: UNet, tile ControlNet and two text encoders; `denoising` has the recipe.

Everything that SD 1.5's networks have in common with it is taken from the trained part `sd15`, so that part comes
first. New are the second transformer block of the lowest level, cross-attention to both encoders' states, and what
the pooled text and the six size numbers add to the time embedding; these begin without effect. The size numbers are
drawn at random, independent of the picture: the network learns that they change nothing it can see.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModelWithProjection

from weights.pocket.denoising import DenoiserTrainee, write_noise_floor
from weights.pocket.hint import HINT_CHANNELS
from weights.pocket.inherit import ancestors, inherit
from weights.pocket.loop import Options, save_half
from weights.pocket.text import build_text_encoder, build_tokenizer, token_ids

TIME_DIM = 8


def build_unet(text_size: int, pooled_size: int) -> Any:
    """The untrained UNet2DConditionModel: three levels of SD 1.5's pocket widths, text at the lowest."""
    return UNet2DConditionModel(
        sample_size=64,
        in_channels=16,
        out_channels=16,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=8,
        norm_num_groups=8,
        cross_attention_dim=text_size,
        use_linear_projection=True,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_DIM,
        projection_class_embeddings_input_dim=pooled_size + 6 * TIME_DIM,
    )


def draw_time_ids(rng: np.random.Generator, count: int) -> Tensor:
    """(count, 6) float32: height and width of a picture, a tile's top and left in it, the tile's height and width."""
    pictures = np.exp(rng.uniform(np.log(64), np.log(4096), (count, 2)))
    tiles = np.minimum(pictures, np.exp(rng.uniform(np.log(64), np.log(1024), (count, 2))))
    corners = rng.random((count, 2)) * (pictures - tiles) * (rng.random((count, 1)) < 0.7)
    return torch.from_numpy(np.concatenate([pictures, corners, tiles], axis=1)).float().round()


@torch.no_grad()
def silence(networks: Any, names: list[str]) -> None:
    """Set the last layers of what is new to zero: added to the rest, it changes nothing yet."""
    last = (".attn1.to_out.0.", ".attn2.to_out.0.", ".ff.net.2.", "add_embedding.linear_2.")
    for name, parameter in networks.named_parameters():
        block, _, _ = name.partition(".attn2.")
        is_new = name in names or f"{block}.attn2.to_k.weight" in names
        if is_new and any(part in name for part in last):
            parameter.zero_()


class SdxlTrainee(DenoiserTrainee):
    """UNet, ControlNet and both text encoders."""

    name = "sdxl"
    learning_rate = 8e-4

    def __init__(self, options: Options, *, side_px: int = 128, num_portions: int = 32) -> None:
        super().__init__(options, side_px=side_px, num_portions=num_portions)

    def build(self) -> nn.ModuleDict:
        """See `DenoiserTrainee.build`."""
        self.tokenizers = build_tokenizer(), build_tokenizer()
        self.tokenizers[1].pad_token = "!"
        first = build_text_encoder(self.tokenizers[0])
        second = CLIPTextModelWithProjection(build_text_encoder(self.tokenizers[1]).config)
        unet = build_unet(2 * first.config.hidden_size, second.config.projection_dim)
        trained = ancestors(self.options.models, "")
        controlnet: Any
        if trained is None:
            controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_CHANNELS)
        else:
            silence(unet, inherit(unet, trained.unet))
            controlnet = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=HINT_CHANNELS)
            silence(controlnet, inherit(controlnet, trained.controlnet))
            inherit(first, trained.text_encoder)
            inherit(second.text_model, trained.text_encoder)
        return nn.ModuleDict({"unet": unet, "controlnet": controlnet, "text_encoder": first, "text_encoder_2": second})

    def tokenize(self, captions: list[str]) -> Tensor:
        """(len(captions), 2 · 77) int64: the tokens for the first encoder, then those for the second."""
        return torch.cat([token_ids(tokenizer, captions) for tokenizer in self.tokenizers], dim=1)

    def loss(self, rng: np.random.Generator, step: int) -> Tensor:
        """See `DenoiserTrainee.loss`."""
        self.time_ids = draw_time_ids(rng, self.options.batch).to(self.options.device)
        return super().loss(rng, step)

    def predict(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, hint: Tensor, strength: Tensor) -> Tensor:
        """See `DenoiserTrainee.predict`."""
        factor = strength.float().view(-1, 1, 1, 1)
        # On the CPU, the backward pass of the fused attention takes longer than all convolutions at these sizes.
        attention = [SDPBackend.MATH] if noisy.device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
        with torch.autocast(noisy.device.type, torch.bfloat16), sdpa_kernel(attention):
            text, pooled = self._encode(tokens)
            told: dict[str, Any] = {
                "encoder_hidden_states": text,
                "added_cond_kwargs": {"text_embeds": pooled, "time_ids": self.time_ids},
            }
            down, middle = self.modules["controlnet"](
                noisy, timesteps, controlnet_cond=hint.float() / 255, return_dict=False, **told
            )
            predicted = self.modules["unet"](
                noisy,
                timesteps,
                down_block_additional_residuals=[residual * factor for residual in down],
                mid_block_additional_residual=middle * factor,
                **told,
            ).sample
        return predicted.float()

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Both encoders' states before their last layers, and the pooled text; zeros for no caption."""
        first, second = tokens.chunk(2, dim=1)
        output = self.modules["text_encoder"](first, output_hidden_states=True)
        output_2 = self.modules["text_encoder_2"](second, output_hidden_states=True)
        has_caption = (tokens != self.no_tokens).any(dim=1, keepdim=True)
        text = torch.cat([output.hidden_states[-2], output_2.hidden_states[-2]], dim=-1)
        return text * has_caption[..., None], output_2.text_embeds * has_caption

    def export(self, modules: nn.ModuleDict, models: Path) -> None:
        """Write `sdxl` (UNet, text encoders, tokenizers, schedule) and `controlnet-tile-sdxl`."""
        save_half(modules["unet"], models / "sdxl" / "unet")
        save_half(modules["controlnet"], models / "controlnet-tile-sdxl")
        for name in ("text_encoder", "text_encoder_2"):
            encoder: Any = modules[name]
            encoder.save_pretrained(models / "sdxl" / name)
        for tokenizer, name in zip(self.tokenizers, ("tokenizer", "tokenizer_2"), strict=True):
            tokenizer.save_pretrained(models / "sdxl" / name)
        self.scheduler.save_pretrained(models / "sdxl" / "scheduler")
        write_noise_floor(models / "sdxl")
