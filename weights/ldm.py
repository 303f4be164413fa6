"""Single-file checkpoints: where each tensor of diffusers' and transformers' classes lies in the original layout.

The original code (latent diffusion, later generative-models) numbers the blocks of its networks in one row; diffusers
arranges them by level. The rules below follow from a network's config alone, so they hold for every size of it.

| part              | prefix in the file                                                |
|-------------------|-------------------------------------------------------------------|
| UNet              | `model.diffusion_model.`                                          |
| VAE               | `first_stage_model.`                                              |
| CLIP, SD 1.5      | `cond_stage_model.transformer.[text_model.]`                      |
| CLIP, SDXL        | `conditioner.embedders.0.transformer.[text_model.]`               |
| OpenCLIP, SDXL    | `conditioner.embedders.1.model.`                                  |
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from weights.header import Header, UnsuitableFile

UNET = "model.diffusion_model."
VAE = "first_stage_model."
CLIP = ("cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")
OPEN_CLIP = "conditioner.embedders.1.model."

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


@dataclass(frozen=True)
class Source:
    """Where a tensor comes from: a name in the file, which third of it (rows), and whether it is turned."""

    name: str
    third: int | None = None
    transposed: bool = False


def unet_prefixes(config: Mapping[str, Any]) -> dict[str, str]:
    """Prefixes of a `UNet2DConditionModel`'s names and their counterparts, without the file's own prefix."""
    prefixes = dict(_UNET_ENDS)
    layers, last = config["layers_per_block"], len(config["block_out_channels"]) - 1
    place = 1
    for block, kind in enumerate(config["down_block_types"]):
        for layer in range(layers):
            prefixes[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{place}.0"
            if "Attn" in kind:
                prefixes[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{place}.1"
            place += 1
        if block < last:
            prefixes[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{place}.0.op"
            place += 1
    prefixes |= {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    place = 0
    for block, kind in enumerate(config["up_block_types"]):
        has_attention = "Attn" in kind
        for layer in range(layers + 1):
            prefixes[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{place}.0"
            if has_attention:
                prefixes[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{place}.1"
            if layer == layers and block < last:
                row = f"output_blocks.{place}.{2 if has_attention else 1}.conv"
                prefixes[f"up_blocks.{block}.upsamplers.0.conv"] = row
            place += 1
    return prefixes


def unet_name(name: str, prefixes: Mapping[str, str]) -> str | None:
    """The original name of a module or tensor of a UNet; None if it has none."""
    for cut in (match.start() for match in re.finditer(r"\.|$", name)):
        prefix, rest = name[:cut], name[cut:]
        if prefix in prefixes:
            if ".resnets." in prefix:
                inner, _, tail = rest[1:].partition(".")
                rest = "." + _RESNET.get(inner, inner) + (f".{tail}" if tail else "") if inner else ""
            return prefixes[prefix] + rest
    return None


def vae_name(name: str, config: Mapping[str, Any]) -> str:
    """The original name of a tensor of an `AutoencoderKL`."""
    last = len(config["block_out_channels"]) - 1
    name = name.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if ".mid_block.attentions.0." in name:
        head, tail = name.split(".mid_block.attentions.0.")
        inner, _, kind = tail.rpartition(".")
        return f"{head}.mid.attn_1.{_VAE_ATTENTION[inner]}.{kind}"
    name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up.{last - int(found[1])}", name)
    name = name.replace("down_blocks.", "down.").replace(".resnets.", ".block.")
    return name.replace(".downsamplers.0.", ".downsample.").replace(".upsamplers.0.", ".upsample.")


def open_clip_source(name: str) -> Source:
    """Where a tensor of `CLIPTextModelWithProjection` (without `text_model.`) lies in OpenCLIP's layout."""
    if name == "text_projection.weight":
        return Source("text_projection", transposed=True)
    if name == "embeddings.position_embedding.weight":
        return Source("positional_embedding")
    if name == "embeddings.token_embedding.weight":
        return Source("token_embedding.weight")
    if (layer := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)) is None:
        return Source(name.replace("final_layer_norm", "ln_final"))
    row = f"transformer.resblocks.{layer[1]}"
    if (part := re.fullmatch(r"self_attn\.([qkv])_proj", layer[2])) is not None:
        return Source(f"{row}.attn.in_proj_{layer[3]}", third="qkv".index(part[1]))
    return Source(f"{row}.{_OPEN_CLIP_LAYER[layer[2]]}.{layer[3]}")


def unet_sources(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Source]:
    """Where each tensor of a UNet lies."""
    prefixes = unet_prefixes(config)
    return {name: Source(UNET + (unet_name(name, prefixes) or name)) for name in names}


def vae_sources(names: Iterable[str], config: Mapping[str, Any]) -> dict[str, Source]:
    """Where each tensor of a VAE lies."""
    return {name: Source(VAE + vae_name(name, config)) for name in names}


def clip_sources(names: Iterable[str], header: Header) -> dict[str, Source]:
    """Where each tensor of a `CLIPTextModel` lies; files are with and without `text_model.`."""
    prefix = next((prefix for prefix in CLIP if header.matching("^" + re.escape(prefix))), CLIP[0])
    inner = "text_model." if header.matching("^" + re.escape(prefix) + "text_model") else ""
    return {name: Source(prefix + inner + name.removeprefix("text_model.")) for name in names}


def open_clip_sources(names: Iterable[str]) -> dict[str, Source]:
    """Where each tensor of SDXL's second text encoder lies."""
    found = {name: open_clip_source(name.removeprefix("text_model.")) for name in names}
    return {name: Source(OPEN_CLIP + at.name, at.third, at.transposed) for name, at in found.items()}


def missing(sources: Mapping[str, Source], header: Header) -> list[str]:
    """The names that a part needs and the file has not."""
    return sorted({source.name for source in sources.values()} - set(header.tensors))


def load_part(
    module: nn.Module, file: Path, sources: Mapping[str, Source], *, dtype: torch.dtype, more: Sequence[Path] = ()
) -> None:
    """Give a module (it may be on the meta device) the tensors of a file, one at a time; on the CPU, in `dtype`.

    `more` are the files that go on where the first ends.

    Raises:
        UnsuitableFile: A tensor is missing or has another shape than the module.
    """
    wanted = module.state_dict()
    state: dict[str, Tensor] = {}
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in (file, *more)]
        holder = {name: tensors for tensors in files for name in tensors.keys()}  # noqa: SIM118  # it is no mapping
        for name, source in sources.items():
            if source.name not in holder:
                raise UnsuitableFile(f"lacks the tensor {source.name!r}")
            found = _take(holder[source.name].get_tensor(source.name), source)
            state[name] = _fitted(found, wanted[name].shape, source.name).to(dtype).contiguous()
    module.load_state_dict(state, strict=True, assign=True)


def _take(tensor: Tensor, source: Source) -> Tensor:
    if source.third is not None:
        if tensor.ndim == 0 or tensor.shape[0] % 3:
            raise UnsuitableFile(f"has {source.name!r} in the shape {tuple(tensor.shape)}; expected three equal parts")
        tensor = tensor.chunk(3)[source.third]
    return tensor.T if source.transposed and tensor.ndim == 2 else tensor


def _fitted(tensor: Tensor, shape: torch.Size, name: str) -> Tensor:
    """A 1 x 1 convolution is a matrix to others: only sides of length one may come or go."""
    if [side for side in tensor.shape if side != 1] != [side for side in shape if side != 1]:
        raise UnsuitableFile(f"has {name!r} in the shape {tuple(tensor.shape)}; expected {tuple(shape)}")
    return tensor.reshape(shape)
