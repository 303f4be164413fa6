"""Stable Diffusion 1.5 with the tile ControlNet, behind the `Denoiser` interface.

Papers: latent diffusion (arXiv 2112.10752), ControlNet (arXiv 2302.05543), classifier-free guidance (arXiv
2207.12598). The networks are diffusers' own classes; the ControlNet's hint embedding is taken out of the ControlNet
once, at load time, so that it runs once per picture and not at each of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from pipelines.prompts import encode_prompts
from pipelines.tiling import Tile, gather

HINT_STRIP_PX = 1024
"""Rows of the hint that are embedded at once: its 16-channel activations would need 64 MB per megapixel."""


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the model knows of one picture.

    Attributes:
        prompt_embeds: (1 or 2, tokens, D): the negative prompt first where there is guidance, then the prompt.
        guidance_scale: Weight of prompt against negative prompt; 1 or less runs the prompt alone.
        hint: (1, C, H, W) on the latent grid: the embedded tile hint; `None` skips the ControlNet.
        controlnet_conditioning_scale: Factor on the ControlNet's residuals.
    """

    prompt_embeds: Tensor
    guidance_scale: float
    hint: Tensor | None
    controlnet_conditioning_scale: float


class StableDiffusion15:
    """Text encoder, UNet and tile ControlNet of the Stable Diffusion 1.5 family."""

    def __init__(
        self,
        unet: UNet2DConditionModel,
        controlnet: ControlNetModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler_config: dict[str, Any],
    ) -> None:
        self.unet = unet.eval().to(memory_format=torch.channels_last)
        self.hint_embedding = controlnet.controlnet_cond_embedding
        controlnet.controlnet_cond_embedding = nn.Identity()
        self.controlnet = controlnet.eval().to(memory_format=torch.channels_last)
        self.text_encoder = text_encoder.eval()
        self.tokenizer = tokenizer
        self.scheduler_config = scheduler_config

    @classmethod
    def load(
        cls, folder: Path, controlnet_folder: Path, *, device: torch.device, dtype: torch.dtype
    ) -> StableDiffusion15:
        """Load from a folder in diffusers' layout and the ControlNet's own folder; nothing is downloaded."""
        options = {"torch_dtype": dtype, "local_files_only": True}
        return cls(
            UNet2DConditionModel.from_pretrained(folder / "unet", **options).to(device),
            ControlNetModel.from_pretrained(controlnet_folder, **options).to(device),
            CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=dtype, local_files_only=True).to(device),
            CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
            DDIMScheduler.load_config(folder / "scheduler", local_files_only=True),
        )

    @property
    def size_multiple(self) -> int:
        """Latent sides must be multiples of this: the UNet halves them once per level."""
        return 2 ** (len(self.unet.config.block_out_channels) - 1)

    def encode(
        self,
        prompt: str,
        negative_prompt: str,
        *,
        guidance_scale: float,
        hint: Tensor | None,
        controlnet_conditioning_scale: float,
    ) -> Conditioning:
        """Encode texts and hint once for the whole picture.

        Args:
            prompt: In A1111 syntax, any length.
            negative_prompt: Likewise; unused when `guidance_scale` is 1 or less.
            guidance_scale: Classifier-free guidance.
            hint: (1, 3, H, W), 0..1: the picture the result shall follow; `None` for no ControlNet.
            controlnet_conditioning_scale: 0 also means no ControlNet.
        """
        texts = [negative_prompt, prompt] if guidance_scale > 1 else [prompt]
        use_controlnet = hint is not None and controlnet_conditioning_scale > 0
        return Conditioning(
            prompt_embeds=encode_prompts(texts, tokenizer=self.tokenizer, text_encoder=self.text_encoder),
            guidance_scale=guidance_scale,
            hint=self._embed_hint(hint) if use_controlnet and hint is not None else None,
            controlnet_conditioning_scale=controlnet_conditioning_scale,
        )

    def predict(self, tiles: Tensor, places: Sequence[Tile], timestep: float, conditioning: Conditioning) -> Tensor:
        """See `Denoiser.predict`; tiles and guidance halves run as one batch."""
        halves, num_tiles = conditioning.prompt_embeds.shape[0], tiles.shape[0]
        sample = tiles.to(self.unet.device, self.unet.dtype, memory_format=torch.channels_last).repeat(halves, 1, 1, 1)
        embeds = conditioning.prompt_embeds.repeat_interleave(num_tiles, dim=0)
        steps = torch.full((), timestep, device=self.unet.device)
        residuals: dict[str, Any] = {}
        if conditioning.hint is not None:
            down, middle = self.controlnet(
                sample,
                steps,
                encoder_hidden_states=embeds,
                controlnet_cond=gather(conditioning.hint, places).repeat(halves, 1, 1, 1),
                conditioning_scale=conditioning.controlnet_conditioning_scale,
                return_dict=False,
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        noise = self.unet(sample, steps, encoder_hidden_states=embeds, return_dict=False, **residuals)[0]
        noise = noise.to(tiles.device, torch.float32)
        if halves == 1:
            return noise
        negative, positive = noise.chunk(2)
        return negative + conditioning.guidance_scale * (positive - negative)

    def _embed_hint(self, hint: Tensor) -> Tensor:
        """Embed a hint (1, 3, H, W) strip by strip into (1, C, H / f, W / f); equal to embedding it whole."""
        embedding = self.hint_embedding
        factor = 2 ** ((len(embedding.blocks)) // 2)
        # Two 3x3 convolutions per level widen the receptive field by at most 4 px of the coarsest grid.
        halo = 4 * factor
        strips = []
        for top in range(0, hint.shape[-2], HINT_STRIP_PX):
            above, bottom = max(0, top - halo), min(hint.shape[-2], top + HINT_STRIP_PX)
            strip = hint[..., above : min(hint.shape[-2], bottom + halo), :].to(self.unet.device, self.unet.dtype)
            strips.append(embedding(strip)[..., (top - above) // factor : (bottom - above) // factor, :])
        return torch.cat(strips, dim=-2).contiguous(memory_format=torch.channels_last)
