"""The models of a set of weights: loaded when a request first wants them, shared by all pipelines of a slot.

Nothing here knows how they are used. Where a model is between two requests is `residency`'s decision; parts that a set
may lack are None when it does.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from diffusers import AutoencoderKL
from torch import nn

from pipelines.base_model import Networks, load_base, with_networks
from pipelines.caption import Captioner, caption_failed, load_captioner
from pipelines.ccsr import CCSR
from pipelines.prescale import BandedPreStage, load_prestage, network_in
from pipelines.redraw import Canvas
from pipelines.residency import Residency
from pipelines.safety import SafetyChecker
from pipelines.sd15 import StableDiffusion15
from pipelines.sdxl import StableDiffusionXL
from weights.detect import SD_1_5, SDXL
from weights.embedding import Embedding, read_embedding
from weights.fetch import WeightFile
from weights.hub import BaseFiles
from weights.lora import Lora, read_lora
from weights.restoreformer import SUFFIXES as RESTORER_SUFFIXES
from weights.restoreformer import load_restorer
from weights.store import WeightStore

T = TypeVar("T")

FACE_RESTORER = "face-restorer"
"""The part of a set that holds a network for small faces."""
ADAPTER_CACHE_BYTES = 2**30
"""LoRA and embedding files that are kept parsed."""


class FamilyParts(NamedTuple):
    """A family's class, and the parts of a set of weights that it is made of."""

    cls: Any
    folder: str
    controlnet: str


FAMILIES: Mapping[str, FamilyParts] = {
    SD_1_5: FamilyParts(StableDiffusion15, "sd15", "controlnet-tile-sd15"),
    SDXL: FamilyParts(StableDiffusionXL, "sdxl", "controlnet-tile-sdxl"),
}


@dataclass(frozen=True)
class Family:
    """A family of models on its device: what denoises, and the VAE with its tile grid."""

    model: Any
    canvas: Canvas


def fastest_dtype(device: torch.device) -> torch.dtype:
    """What to compute in where speed counts: 16 bits wherever the device computes in them.

    On a CPU that is bfloat16, which takes about 0.6 of float32's time and moves pixels by 0.1 / 255 on average.
    """
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if torch.cpu.get_capabilities().get("avx512_bf16") else torch.float32


