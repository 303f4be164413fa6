"""Base models as people have them, made of the networks of a family that is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from weights import ldm
from weights.header import Header, TensorInfo


def checkpoint(model: Any, vae: nn.Module) -> dict[str, Tensor]:
    """All networks under the names of the original code, as a single file has them."""
    tensors: dict[str, Tensor] = {}
    thirds: dict[str, dict[int, Tensor]] = {}
    for module, sources in _parts(model, vae):
        for name, tensor in module.state_dict().items():
            source = sources[name]
            tensor = tensor.T if source.transposed else tensor
            if source.third is None:
                tensors[source.name] = tensor.detach().clone().contiguous()
            else:
                thirds.setdefault(source.name, {})[source.third] = tensor
    return tensors | {name: torch.cat([parts[index] for index in range(3)]) for name, parts in thirds.items()}


def shapes_of(model: Any, vae: nn.Module) -> dict[str, tuple[int, ...]]:
    """The names and shapes of such a file; modules may be without numbers."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module, sources in _parts(model, vae):
        for name, tensor in module.state_dict().items():
            source, shape = sources[name], list(tensor.shape)
            if source.third is not None:
                shape[0] *= 3
            shapes[source.name] = tuple(reversed(shape) if source.transposed else shape)
    return shapes


def _parts(model: Any, vae: Any) -> list[tuple[Any, dict[str, ldm.Source]]]:
    first, *second = model.text_encoders
    prefix = ldm.CLIP[1] if second else ldm.CLIP[0]
    marker = Header({f"{prefix}text_model.": TensorInfo("F32", (), 0, 0)})
    return [
        (model.unet, ldm.unet_sources(model.unet.state_dict(), model.unet.config)),
        (vae, ldm.vae_sources(vae.state_dict(), vae.config)),
        (first, ldm.clip_sources(first.state_dict(), marker)),
        *((encoder, ldm.open_clip_sources(encoder.state_dict())) for encoder in second),
    ]


def changed(tensors: dict[str, Tensor], factor: float = 1.02) -> dict[str, Tensor]:
    """Another base model: the same shapes, slightly other numbers in the UNet."""
    return {
        name: tensor * factor if name.startswith(ldm.UNET) and tensor.ndim > 1 else tensor
        for name, tensor in tensors.items()
    }


def write_folder(model: Any, vae: Any, folder: Path) -> None:
    """diffusers' folder layout."""
    model.unet.save_pretrained(folder / "unet")
    vae.save_pretrained(folder / "vae")
    for name, encoder in zip(("text_encoder", "text_encoder_2"), model.text_encoders, strict=False):
        encoder.save_pretrained(folder / name)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": "epsilon"}))


def write_checkpoint(tensors: dict[str, Tensor], path: Path) -> Path:
    """A single file."""
    save_file(tensors, path)
    return path
