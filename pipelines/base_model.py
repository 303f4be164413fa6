"""Other base models: a checkpoint's UNet, text encoders and VAE in place of the server's own.

The tile ControlNet, the tokenizers and whatever a checkpoint leaves out are the server's. A base model must have the
architecture of its family, because the ControlNet adds to its layers; so the server's own config is its config, and
none is ever looked up. New modules are made for it: the server's weights are not touched.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from weights.detect import check_checkpoint, check_unet
from weights.header import Header, UnsuitableFile, read_header
from weights.hub import BaseFiles
from weights.ldm import (
    Source,
    clip_sources,
    load_part,
    missing,
    open_clip_sources,
    unet_sources,
    vae_sources,
)

WHOLE = "checkpoint"
"""The part name under which a file holds everything."""
UNET, VAE, TEXT_ENCODERS, SCHEDULER = "unet", "vae", ("text_encoder", "text_encoder_2"), "scheduler"

Sources = Mapping[str, Source]
Placed = tuple[list[Path], Sources]
"""Files that continue each other, and where in them each tensor of a module lies."""


def check_scheduler(path: Path) -> None:
    """Refuse a folder whose model does not predict noise.

    Raises:
        UnsuitableFile: It says so, or cannot be read.
    """
    try:
        prediction = json.loads(path.read_text()).get("prediction_type", "epsilon")
    except (ValueError, AttributeError, RecursionError) as error:
        raise UnsuitableFile("has a scheduler_config.json that cannot be read") from error
    if prediction != "epsilon":
        raise UnsuitableFile(f"is a base model whose prediction type is {prediction!r}; expected 'epsilon'")


@dataclass(frozen=True)
class Networks:
    """What a base model brings; None where the server's own stays."""

    unet: nn.Module
    text_encoders: tuple[nn.Module | None, ...]
    vae: AutoencoderKL | None


def load_base(
    model: Any,
    vae: AutoencoderKL,
    base: BaseFiles,
    family: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
) -> Networks:
    """Load the networks of a base model.

    Args:
        model: The server's own model of the family, for its architecture; not changed.
        vae: Likewise the server's own VAE.
        base: The files.
        family: fal's name of the family.
        device: Where they will compute.
        dtype: Of UNet and text encoders.
        vae_dtype: Of the VAE.

    Raises:
        UnsuitableFile: A part has another architecture, or lacks some of its tensors.
    """
    if SCHEDULER in base.files:
        check_scheduler(base.files[SCHEDULER].path)
    unet = _loaded(
        lambda: type(model.unet).from_config(model.unet.config),
        _place(base, UNET, family, lambda header: unet_sources(model.unet.state_dict(), model.unet.config)),
        device,
        dtype,
    )
    if unet is None:
        raise UnsuitableFile("holds no UNet")
    encoders = tuple(
        _loaded(_maker(encoder), _place(base, part, family, _text_sources(part, encoder)), device, dtype)
        for part, encoder in zip(TEXT_ENCODERS, model.text_encoders, strict=False)
    )
    own_vae = _loaded(
        lambda: AutoencoderKL.from_config(vae.config),
        _place(base, VAE, family, lambda header: vae_sources(vae.state_dict(), vae.config)),
        device,
        vae_dtype,
    )
    return Networks(unet.to(memory_format=torch.channels_last), encoders, own_vae)


def with_networks(model: Any, networks: Networks) -> Any:
    """The family `model` with other networks; a new object, which shares the ControlNet and all else with the old."""
    changed = copy.copy(model)
    changed.unet = networks.unet
    pairs = zip(model.text_encoders, networks.text_encoders, strict=True)
    changed.text_encoders = tuple(own if other is None else other for own, other in pairs)
    return changed


def _maker(encoder: nn.Module) -> Callable[[], nn.Module]:
    return lambda: type(encoder)(encoder.config)


def _text_sources(part: str, encoder: nn.Module) -> Callable[[Header], dict[str, Source]]:
    names = list(encoder.state_dict())
    if part == TEXT_ENCODERS[0]:
        return lambda header: clip_sources(names, header)
    return lambda header: open_clip_sources(names)


def _place(base: BaseFiles, part: str, family: str, in_checkpoint: Callable[[Header], Sources]) -> Placed | None:
    """Where a part's tensors lie; None if the base has no such part."""
    if WHOLE in base.files:
        path = base.files[WHOLE].path
        header = read_header(path)
        check_checkpoint(header, family)
        sources = in_checkpoint(header)
        return ([path], sources) if len(missing(sources, header)) < len(sources) / 2 else None
    if part not in base.files:
        return None
    paths = [file.path for file in base.of(part)]
    headers = [read_header(path) for path in paths]
    header = Header({name: tensor for each in headers for name, tensor in each.tensors.items()}, headers[0].metadata)
    if part == UNET:
        check_unet(header, family)
    return paths, _same_names(header, in_checkpoint)


def _same_names(header: Header, in_checkpoint: Callable[[Header], Sources]) -> Sources:
    """diffusers' layout: tensors have the names of the module's own, those of CLIP also with `text_model.`."""

    def found(name: str) -> str:
        spellings = (name, f"text_model.{name}", name.removeprefix("text_model."))
        return next((spelling for spelling in spellings if spelling in header.tensors), name)

    return {name: Source(found(name)) for name in in_checkpoint(header)}


def _loaded(make: Callable[[], Any], placed: Placed | None, device: torch.device, dtype: torch.dtype) -> Any:
    """A module with a file's tensors; None without a place."""
    if placed is None:
        return None
    (path, *more), sources = placed
    with torch.device("meta"):
        module = make()
    load_part(module, path, sources, dtype=dtype, more=more)
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta:
            # The one table that no file holds: the positions of CLIP's tokens.
            assert name.endswith("position_ids"), name
            owner = module.get_submodule(name.rpartition(".")[0])
            positions = torch.arange(buffer.shape[-1]).expand(buffer.shape)
            owner.register_buffer("position_ids", positions, persistent=False)
    return module.to(device).eval()
