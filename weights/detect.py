"""What a file of weights is for, from the names and shapes of its tensors alone.

Two tables, read from the top: what kind of file it is, and which family of models it belongs to. Nothing here opens a
tensor; `weights.header` has checked the names before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

from weights.header import Header, UnsuitableFile

SD_1_5, SDXL = "SD_1_5", "SDXL"
FAMILY_NAMES = {SD_1_5: "Stable Diffusion 1.5", SDXL: "SDXL"}
"""The families that are served, as fal calls them, and their names for people."""


class Kind(Enum):
    """What can be done with a file."""

    CHECKPOINT = "a base model"  # UNet, VAE and text encoders in one file, under the names of the original code
    UNET = "a UNet alone, in diffusers' layout"
    VAE = "a VAE"
    CONTROLNET = "a ControlNet"
    LORA = "a LoRA"
    EMBEDDING = "a textual inversion embedding"


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a file is: its kind, and its family for people ("" where the file does not tell)."""

    kind: Kind
    family: str = ""

    def __str__(self) -> str:
        return f"{self.kind.value} for {self.family}" if self.family else self.kind.value


class _Sign(NamedTuple):
    """A name that gives something away, and what."""

    pattern: str
    meaning: str


_KINDS = (
    (Kind.LORA, r"[._](lora_(down|up|A|B|mid|linear_layer)|lora\.(down|up)|(hada|lokr)_w\d|oft_(diag|blocks))(\.|_|$)"),
    (Kind.LORA, r"^(lora_unet|lora_te\d?|lycoris)_"),
    (Kind.CHECKPOINT, r"^model\.diffusion_model\."),
    (Kind.CHECKPOINT, r"^(double_blocks|joint_blocks)\."),
    (Kind.CONTROLNET, r"^(controlnet_cond_embedding|control_model|input_hint_block)\b"),
    (Kind.UNET, r"^down_blocks\.\d+\.resnets\."),
    (Kind.VAE, r"^(first_stage_model\.)?(encoder|decoder)\.conv_in\.weight$"),
    (Kind.EMBEDDING, r"^(emb_params|clip_[lg]|text_encoders_[01]|string_to_param.*|<[^>]*>)$"),
)

UNSUPPORTED_ADAPTERS = (
    _Sign(r"hada_w1", "LoHa"),
    _Sign(r"lokr_w", "LoKr"),
    _Sign(r"\.oft_", "OFT"),
    _Sign(r"dora_scale|lora_magnitude_vector", "DoRA"),
    _Sign(r"\.on_input$", "(IA)3"),
    _Sign(r"\.a1\.weight$", "GLoRA"),
)
"""Kinds of adapters besides LoRA and LoCon; they are refused by name rather than applied by half."""

_FAMILIES = (
    _Sign(r"(^|[._])(double_blocks|single_transformer_blocks)[._]", "FLUX"),
    _Sign(r"(^|[._])joint_(transformer_)?blocks[._]", "Stable Diffusion 3"),
    _Sign(r"^conditioner\.embedders\.1\.|^clip_g$|^lora_te2_|^text_encoder_2\.", "SDXL"),
    _Sign(r"label_emb[._]|add_embedding[._]linear_", "SDXL"),
    _Sign(r"^conditioner\.embedders\.0\.model\.", "the SDXL refiner"),
    _Sign(r"^cond_stage_model\.model\.", "Stable Diffusion 2"),
)
_BY_CONTEXT = {768: FAMILY_NAMES[SD_1_5], 1024: "Stable Diffusion 2", 1280: "the SDXL refiner", 2048: "SDXL"}
"""Width of the text that the UNet attends to: the one number in which the families differ everywhere."""


_TASKS = {9: "inpainting", 8: "editing by instruction (InstructPix2Pix)", 5: "pictures with depth"}
"""By the channels that a UNet sees: latents, and what was put next to them in training."""


def detect(header: Header) -> Found:
    """Say what a file is for.

    Raises:
        UnsuitableFile: Its names are those of nothing known.
    """
    names = list(header.tensors)
    for kind, pattern in _KINDS:
        if any(re.search(pattern, name) for name in names):
            return Found(kind=kind, family=_family(header))
    if len(names) == 1 and len(header.tensors[names[0]].shape) in (1, 2):
        return Found(kind=Kind.EMBEDDING)
    raise UnsuitableFile(f"holds weights of no known kind (its first tensor is called {names[0][:80]!r})")


