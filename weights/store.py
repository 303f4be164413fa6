"""Which set of weights serves, and where its parts lie on disk.

Two sets share one layout: a folder per part, each in the layout its stock class reads (`from_pretrained`).
`pocket` is part of this package; `full`, the published models, lies under `<data>/weights/full`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

POCKET_FOLDER = Path(__file__).parent / "pocket" / "models"

CREATIVE_UPSCALER_FILES = (
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
    "sd15/unet/config.json",
    "sd15/unet/diffusion_pytorch_model.safetensors",
    "sd15/text_encoder/config.json",
    "sd15/text_encoder/model.safetensors",
    "sd15/tokenizer/tokenizer_config.json",
    "sd15/scheduler/scheduler_config.json",
    "controlnet-tile-sd15/config.json",
    "controlnet-tile-sd15/diffusion_pytorch_model.safetensors",
)
"""What the creative upscaler cannot do without, relative to the set's folder."""


class WeightsMissing(Exception):
    """Files of the chosen set are not on disk.

    `files` names them, relative to the set's folder.
    """

    def __init__(self, name: str, folder: Path, files: list[str]) -> None:
        listing = "\n  ".join(files)
        super().__init__(
            f"The {name} weights are incomplete in {folder}. Missing:\n  {listing}\n"
            "Copy the models there, each in its diffusers folder layout (any safetensors variant saved with "
            "save_pretrained), or start with --weights pocket to serve the small built-in set."
        )
        self.name, self.folder, self.files = name, folder, files


@dataclass(frozen=True)
class WeightStore:
    """A set of weights on disk.

    Attributes:
        name: `pocket` or `full`.
        root: The folder that holds one folder per part.
    """

    name: str
    root: Path

    def folder(self, part: str) -> Path:
        """Where a part lies: `vae`, `sd15`, `controlnet-tile-sd15`, `upscaler-compact-x2`."""
        return self.root / part

    def has(self, part: str) -> bool:
        """Whether a part that is optional is there."""
        return self.folder(part).is_dir()

    def missing(self) -> list[str]:
        """The required files that are not on disk, relative to the set's folder."""
        return [file for file in CREATIVE_UPSCALER_FILES if not (self.root / file).is_file()]

    def digest(self) -> dict[str, str]:
        """SHA-256 of every safetensors file, by its path relative to the set's folder; reads them all once."""
        files = sorted(self.root.rglob("*.safetensors"))
        return {str(file.relative_to(self.root)): _sha256(file) for file in files}


def open_store(choice: str, *, root: Path, has_cuda: bool) -> WeightStore:
    """Choose a set and check that its files are there.

    Args:
        choice: `pocket`, `full`, or `auto`: full where there is a CUDA device, pocket where there is none. A machine
            with a GPU never serves the small set by accident.
        root: Folder of the full set.
        has_cuda: Whether this process sees a CUDA device.

    Raises:
        WeightsMissing: Required files are not on disk.
        ValueError: `choice` is none of the three.
    """
    if choice not in ("pocket", "full", "auto"):
        raise ValueError(f"weights must be pocket, full or auto, got {choice!r}")
    use_full = choice == "full" or (choice == "auto" and has_cuda)
    store = WeightStore("full", root) if use_full else WeightStore("pocket", POCKET_FOLDER)
    if missing := store.missing():
        raise WeightsMissing(store.name, store.root, missing)
    return store


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
