"""CCSR's networks on disk: a UNet of the shape of Stable Diffusion 2.1, and a ControlNet that is steered by latents.

The ControlNet has no hint of pixels: where diffusers' class embeds one, a single convolution takes the latents of the
picture to restore (`controlnet_cond_embedding`). Version 1 of CCSR feeds noisy and given latents side by side into
one convolution; split in two it is exactly this. Version 2 published the second half as `condition_conv_in`.

A folder holds `ccsr.json` (`Layout`), `unet/`, `controlnet/`, the constant embedding of the empty prompt and perhaps
its own `vae/`. Paths in `ccsr.json` may lead to other parts of the set, so that two versions can share networks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

LAYOUT_FILE = "ccsr.json"
PROMPT_TENSOR = "prompt_embeds"
CHANNELS_PER_HEAD = 64
"""Of Stable Diffusion 2.1: 5, 10, 20 and 20 heads."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What `ccsr.json` says: how the networks were meant to be run, and where they lie."""

    version: Literal["v1", "v2"]
    num_steps: int  # of the whole schedule, of which t_max..t_min is run; 1: a single call
    t_max: float = 0.6667
    t_min: float = 0.3333
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    start: Literal["noise", "picture"] = "noise"  # what the first call is shown: noise, or the noised picture
    start_timestep: int = 999  # of the first call
    max_tile: int = 64  # latents
    tile_overlap: int = 32  # latents
    color_fix: Literal["none", "adain", "wavelet"] = "adain"
    round_trip_compensation: bool = False
    noise_floor: float = 0.0  # how far the networks miss clean latents by themselves; such changes are left out
    channels_per_head: int = CHANNELS_PER_HEAD
    unet: str = "unet"
    controlnet: str = "controlnet"
    vae: str = "vae"
    prompt_embeds: str = "empty_prompt.safetensors"


@dataclass(frozen=True)
class Networks:
    """UNet, ControlNet and the embedding of the empty prompt, (1, tokens, D)."""

    unet: UNet2DConditionModel
    controlnet: ControlNetModel
    prompt_embeds: Tensor


class WrongHeads(ValueError):
    """A config divides attention into another number of heads than the weights were trained with.

    No tensor has another shape for it, so nothing but this check would notice.
    """

    def __init__(self, where: str, found: Any, expected: Sequence[int]) -> None:
        super().__init__(
            f"{where}: attention_head_dim is {found}, expected {list(expected)} (attention heads per level)"
        )
        self.found, self.expected = found, tuple(expected)


def check_heads(config: Any, *, channels_per_head: int, where: str) -> None:
    """Refuse a config with another number of attention heads than the family has.

    Raises:
        WrongHeads: See there.
    """
    expected = [channels // channels_per_head for channels in config["block_out_channels"]]
    found = config["attention_head_dim"]
    if (list(found) if isinstance(found, list | tuple) else found) != expected:
        raise WrongHeads(where, found, expected)


def steer_by_latents(controlnet: ControlNetModel) -> ControlNetModel:
    """Replace, in place, the embedding of pixels by a convolution of latents, which starts at zero."""
    first = controlnet.conv_in
    embedding = nn.Conv2d(first.in_channels, first.out_channels, 3, padding=1, device=first.weight.device)
    for parameter in embedding.parameters():
        if not parameter.is_meta:
            nn.init.zeros_(parameter)
    controlnet.controlnet_cond_embedding = embedding
    return controlnet


def load_controlnet(folder: Path, *, dtype: torch.dtype) -> ControlNetModel:
    """Load a ControlNet that is steered by latents, in the layout of either version; strictly, on the CPU.

    Raises:
        RuntimeError: Tensors are missing or left over.
    """
    config = ControlNetModel.load_config(folder, local_files_only=True)
    known = {name: value for name, value in config.items() if name != "use_vae_encode_condition"}
    with torch.device("meta"):
        controlnet = steer_by_latents(ControlNetModel.from_config(known))
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    renamed = {
        name.replace("condition_conv_in.", "controlnet_cond_embedding."): tensor for name, tensor in tensors.items()
    }
    controlnet.load_state_dict({name: tensor.to(dtype) for name, tensor in renamed.items()}, strict=True, assign=True)
    return controlnet


def read_layout(folder: Path) -> Layout:
    """Read `ccsr.json`.

    Raises:
        FileNotFoundError: There is none.
        TypeError: It has keys that are not known.
    """
    return Layout(**json.loads((folder / LAYOUT_FILE).read_text(encoding="utf-8")))


def write_layout(layout: Layout, folder: Path) -> None:
    """Write `ccsr.json`, replacing what was there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LAYOUT_FILE).write_text(json.dumps(asdict(layout), indent=2) + "\n", encoding="utf-8")


def load_networks(folder: Path, layout: Layout, *, dtype: torch.dtype) -> Networks:
    """Load UNet, ControlNet and prompt embedding; nothing is downloaded.

    Raises:
        WrongHeads: A config does not fit the weights.
    """
    unet = UNet2DConditionModel.from_pretrained(folder / layout.unet, torch_dtype=dtype, local_files_only=True)
    controlnet = load_controlnet(folder / layout.controlnet, dtype=dtype)
    for network, where in ((unet, layout.unet), (controlnet, layout.controlnet)):
        check_heads(network.config, channels_per_head=layout.channels_per_head, where=str(folder / where))
    prompt_embeds = load_file(folder / layout.prompt_embeds)[PROMPT_TENSOR]
    return Networks(unet.eval(), controlnet.eval(), prompt_embeds.to(dtype))
