"""LoRA files as people have them: one set of random changes to a model, written in every spelling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from weights.ldm import unet_name, unet_prefixes

RANK = 3
ALPHA = 2.0
UNET_LAYERS = ("attn1.to_q", "attn2.to_k", "attn2.to_v", "to_out.0", "ff.net.0.proj", "proj_in", "conv1")
TEXT_LAYERS = ("q_proj", "out_proj", "mlp.fc1")


class Pair(NamedTuple):
    """What is added to a layer: down (rank, in, …), up (out, rank, …)."""

    down: Tensor
    up: Tensor


Changes = Mapping[tuple[str, str], Pair]
"""Part of the model ("unet", "text_encoder", "text_encoder_2") and dotted name of the layer -> what is added."""


def random_changes(model: Any, *, size: float = 0.1, unet: bool = True, text: bool = True) -> Changes:
    """Changes of a few layers of each kind of a model with `unet` and `text_encoders`."""
    generator = torch.Generator().manual_seed(11)
    parts: dict[str, tuple[nn.Module, tuple[str, ...]]] = {"unet": (model.unet, UNET_LAYERS)} if unet else {}
    if text:
        names = ("text_encoder", "text_encoder_2")
        parts |= {name: (encoder, TEXT_LAYERS) for name, encoder in zip(names, model.text_encoders, strict=False)}
    changes = {}
    for part, (module, endings) in parts.items():
        for name, layer in module.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d) and name.endswith(endings):
                num_out, num_in, *kernel = layer.weight.shape
                down = torch.randn(RANK, num_in, *kernel, generator=generator)
                up = torch.randn(num_out, RANK, *[1] * len(kernel), generator=generator)
                scale = size * float(layer.weight.detach().float().std())
                changes[part, name.removeprefix("text_model.")] = Pair(down, up * scale)
    return changes


def kohya(changes: Changes, unet_config: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """As kohya's trainer and A1111 name them; with a config, under the numbers of the original code, as for SDXL."""
    prefixes = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    if any(part == "text_encoder_2" for part, _ in changes):
        prefixes["text_encoder"] = "lora_te1_text_model_"
    tensors = {}
    for (part, name), pair in changes.items():
        if part == "unet" and unet_config is not None:
            name = unet_name(name, unet_prefixes(unet_config)) or name
        stem = prefixes[part] + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": pair.down, f"{stem}.lora_up.weight": pair.up}
        tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    return tensors


def sdxl_kohya(changes: Changes, layers_per_block: int, num_blocks: int = 3) -> dict[str, Tensor]:
    """As kohya's trainer names SDXL's layers: by the arithmetic of its own table, independent of `weights.ldm`."""
    places = {"mid_block.attentions.0": "middle_block.1", "conv_in": "input_blocks.0.0", "conv_out": "out.2"}
    for block in range(num_blocks):
        first_down, first_up = (layers_per_block + 1) * block + 1, (layers_per_block + 1) * block
        for layer in range(layers_per_block + 1):
            places |= {
                f"down_blocks.{block}.resnets.{layer}": f"input_blocks.{first_down + layer}.0",
                f"down_blocks.{block}.attentions.{layer}": f"input_blocks.{first_down + layer}.1",
                f"up_blocks.{block}.resnets.{layer}": f"output_blocks.{first_up + layer}.0",
                f"up_blocks.{block}.attentions.{layer}": f"output_blocks.{first_up + layer}.1",
            }
        places[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{first_down + layers_per_block}.0.op"
        places[f"up_blocks.{block}.upsamplers.0"] = f"output_blocks.{first_up + layers_per_block}.2"
    places |= {f"mid_block.resnets.{layer}": f"middle_block.{2 * layer}" for layer in range(2)}
    inner = {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    }
    heads = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    tensors = {}
    for (part, name), pair in changes.items():
        if part == "unet":
            place = next(
                place for place in sorted(places, reverse=True) if name == place or name.startswith(place + ".")
            )
            name = places[place] + "".join(
                f".{inner.get(word, word)}" if "resnets" in place else f".{word}"
                for word in name.removeprefix(place).split(".")[1:]
            )
        stem = heads[part] + name.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": pair.down, f"{stem}.lora_up.weight": pair.up}
        tensors[f"{stem}.alpha"] = torch.tensor(ALPHA)
    return tensors


def peft(changes: Changes) -> dict[str, Tensor]:
    """As diffusers saves what PEFT trained; alpha is the rank, so the factor is in `up`."""
    tensors = {}
    for (part, name), pair in changes.items():
        stem = f"{part}.{name}" if part == "unet" else f"{part}.text_model.{name}"
        tensors |= {f"{stem}.lora_A.weight": pair.down, f"{stem}.lora_B.weight": pair.up * (ALPHA / RANK)}
    return tensors


def before_peft(changes: Changes) -> dict[str, Tensor]:
    """As diffusers saved them before PEFT: on the attention's processor."""
    tensors = {}
    for (part, name), pair in changes.items():
        stem = f"{part}.{name}" if part == "unet" else f"{part}.text_model.{name}"
        up = pair.up * (ALPHA / RANK)
        head, _, tail = stem.rpartition(".attn")
        if part == "unet" and head:
            number, _, layer = tail.partition(".")
            stem = f"{head}.attn{number}.processor.{layer.removesuffix('.0')}_lora"
            tensors |= {f"{stem}.down.weight": pair.down, f"{stem}.up.weight": up}
        elif part != "unet" and stem.endswith("_proj"):
            stem = stem.removesuffix("_proj")
            head, _, letter = stem.rpartition(".")
            tensors |= {
                f"{head}.to_{letter}_lora.down.weight": pair.down,
                f"{head}.to_{letter}_lora.up.weight": up,
            }
        else:
            tensors |= {f"{stem}.lora.down.weight": pair.down, f"{stem}.lora.up.weight": up}
    return tensors


def written(tensors: Mapping[str, Tensor], path: Path) -> Path:
    """The tensors as a file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path
