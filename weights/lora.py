"""LoRA files in all the spellings that people have, read into one form.

| written by            | example of a name                                                                            |
|-----------------------|----------------------------------------------------------------------------------------------|
| kohya, A1111, LyCORIS | `lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight`      |
| kohya for SDXL        | `lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight`, `lora_te2_…`  |
| PEFT, diffusers       | `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight`              |
| diffusers before PEFT | `unet.down_blocks.0.….attn1.processor.to_q_lora.down.weight`                                 |

A LoRA adds `alpha / rank · up(down(x))` to what a layer computes (arXiv 2106.09685); LoCon does so for convolutions,
with a third one between the two where it was decomposed further. Names are kept with `_` for every dot: so a model's
modules can be found under each spelling.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from weights.detect import check_lora
from weights.header import Header, UnsuitableFile, read_header

UNET, TEXT_ENCODERS = "unet", ("text_encoder", "text_encoder_2")
"""The parts of a model that a file may change."""

_PARTS = (
    (r"lora_unet_|lycoris_|unet\.|base_model\.model\.", UNET),
    (r"lora_te1?_|text_encoder\.", TEXT_ENCODERS[0]),
    (r"lora_te2_|text_encoder_2\.", TEXT_ENCODERS[1]),
)
_ROLE = re.compile(
    r"(?:\.lora_(?P<kohya>down|up|mid)|\.lora_(?P<peft>[AB])(?:\.\w+)?|[._]lora\.(?P<old>down|up)"
    r"|\.lora_linear_layer\.(?P<older>down|up))\.weight$|\.(?P<alpha>alpha)$"
)
_ROLES = {"A": "down", "B": "up"}
_IGNORED = re.compile(r"^bundle_emb\.")
_OLD_TEXT_NAMES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is added to one layer: `scale · up(mid(down(x)))`.

    Attributes:
        down: (rank, in) or (rank, in, h, w).
        up: (out, rank) or (out, rank, 1, 1).
        mid: (rank, rank, h, w), between the two, where the file has it.
        scale: alpha / rank; 1 where the file names no alpha.
    """

    down: Tensor
    up: Tensor
    mid: Tensor | None
    scale: float


