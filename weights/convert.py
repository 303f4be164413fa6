"""Turns published files into parts of a set: `python -m weights.convert ccsr-v1 FILE FOLDER`.

CCSR version 1 was published as one checkpoint in the layout of the original latent diffusion code:

| prefix in the file        | content                                       | becomes                            |
|---------------------------|-----------------------------------------------|------------------------------------|
| `model.diffusion_model.`  | UNet of Stable Diffusion 2.1                  | `unet/`                            |
| `control_model.`          | ControlNet on noisy and given latents, 8 in   | `controlnet/`, its first conv split |
| `first_stage_model.`      | VAE with the decoder trained for CCSR         | `vae/`                             |
| `cond_stage_model.model.` | OpenCLIP, only ever asked about an empty text | `empty_prompt.safetensors`         |
| others                    | copies, losses and schedules                  | nothing                            |

`Kijai/ccsr-safetensors` holds it as safetensors (Apache-2.0 by its tag). The authors' own `.ckpt` is a pickle, which
can run code when it is read, and is refused.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from weights.ccsr import CHANNELS_PER_HEAD, PROMPT_TENSOR, Layout, steer_by_latents, write_layout
from weights.header import UnsuitableFile, read_header
from weights.ldm import (
    Source,
    load_part,
    missing,
    open_clip_source,
    unet_name,
    unet_prefixes,
    unet_sources,
    vae_sources,
)

CONTROL = "control_model."
OPEN_CLIP = "cond_stage_model.model."
START_TOKEN, END_TOKEN = 49406, 49407


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Configs of the networks in a CCSR checkpoint; the defaults are the published ones."""

    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    channels_per_head: int = CHANNELS_PER_HEAD


STABLE_DIFFUSION_21 = Architecture(
    unet={
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "attention_head_dim": (5, 10, 20, 20),
        "cross_attention_dim": 1024,
        "use_linear_projection": True,
    },
    vae={
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
        "latent_channels": 4,
        "sample_size": 512,
    },
    # OpenCLIP has 24 layers; Stable Diffusion 2 takes what the one before the last makes.
    text_encoder={
        "vocab_size": 49408,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "max_position_embeddings": 77,
        "projection_dim": 512,
        "bos_token_id": START_TOKEN,
        "eos_token_id": END_TOKEN,
        "pad_token_id": 0,
    },
)


class Part(NamedTuple):
    """A network to fill, and where each of its tensors lies in the file."""

    network: Any
    sources: dict[str, Source]


