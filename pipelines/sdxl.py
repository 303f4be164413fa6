"""Stable Diffusion XL with a tile ControlNet, behind the `Denoiser` interface.

Paper: SDXL (arXiv 2307.01952). Two text encoders see the prompt: the states before their last layers are laid side by
side, and the second one's pooled vector enters every block of the networks, together with six numbers, the
micro-conditioning of section 2.2: the size of the picture a crop was taken from, where its top left corner was, and
its own size. A tile is such a crop of the picture that is being made, so that is what the model is told.

The published VAE overflows float16; it has to run in bfloat16 or float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from pipelines.prompts import encode_prompts_side_by_side
from pipelines.tiling import Tile
from pipelines.unet import Conditioning, ControlledUNet


@dataclass(frozen=True, kw_only=True)
class XLConditioning(Conditioning):
    """What the model knows of one picture.

    Attributes:
        pooled_prompt_embeds: (1 or 2, P), in the order of `prompt_embeds`.
        picture_size: (height, width) of the whole picture in px.
    """

    pooled_prompt_embeds: Tensor
    picture_size: tuple[int, int]


class StableDiffusionXL(ControlledUNet[XLConditioning]):
    """Both text encoders, UNet and tile ControlNet of the Stable Diffusion XL family."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel,
        text_encoders: tuple[CLIPTextModel, CLIPTextModelWithProjection],
        tokenizers: tuple[CLIPTokenizer, CLIPTokenizer],
        scheduler_config: dict[str, Any],
    ) -> None:
        super().__init__(unet, controlnet, scheduler_config)
        self.text_encoders = text_encoders[0].eval(), text_encoders[1].eval()
        self.tokenizers = tokenizers

    @classmethod
    def load(
        cls, folder: Path, controlnet_folder: Path, *, device: torch.device, dtype: torch.dtype
    ) -> StableDiffusionXL:
        """Load from a folder in diffusers' layout and the ControlNet's own folder; nothing is downloaded."""
        options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True}
        text_options: dict[str, Any] = {"dtype": dtype, "local_files_only": True}
        return cls(
            UNet2DConditionModel.from_pretrained(folder / "unet", **options).to(device),
            ControlNetModel.from_pretrained(controlnet_folder, **options).to(device),
            (
                CLIPTextModel.from_pretrained(folder / "text_encoder", **text_options).to(device),
                CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", **text_options).to(device),
            ),
            (
                CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
                CLIPTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True),
            ),
            DDIMScheduler.load_config(folder / "scheduler", local_files_only=True),
        )

    def encode(
        self,
        prompt: str,
        negative_prompt: str,
        *,
        guidance_scale: float,
        hint: Tensor,
        controlnet_conditioning_scale: float,
        embeddings: Sequence[Mapping[str, Tensor]] = (),
        soft_control: bool = False,
    ) -> XLConditioning:
        """Encode texts and hint once for the whole picture.

        An empty text becomes zeros, as it was in training.

        Args:
            prompt: In A1111 syntax, any length.
            negative_prompt: Likewise; unused when `guidance_scale` is 1 or less.
            guidance_scale: Classifier-free guidance.
            hint: (1, 3, H, W), 0..1: the picture the result shall follow, of the size of the result.
            controlnet_conditioning_scale: 0 skips the ControlNet.
            embeddings: Textual inversions, name to vectors, one mapping for each of the two text encoders.
            soft_control: See `Conditioning`.
        """
        texts = [negative_prompt, prompt] if guidance_scale > 1 else [prompt]
        prompt_embeds, pooled = encode_prompts_side_by_side(
            texts, tokenizers=self.tokenizers, text_encoders=self.text_encoders, embeddings=embeddings
        )
        for row, text in enumerate(texts):
            if not text.strip():
                prompt_embeds[row], pooled[row] = 0, 0
        return XLConditioning(
            prompt_embeds=prompt_embeds,
            pooled_prompt_embeds=pooled,
            guidance_scale=guidance_scale,
            hint=self.embed_hint(hint) if controlnet_conditioning_scale > 0 else None,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            soft_control=soft_control,
            picture_size=(hint.shape[-2], hint.shape[-1]),
        )

    def _added_conditions(self, places: Sequence[Tile], conditioning: XLConditioning) -> dict[str, Tensor]:
        pooled, factor = conditioning.pooled_prompt_embeds, self.scale_factor
        rows = [
            (*conditioning.picture_size, factor * top, factor * left, factor * (bottom - top), factor * (right - left))
            for top, left, bottom, right in places
        ]
        # In 32 bits whatever the networks compute in: 16 bits do not hold every number of pixels.
        time_ids = torch.tensor(rows, dtype=torch.float32, device=pooled.device)
        return {
            "text_embeds": pooled.repeat_interleave(len(places), dim=0),
            "time_ids": time_ids.repeat(pooled.shape[0], 1),
        }