@dataclass(frozen=True)
class Lora:
    """A file's changes: part of the model -> name of the layer, with `_` for dots -> change."""

    parts: dict[str, dict[str, Change]]
    family: str

    @property
    def num_layers(self) -> int:
        """How many layers the file changes."""
        return sum(len(changes) for changes in self.parts.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all its numbers."""
        tensors = [
            tensor
            for changes in self.parts.values()
            for change in changes.values()
            for tensor in (change.down, change.up, change.mid)
            if tensor is not None
        ]
        return sum(tensor.nbytes for tensor in tensors)


def read_lora(path: Path) -> Lora:
    """Read a LoRA file; its numbers keep their kind.

    Raises:
        UnsuitableFile: It is no LoRA, is incomplete, or holds numbers that are not finite.
    """
    header = read_header(path)
    family = check_lora(header)
    layers: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    with safe_open(path, framework="pt") as tensors:
        for name in header.tensors:
            place = _place(name)
            if place is None:
                raise UnsuitableFile(f"holds a tensor that belongs to no LoRA: {name[:120]!r}")
            part, layer, role = place
            if role:
                layers[part, layer][role] = _finite(tensors.get_tensor(name), name, whole=role == "alpha")
    settings = _peft_settings(header)
    parts: dict[str, dict[str, Change]] = defaultdict(dict)
    for (part, layer), found in layers.items():
        parts[part][layer] = _change(layer, found, settings.get(part, {}))
    return Lora(dict(parts), family)


def _place(name: str) -> tuple[str, str, str] | None:
    """Part, layer and role of a tensor; the role is empty for what is none of our business, None for the unknown."""
    if _IGNORED.match(name):
        return "", "", ""
    role = _ROLE.search(name)
    if role is None:
        return None
    part, stem = UNET, name[: role.start()]
    for pattern, candidate in _PARTS:
        if (prefix := re.match(pattern, stem)) is not None:
            part, stem = candidate, stem[prefix.end() :]
            break
    layer = stem.replace(".processor", "").removesuffix("_lora").removesuffix(".lora")
    if part == UNET:
        layer = re.sub(r"(attn\d)\.to_out$", r"\1.to_out.0", layer)
    else:
        layer = re.sub(r"to_(q|k|v|out)$", lambda old: _OLD_TEXT_NAMES[old[0]], layer)
        layer = re.sub(r"^text_model[._]", "", layer)
    word = next(word for word in role.groups() if word)
    return part, layer.replace(".", "_"), _ROLES.get(word, word)


def _finite(tensor: Tensor, name: str, *, whole: bool) -> Tensor:
    """The tensor, if it is one of finite numbers; `whole` allows integers, as kohya writes an alpha of 1."""
    if not (tensor.is_floating_point() or whole) or not bool(tensor.float().isfinite().all()):
        raise UnsuitableFile(f"holds numbers that are not finite in {name[:120]!r}")
    return tensor


def _change(layer: str, found: dict[str, Tensor], settings: dict[str, Any]) -> Change:
    if "down" not in found or "up" not in found:
        raise UnsuitableFile(f"is incomplete: {layer!r} has {' and '.join(sorted(found))} only")
    down, up, mid = found["down"], found["up"], found.get("mid")
    rank = down.shape[0]
    if down.ndim not in (2, 4) or up.ndim not in (2, 4) or up.shape[1] != rank or rank == 0:
        raise UnsuitableFile(f"has shapes in {layer!r} that do not fit together: {down.shape} and {up.shape}")
    if up[0:1, 0:1].numel() != 1:
        raise UnsuitableFile(f"has shapes in {layer!r} that do not fit together: {down.shape} and {up.shape}")
    if mid is not None and (mid.ndim != 4 or mid.shape[:2] != (rank, rank) or down[0:1, 0:1].numel() != 1):
        raise UnsuitableFile(f"has shapes in {layer!r} that do not fit together: {down.shape} and {mid.shape}")
    if "alpha" in found:
        if found["alpha"].numel() != 1:
            raise UnsuitableFile(f"has an alpha in {layer!r} that is not one number")
        return Change(down=down, up=up, mid=mid, scale=float(found["alpha"]) / rank)
    alpha = _pattern(layer, settings.get("alpha_pattern"), settings.get("lora_alpha", rank))
    root = math.sqrt(rank) if settings.get("use_rslora") else rank
    if not math.isfinite(alpha):
        raise UnsuitableFile(f"has an alpha for {layer!r} that is not a finite number")
    return Change(down=down, up=up, mid=mid, scale=alpha / root)


def _pattern(layer: str, patterns: Any, default: Any) -> float:
    """PEFT's alpha of a layer, which may be given by the end of its name."""
    for name, value in (patterns or {}).items():
        if layer.endswith(str(name).replace(".", "_")):
            return float(value)
    return float(default)


def _peft_settings(header: Header) -> dict[str, dict[str, Any]]:
    """PEFT's settings by part, where diffusers has written them into the file.

    Raises:
        UnsuitableFile: They cannot be read.
    """
    text = header.metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    settings: dict[str, dict[str, Any]] = defaultdict(dict)
    try:
        for name, value in json.loads(text).items():
            part, _, key = name.partition(".")
            if key == "lora_alpha":
                value = float(value)
            if key == "alpha_pattern":
                value = {str(layer): float(alpha) for layer, alpha in (value or {}).items()}
            settings[part][key] = value
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UnsuitableFile("has settings of its LoRA that cannot be read") from error
    return settings


def on_device(change: Change, device: torch.device, dtype: torch.dtype) -> Change:
    """The same change where a layer computes."""
    mid = None if change.mid is None else change.mid.to(device, dtype)
    return Change(down=change.down.to(device, dtype), up=change.up.to(device, dtype), mid=mid, scale=change.scale)