def ccsr_parts(architecture: Architecture) -> dict[str, Part]:
    """The networks of a CCSR checkpoint, on the meta device: `unet`, `controlnet` (8 in), `vae`, `text_encoder`."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(**architecture.unet)
        controlnet = ControlNetModel.from_unet(unet, load_weights_from_unet=False)
        first = controlnet.conv_in
        controlnet.conv_in = nn.Conv2d(2 * first.in_channels, first.out_channels, 3, padding=1)
        controlnet.controlnet_cond_embedding = nn.Identity()
        vae = AutoencoderKL(**architecture.vae)
        text_encoder = CLIPTextModel(CLIPTextConfig(**architecture.text_encoder))
    return {
        "unet": Part(unet, unet_sources(unet.state_dict(), unet.config)),
        "controlnet": Part(controlnet, controlnet_sources(controlnet)),
        "vae": Part(vae, vae_sources(vae.state_dict(), vae.config)),
        "text_encoder": Part(text_encoder, text_sources(text_encoder)),
    }


def controlnet_sources(controlnet: Any) -> dict[str, Source]:
    """Where each tensor of a ControlNet lies; its encoder is named as that of a UNet."""
    prefixes = unet_prefixes(dict(controlnet.config) | {"up_block_types": ()})
    sources = {}
    for name in controlnet.state_dict():
        if name.startswith("controlnet_down_blocks."):
            _, number, kind = name.split(".")
            original: str | None = f"zero_convs.{number}.0.{kind}"
        elif name.startswith("controlnet_mid_block."):
            original = name.replace("controlnet_mid_block", "middle_block_out.0")
        else:
            original = unet_name(name, prefixes)
        sources[name] = Source(CONTROL + (original or name))
    return sources


def text_sources(text_encoder: Any) -> dict[str, Source]:
    """Where each tensor of the text encoder lies."""
    found = {name: open_clip_source(name.removeprefix("text_model.")) for name in text_encoder.state_dict()}
    return {name: Source(OPEN_CLIP + at.name, at.third, at.transposed) for name, at in found.items()}


def convert_ccsr_v1(
    file: Path, folder: Path, *, dtype: torch.dtype = torch.float16, architecture: Architecture = STABLE_DIFFUSION_21
) -> None:
    """Write a CCSR checkpoint as a part of a set that `pipelines.ccsr` loads.

    Takes the memory of its largest network in `dtype`, and that of the text encoder in 32 bits.

    Args:
        file: A safetensors file with the original names.
        folder: Where `unet`, `controlnet`, `vae`, `empty_prompt.safetensors` and `ccsr.json` are written.
        dtype: What they are stored in.
        architecture: The networks in the file.

    Raises:
        UnsuitableFile: The file is a pickle, is damaged, or is no CCSR checkpoint.
    """
    header = read_header(file)
    parts = ccsr_parts(architecture)
    for name, part in parts.items():
        if lacking := missing(part.sources, header):
            raise UnsuitableFile(
                f"is no complete CCSR checkpoint: for the {name} it lacks {len(lacking)} tensors, "
                f"the first being {lacking[0]!r}"
            )
    for name in ("unet", "vae"):
        network, sources = parts.pop(name)
        load_part(network, file, sources, dtype=dtype)
        network.save_pretrained(folder / name)
        del network
    network, sources = parts.pop("controlnet")
    load_part(network, file, sources, dtype=dtype)
    split_first_convolution(network).save_pretrained(folder / "controlnet")
    del network
    # Built again with real memory: it has tables that no file holds.
    text_encoder = CLIPTextModel(CLIPTextConfig(**architecture.text_encoder))
    load_part(text_encoder, file, parts["text_encoder"].sources, dtype=torch.float32)
    save_file({PROMPT_TENSOR: encode_nothing(text_encoder).to(dtype)}, folder / "empty_prompt.safetensors")
    write_layout(Layout(version="v1", num_steps=45, channels_per_head=architecture.channels_per_head), folder)


@torch.no_grad()
def split_first_convolution(controlnet: Any) -> Any:
    """Split, in place, the convolution of noisy and given latents into one of each; their results are added."""
    together: nn.Conv2d = controlnet.conv_in
    channels = together.in_channels // 2
    controlnet.conv_in = nn.Conv2d(channels, together.out_channels, 3, padding=1, dtype=together.weight.dtype)
    controlnet.conv_in.weight.copy_(together.weight[:, :channels])
    controlnet.conv_in.bias.copy_(together.bias)
    steer_by_latents(controlnet)
    controlnet.controlnet_cond_embedding.to(together.weight.dtype).weight.copy_(together.weight[:, channels:])
    return controlnet


@torch.inference_mode()
def encode_nothing(text_encoder: Any) -> Tensor:
    """The embedding of the empty text, (1, 77, D): OpenCLIP ends it at once and pads with zeros."""
    config = text_encoder.config
    tokens = torch.zeros(1, config.max_position_embeddings, dtype=torch.int64)
    tokens[0, :2] = torch.tensor([config.bos_token_id, config.eos_token_id])
    states: Tensor = text_encoder(tokens).last_hidden_state
    return states.clone()


def main(arguments: list[str] | None = None) -> None:
    """Convert the file named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m weights.convert", description="Turn a published file into a part.")
    parser.add_argument("kind", choices=["ccsr-v1"], help="what the file is")
    parser.add_argument("file", type=Path, help="the safetensors file")
    parser.add_argument("folder", type=Path, help="folder of the new part, for example weights/full/ccsr-v1")
    chosen = parser.parse_args(arguments)
    try:
        convert_ccsr_v1(chosen.file, chosen.folder)
    except UnsuitableFile as error:
        parser.exit(1, f"{chosen.file} {error}.\n")


if __name__ == "__main__":
    main()
