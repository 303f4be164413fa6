"""LoRA files in all the spellings that people have, read into one form.

| written by            | example of a name                                                                            |
|-----------------------|----------------------------------------------------------------------------------------------|
| kohya, A1111, LyCORIS | `lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight`      |
| kohya for SDXL        | `lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight`, `lora_te2_…`  |
| PEFT, diffusers       | `unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight`              |
| diffusers before PEFT | `unet.down_blocks.0.….attn1.processor.to_q_lora.down.weight`                                 |
| ComfyUI               | `diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_down.weight`          |

A LoRA adds `alpha / rank · up(down(x))` to what a layer computes (arXiv 2106.09685); LoCon does so for convolutions,
with a third one between the two where it was decomposed further. Some files also change what has no rank: biases and
normalisations (`.diff`, `.diff_b`, `.w_norm`, `.b_norm`). Names are kept with `_` for every dot: so a model's modules
can be found under each spelling.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from dataclasses import dataclass, field
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
    (r"lora_unet_|lycoris_|unet\.|(model\.)?diffusion_model\.", UNET),
    (r"lora_te1?_|text_encoder\.|(?=text_model\.)", TEXT_ENCODERS[0]),
    (r"lora_te2_|text_encoder_2\.", TEXT_ENCODERS[1]),
)
_WRAPPER = re.compile(r"^(base_model\.model\.)+")
_ROLE = re.compile(
    r"(?:\.lora_(?P<kohya>down|up|mid)|\.lora_(?P<peft>[AB])(?:\.\w+)?|[._]lora\.(?P<old>down|up)"
    r"|\.lora_linear_layer\.(?P<older>down|up))\.weight$|\.(?P<other>alpha|scalar|diff|diff_b|w_norm|b_norm)$"
)
_ROLES = {"A": "down", "B": "up", "w_norm": "diff", "b_norm": "diff_b"}
_NUMBERS = ("alpha", "scalar")
MIN_KNOWN = 0.5
"""Least share of a file's tensors whose names are understood."""
_IGNORED = re.compile(r"^bundle_emb\.")
IGNORED = ("", "", "")
"""The place of a tensor that is none of our business: embeddings that were packed into the file."""
_ONE = torch.ones(1)
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


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What is added to the weight and the bias of one layer, of the shapes that these have."""

    weight: Tensor | None
    bias: Tensor | None


@dataclass(frozen=True)
class Lora:
    """A file's changes: part of the model -> name of the layer, with `_` for dots -> change.

    `num_unknown` of its tensors have names that nobody here understands.
    """

    parts: dict[str, dict[str, Change]]
    family: str
    differences: dict[str, dict[str, Difference]] = field(default_factory=dict)
    num_unknown: int = 0

    @property
    def num_layers(self) -> int:
        """How many layers the file changes; one that is changed in two ways counts twice."""
        return sum(len(changes) for part in (self.parts, self.differences) for changes in part.values())

    @property
    def size_bytes(self) -> int:
        """Bytes of all its numbers."""
        changes = [change for part in self.parts.values() for change in part.values()]
        differences = [difference for part in self.differences.values() for difference in part.values()]
        tensors = [
            *(tensor for change in changes for tensor in (change.down, change.up, change.mid)),
            *(tensor for difference in differences for tensor in (difference.weight, difference.bias)),
        ]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def read_lora(path: Path) -> Lora:
    """Read a LoRA file; its numbers keep their kind.

    Raises:
        UnsuitableFile: It is no LoRA, is incomplete, or holds numbers that are not finite.
    """
    header = read_header(path)
    family = check_lora(header)
    layers: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    with safe_open(path, framework="pt") as tensors:
        for name in header.tensors:
            place = _place(name)
            if place is None:
                unknown.append(name)
            elif place != IGNORED:
                part, layer, role = place
                layers[part, layer][role] = _finite(tensors.get_tensor(name), name, whole=role in _NUMBERS)
    if len(unknown) > (1 - MIN_KNOWN) * len(header.tensors):
        raise UnsuitableFile(f"holds tensors that belong to no LoRA, such as {unknown[0][:120]!r}")
    settings = _peft_settings(header)
    parts: dict[str, dict[str, Change]] = defaultdict(dict)
    differences: dict[str, dict[str, Difference]] = defaultdict(dict)
    for (part, layer), found in layers.items():
        weight, bias = found.pop("diff", None), found.pop("diff_b", None)
        if weight is not None or bias is not None:
            differences[part][layer] = Difference(weight=weight, bias=bias)
        if not found.keys() <= set(_NUMBERS) and 0 not in found.get("down", _ONE).shape[:1]:  # rank 0 adds nothing
            parts[part][layer] = _change(layer, found, settings.get(part, {}))
    if not parts and not differences:
        raise UnsuitableFile("changes no layer")
    return Lora(dict(parts), family, dict(differences), len(unknown))


def _place(name: str) -> tuple[str, str, str] | None:
    """Part, layer and role of a tensor; None for one whose name is not understood."""
    if _IGNORED.match(name):
        return IGNORED
    role = _ROLE.search(name)
    if role is None:
        return None
    part, stem = UNET, _WRAPPER.sub("", name[: role.start()])
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
    if any(found[name].numel() != 1 for name in _NUMBERS if name in found):
        raise UnsuitableFile(f"has an alpha in {layer!r} that is not one number")
    factor = float(found.get("scalar", _ONE))
    if "alpha" in found:
        return Change(down=down, up=up, mid=mid, scale=factor * float(found["alpha"]) / rank)
    alpha = _pattern(layer, settings.get("alpha_pattern"), settings.get("lora_alpha", rank))
    root = math.sqrt(rank) if settings.get("use_rslora") else rank
    if not math.isfinite(alpha):
        raise UnsuitableFile(f"has an alpha for {layer!r} that is not a finite number")
    return Change(down=down, up=up, mid=mid, scale=factor * alpha / root)


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
