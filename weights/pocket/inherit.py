"""Networks that begin as the trained SD 1.5-shaped ones: most of what they have to know is the same.

SD 1.5's pooled text enters every block through the time embedding. For one text that is one constant, so it can be
added to a bias: a network without that input then behaves as if it were given that text.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from weights.pocket.text import token_ids


@dataclass(frozen=True, kw_only=True)
class Ancestors:
    """The trained networks' tensors by name, with one text built in, and that text's embedding (1, 77, D)."""

    unet: dict[str, Tensor]
    controlnet: dict[str, Tensor]
    text_encoder: dict[str, Tensor]
    prompt_embeds: Tensor


@torch.no_grad()
def ancestors(models: Path, text: str) -> Ancestors | None:
    """The part `sd15` of the set in `models`, with `text` built in; None if it is not there."""
    if not (models / "sd15" / "unet").is_dir() or not (models / "controlnet-tile-sd15").is_dir():
        return None
    options: dict[str, Any] = {"torch_dtype": torch.float32, "local_files_only": True}
    unet = UNet2DConditionModel.from_pretrained(models / "sd15" / "unet", **options)
    controlnet = ControlNetModel.from_pretrained(models / "controlnet-tile-sd15", **options)
    text_encoder = CLIPTextModel.from_pretrained(
        models / "sd15" / "text_encoder", dtype=torch.float32, local_files_only=True
    )
    tokenizer = CLIPTokenizer.from_pretrained(models / "sd15" / "tokenizer", local_files_only=True)
    prompt_embeds = text_encoder(token_ids(tokenizer, [text])).last_hidden_state
    return Ancestors(
        unet=_with_text(unet, prompt_embeds),
        controlnet=_with_text(controlnet, prompt_embeds),
        text_encoder=text_encoder.state_dict(),
        prompt_embeds=prompt_embeds,
    )


@torch.no_grad()
def inherit(heir: nn.Module, tensors: dict[str, Tensor]) -> list[str]:
    """Copy, in place, every tensor that has the same name and the same sides but those of length one.

    Returns:
        The names of the heir's tensors that had no such counterpart, and stay as they are.
    """
    missing = []
    for name, tensor in heir.state_dict().items():
        found = tensors.get(name)
        if found is not None and [n for n in found.shape if n != 1] == [n for n in tensor.shape if n != 1]:
            tensor.copy_(found.reshape(tensor.shape))
        else:
            missing.append(name)
    return missing


def _with_text(network: Any, prompt_embeds: Tensor) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = network.state_dict()
    if network.config.addition_embed_type == "text":
        tensors["time_embedding.linear_2.bias"] += network.add_embedding(prompt_embeds)[0]
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("add_embedding.")}