def unsupported_adapter(header: Header) -> str | None:
    """The name of an adapter kind that is not applied here, if the file is of one."""
    return next((sign.meaning for sign in UNSUPPORTED_ADAPTERS if header.matching(sign.pattern)), None)


def check_lora(header: Header, family: str | None = None) -> str:
    """Refuse what is no LoRA that can be applied; returns the name of its family for people, "" if it does not tell.

    Raises:
        UnsuitableFile: It is something else, an adapter of another kind, or tells another family than `family`.
    """
    found = detect(header)
    if (kind := unsupported_adapter(header)) is not None:
        raise UnsuitableFile(f"is an adapter of the kind {kind}; LoRA and LoCon are supported")
    if found.kind is not Kind.LORA:
        raise UnsuitableFile(f"is {found}, not a LoRA")
    if family is not None:
        _check_family(found, family)
    return found.family


def check_embedding(header: Header) -> None:
    """Refuse what is no textual inversion.

    Raises:
        UnsuitableFile: It is something else.
    """
    found = detect(header)
    if found.kind is not Kind.EMBEDDING:
        raise UnsuitableFile(f"is {found}, not a textual inversion embedding")


def check_checkpoint(header: Header, family: str) -> None:
    """Refuse what is no base model of a family, given by fal's name.

    Raises:
        UnsuitableFile: It is something else, of another family, or was trained for another task.
    """
    found = detect(header)
    if found.kind is not Kind.CHECKPOINT:
        raise UnsuitableFile(f"is {found}, not a base model")
    _check_family(found, family)
    first = header.tensors.get("model.diffusion_model.input_blocks.0.0.weight")
    if first is not None and len(first.shape) > 1:
        _check_task(first.shape[1])
    if "v_pred" in header.tensors or header.metadata.get("modelspec.prediction_type", "") == "v":
        raise UnsuitableFile("is a base model that predicts velocity instead of noise")
    if not header.matching(r"^model\.diffusion_model\.(input_blocks|out)\."):
        raise UnsuitableFile("is a checkpoint without a UNet under the names of the original code")


def check_unet(header: Header, family: str) -> None:
    """Refuse what is no UNet of a family in diffusers' layout, the family given by fal's name.

    Raises:
        UnsuitableFile: It is something else, of another family, or was trained for another task.
    """
    found = detect(header)
    if found.kind is not Kind.UNET:
        raise UnsuitableFile(f"is {found}, not a UNet in diffusers' layout")
    _check_family(found, family)
    first = header.tensors.get("conv_in.weight")
    if first is not None and len(first.shape) > 1:
        _check_task(first.shape[1])


def check_unet_config(config: Mapping[str, Any], family: str) -> None:
    """Refuse a UNet by diffusers' `config.json`, before its weights are there; what says nothing passes.

    Raises:
        UnsuitableFile: It is of another family, or was trained for another task.
    """
    width = config.get("cross_attention_dim")
    _check_family(Found(kind=Kind.UNET, family=_BY_CONTEXT.get(width, "") if isinstance(width, int) else ""), family)
    _check_task(config.get("in_channels"))


def _check_task(num_channels: Any) -> None:
    if num_channels in _TASKS:
        raise UnsuitableFile(f"is a base model for {_TASKS[num_channels]}")


def _check_family(found: Found, family: str) -> None:
    if found.family not in ("", FAMILY_NAMES[family]):
        raise UnsuitableFile(f"is {found}; the model_type of this request is {family}")


def _family(header: Header) -> str:
    for sign in _FAMILIES:
        if header.matching(sign.pattern):
            return sign.meaning
    for name in header.matching(r"attn2[._](processor\.)?to_[kv]([._]lora([._]down|_A(\.\w+)?))?\.weight$"):
        shape = header.tensors[name].shape
        if len(shape) >= 2 and shape[1] in _BY_CONTEXT:
            return _BY_CONTEXT[shape[1]]
    return ""