class Models:
    """Models of one set of weights on one device.

    Args:
        store: The set.
        device: Where they compute.
        residency: Where they are kept.
        dtype: float32 on the CPU and float16 on a GPU unless given.
    """

    def __init__(
        self, store: WeightStore, device: torch.device, residency: Residency, *, dtype: torch.dtype | None = None
    ) -> None:
        self.store, self.device, self._residency = store, device, residency
        self.dtype = dtype or (torch.float16 if device.type == "cuda" else torch.float32)
        # The VAE overflows float16 on some pictures, bfloat16 has the range.
        self.vae_dtype = torch.bfloat16 if self.dtype == torch.float16 else self.dtype
        self._loras: _Parsed[Lora] = _Parsed(read_lora, lambda lora: lora.size_bytes)
        self._embeddings: _Parsed[Embedding] = _Parsed(
            read_embedding, lambda embedding: sum(rows.nbytes for rows in embedding.vectors)
        )

    @cached_property
    def description(self) -> dict[str, Any]:
        """What recipes say of the set; every file of it is read once for its hash."""
        return {"set": self.store.name, "sha256": self.store.digest()}

    def request(self, kind: str) -> AbstractContextManager[None]:
        """See `Residency.request`."""
        return self._residency.request(kind)

    @property
    def residency(self) -> Residency:
        """Where the models are."""
        return self._residency

    def expect(self, kinds: tuple[str, ...]) -> None:
        """See `Residency.expect`."""
        self._residency.expect(kinds)

    def has_family(self, name: str) -> bool:
        """Whether the set has all parts of a family."""
        parts = FAMILIES[name]
        has_vae = self._vae_folder(parts.folder).is_dir()
        return has_vae and self.store.has(parts.folder) and self.store.has(parts.controlnet)

    def family(self, name: str, base: BaseFiles | None = None) -> Family:
        """A family by fal's name, with another base model if one is given.

        Raises:
            UnsuitableFile: The base model cannot be used.
        """
        own: Family = self.resident(name, lambda: self._load_family(name), FAMILIES[name].folder)
        if base is None:
            return own
        key = "base " + " ".join(f"{part}:{file.sha256}" for part, file in sorted(base.all().items()))
        networks: Networks = self._residency.get(
            key,
            lambda: load_base(
                own.model,
                own.canvas.vae.vae,
                base,
                name,
                device=self.device,
                dtype=self.dtype,
                vae_dtype=self.vae_dtype,
            ),
            size_bytes=sum(file.path.stat().st_size for file in base.all().values()),
        )
        model = with_networks(own.model, networks)
        vae = own.canvas.vae.vae if networks.vae is None else networks.vae
        canvas = Canvas(vae, size_multiple=model.size_multiple, noise_floor=own.canvas.noise_floor)
        return Family(model, canvas)

    def prestage(self) -> BandedPreStage:
        """What enlarges pictures without a diffusion model."""
        return self.resident("prestage", lambda: load_prestage(self.store, self.device))

    def ccsr(self) -> CCSR | None:
        """The pre-stage that restores; version 2 where the set has both."""
        part = next((part for part in ("ccsr-v2", "ccsr-v1") if self.store.has(part)), None)
        if part is None:
            return None
        # It has a pre-stage of its own: shared modules could not move from level to level by themselves.
        return self.resident(
            part,
            lambda: CCSR.load(
                self.store.folder(part),
                device=self.device,
                dtype=self.dtype,
                base=load_prestage(self.store, self.device),
            ),
            part,
        )

    def captioner(self) -> Captioner | None:
        """What writes prompts.

        Raises:
            CaptionFailed: The set has one that cannot be read, or for which there is no room.
        """
        return self.captioner_in("captioner", load_captioner) if self.store.has("captioner") else None

    def captioner_in(self, part: str, load: Callable[..., Captioner]) -> Captioner:
        """What writes prompts, from a part of the set; raises as `captioner` does."""
        folder = self.store.folder(part)
        try:
            return self.resident(part, lambda: load(folder, device=str(self.device)), part)
        except torch.OutOfMemoryError as error:
            raise caption_failed("There is no room for this server's captioner", error) from error

    def checker(self) -> SafetyChecker | None:
        """What looks at results before they are shown."""
        if not self.store.has("safety-checker"):
            return None
        confirmer = self.store.folder("safety-confirmer") if self.store.has("safety-confirmer") else None
        folder = self.store.folder("safety-checker")
        return self.resident(
            "safety-checker",
            lambda: SafetyChecker.load(folder, confirmer=confirmer, device=str(self.device)),
            "safety-checker",
        )

    def face_restorer(self) -> nn.Module | None:
        """What restores small faces, where the operator has put it.

        Raises:
            ModelsUnusable: The file cannot be read.
        """
        if not self.store.has(FACE_RESTORER):
            return None
        return self.resident(FACE_RESTORER, self._load_face_restorer, FACE_RESTORER)

    def lora(self, file: WeightFile) -> Lora:
        """A LoRA file, read once."""
        return self._loras.get(file)

    def embedding(self, file: WeightFile) -> Embedding:
        """A textual inversion, read once."""
        return self._embeddings.get(file)

    def resident(self, key: str, load: Callable[[], T], part: str | None = None) -> T:
        """Anything else with modules in it, kept like the others; `part` is the folder whose size tells how large."""
        return self._residency.get(key, load, size_bytes=_folder_bytes(self.store.folder(part)) if part else 0)

    def _load_face_restorer(self) -> nn.Module | None:
        network = network_in(self.store, FACE_RESTORER, load_restorer, suffixes=RESTORER_SUFFIXES)
        return None if network is None else network.to(self.device)

    def _vae_folder(self, part: str) -> Path:
        """A family's own VAE; without one the shared one, which among the published models is not SDXL's."""
        own = self.store.folder(f"{part}/vae")
        is_shared = not own.is_dir() and (part == "sd15" or self.store.name == "pocket")
        return self.store.folder("vae") if is_shared else own

    def _load_family(self, name: str) -> Family:
        parts = FAMILIES[name]
        folder = self.store.folder(parts.folder)
        vae = AutoencoderKL.from_pretrained(
            self._vae_folder(parts.folder), torch_dtype=self.vae_dtype, local_files_only=True
        )
        model = parts.cls.load(folder, self.store.folder(parts.controlnet), device=self.device, dtype=self.dtype)
        canvas = Canvas(vae.to(self.device), size_multiple=model.size_multiple, noise_floor=_noise_floor(folder))
        return Family(model, canvas)


class _Parsed(Generic[T]):
    """Files by the SHA-256 of their bytes, read once, the least recently used forgotten beyond a budget."""

    def __init__(self, read: Callable[[Path], T], size_of: Callable[[T], int]) -> None:
        self._read, self._size_of = read, size_of
        self._found: OrderedDict[str, T] = OrderedDict()

    def get(self, file: WeightFile) -> T:
        """What is in a file."""
        if file.sha256 not in self._found:
            self._found[file.sha256] = self._read(file.path)
        self._found.move_to_end(file.sha256)
        while len(self._found) > 1 and sum(map(self._size_of, self._found.values())) > ADAPTER_CACHE_BYTES:
            self._found.popitem(last=False)
        return self._found[file.sha256]


def _noise_floor(folder: Path) -> float:
    """How far a family's networks miss clean latents by themselves, as far as their folder says so."""
    file = folder / "denoiser.json"
    return float(json.loads(file.read_text())["noise_floor"]) if file.is_file() else 0.0


def _folder_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in RESTORER_SUFFIXES)
