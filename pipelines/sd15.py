"""Stable Diffusion 1.5 with the tile ControlNet, behind the `Denoiser` interface; `unet` has what SDXL shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from pipelines.prompts import encode_prompts
from pipelines.unet import Conditioning, ControlledUNet


class StableDiffusion15(ControlledUNet[Conditioning]):
    """Text encoder, UNet and tile ControlNet of the Stable Diffusion 1.5 family."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler_config: dict[str, Any],
    ) -> None:
        super().__init__(unet, controlnet, scheduler_config)
        self.text_encoders = (text_encoder.eval(),)
        self.tokenizers = (tokenizer,)

    @classmethod
    def load(
        cls, folder: Path, controlnet_folder: Path, *, device: torch.device, dtype: torch.dtype
    ) -> StableDiffusion15:
        """Load from a folder in diffusers' layout and the ControlNet's own folder; nothing is downloaded."""
        options: dict[str, Any] = {"torch_dtype": dtype, "local_files_only": True}
        return cls(
            UNet2DConditionModel.from_pretrained(folder / "unet", **options).to(device),
            ControlNetModel.from_pretrained(controlnet_folder, **options).to(device),
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype, local_files_only=True).to(device),
            CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
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
    ) -> Conditioning:
        """Encode texts and hint once for the whole picture.

        Args:
            prompt: In A1111 syntax, any length.
            negative_prompt: Likewise; unused when `guidance_scale` is 1 or less.
            guidance_scale: Classifier-free guidance.
            hint: (1, 3, H, W), 0..1: the picture the result shall follow, of the size of the result.
            controlnet_conditioning_scale: 0 skips the ControlNet.
            embeddings: Textual inversions, name to vectors: one mapping, for the one text encoder.
            soft_control: See `Conditioning`.
        """
        texts = [negative_prompt, prompt] if guidance_scale > 1 else [prompt]
        (tokenizer,), (text_encoder,) = self.tokenizers, self.text_encoders
        vectors = embeddings[0] if embeddings else {}
        return Conditioning(
            prompt_embeds=encode_prompts(texts, tokenizer=tokenizer, text_encoder=text_encoder, embeddings=vectors),
            guidance_scale=guidance_scale,
            hint=self.embed_hint(hint) if controlnet_conditioning_scale > 0 else None,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
            soft_control=soft_control,
        )
