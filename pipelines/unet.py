"""A UNet with a tile ControlNet, behind the `Denoiser` interface: what Stable Diffusion 1.5 and XL have in common.

Papers: latent diffusion (arXiv 2112.10752), ControlNet (arXiv 2302.05543), classifier-free guidance (arXiv
2207.12598). The networks are diffusers' own classes; the ControlNet's hint embedding is taken out of the ControlNet
once, at load time, so that it runs once per picture and not at each of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

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
        soft_control: Weigh the residuals from 0.1 at the finest level to 1 in the middle, so that the prompt decides
            the detail and the hint the layout; A1111 calls it "My prompt is more important".
    """

    prompt_embeds: Tensor
    guidance_scale: float
    hint: Tensor | None
    controlnet_conditioning_scale: float
    soft_control: bool = False


ConditioningT = TypeVar("ConditioningT", bound=Conditioning)


class ControlledUNet(Generic[ConditioningT]):
    """UNet and tile ControlNet of one family; a family adds its text encoders and what else it conditions on."""

    def __init__(
        self, unet: UNet2DConditionModel, controlnet: ControlNetModel, scheduler_config: dict[str, Any]
    ) -> None:
        self.unet = unet.eval().to(memory_format=torch.channels_last)
        self.hint_embedding = controlnet.controlnet_cond_embedding
        controlnet.controlnet_cond_embedding = nn.Identity()
        self.controlnet = controlnet.eval().to(memory_format=torch.channels_last)
        self.scheduler_config = scheduler_config

    @property
    def size_multiple(self) -> int:
        """Latent sides must be multiples of this: the UNet halves them once per level."""
        return 2 ** (len(self.unet.config.block_out_channels) - 1)

    @property
    def scale_factor(self) -> int:
        """Pixels of the hint per latent position, on each side."""
        return 2 ** (len(self.hint_embedding.blocks) // 2)

    def predict(self, tiles: Tensor, places: Sequence[Tile], timestep: float, conditioning: ConditioningT) -> Tensor:
        """See `Denoiser.predict`; tiles and guidance halves run as one batch."""
        halves, num_tiles = conditioning.prompt_embeds.shape[0], tiles.shape[0]
        sample = tiles.to(self.unet.device, self.unet.dtype, memory_format=torch.channels_last).repeat(halves, 1, 1, 1)
        steps = torch.full((), timestep, device=self.unet.device)
        told: dict[str, Any] = {
            "encoder_hidden_states": conditioning.prompt_embeds.repeat_interleave(num_tiles, dim=0),
            "added_cond_kwargs": self._added_conditions(places, conditioning),
            "return_dict": False,
        }
        residuals: dict[str, Any] = {}
        if conditioning.hint is not None:
            down, middle = self.controlnet(
                sample,
                steps,
                controlnet_cond=gather(conditioning.hint, places).repeat(halves, 1, 1, 1),
                conditioning_scale=conditioning.controlnet_conditioning_scale,
                guess_mode=conditioning.soft_control,
                **told,
            )
            residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        noise = self.unet(sample, steps, **residuals, **told)[0].to(tiles.device, torch.float32)
        if halves == 1:
            return noise
        negative, positive = noise.chunk(2)
        return negative + conditioning.guidance_scale * (positive - negative)

    def embed_hint(self, hint: Tensor) -> Tensor:
        """Embed a hint strip by strip; equal to embedding it whole.

        Args:
            hint: (1, 3, H, W), 0..1, any device; sides are multiples of `scale_factor`.

        Returns:
            (1, C, H / f, W / f) in the networks' type on their device.
        """
        factor = self.scale_factor
        # Two 3x3 convolutions per level widen the receptive field by at most 4 px of the coarsest grid.
        halo = 4 * factor
        strips = []
        for top in range(0, hint.shape[-2], HINT_STRIP_PX):
            above, bottom = max(0, top - halo), min(hint.shape[-2], top + HINT_STRIP_PX)
            strip = hint[..., above : min(hint.shape[-2], bottom + halo), :].to(self.unet.device, self.unet.dtype)
            embedded = self.hint_embedding(strip)
            strips.append(embedded[..., (top - above) // factor : (bottom - above) // factor, :])
        return torch.cat(strips, dim=-2).contiguous(memory_format=torch.channels_last)

    def _added_conditions(self, places: Sequence[Tile], conditioning: ConditioningT) -> dict[str, Tensor]:
        """What the networks are told besides the text, for the batch of guidance halves x tiles."""
        return {}
