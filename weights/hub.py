"""Base models by name: a repository of a model hub, a file on one, or what the operator has put on disk.

| given as                                             | means                                                       |
|------------------------------------------------------|-------------------------------------------------------------|
| `https://host/path/model.safetensors`                | that file                                                   |
| `https://<hub>/owner/name`, `owner/name`             | the repository, in diffusers' folder layout                 |
| `https://<hub>/owner/name/blob/main/x.safetensors`   | that file; the page about it means the file itself          |
| `name`                                               | `<folder>/name` or `<folder>/name.safetensors` on this disk |
"""

from __future__ import annotations

import hashlib
import json
import re
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from weights.fetch import Poll, WeightCache, WeightFile
from weights.header import Header, UnsuitableFile, read_header

MAX_JSON_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REPOSITORY = re.compile(rf"{_NAME.pattern}/{_NAME.pattern}")

PARTS: Mapping[str, tuple[str, ...]] = {
    "unet": (
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
    ),
    "text_encoder": ("text_encoder/model.safetensors", "text_encoder/model.fp16.safetensors"),
    "text_encoder_2": ("text_encoder_2/model.safetensors", "text_encoder_2/model.fp16.safetensors"),
    "vae": ("vae/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.fp16.safetensors"),
    "scheduler": ("scheduler/scheduler_config.json",),
}
"""What is taken of a repository or folder: the first of each row that is there."""


@dataclass(frozen=True, kw_only=True)
class BaseFiles:
    """Files of a base model by part; a single file is the part `checkpoint`."""

    name: str
    files: Mapping[str, WeightFile]


@dataclass(frozen=True)
class BaseModels:
    """Where base models come from.

    Attributes:
        cache: Downloads.
        hub: URL of the model hub, without a slash at its end.
        folder: What the operator has put on disk.
    """

    cache: WeightCache
    hub: str
    folder: Path

    def find(self, reference: str, check: Callable[[Header], object], poll: Poll = lambda: None) -> BaseFiles:
        """The files of a base model.

        Args:
            reference: See the module docstring.
            check: Raises `UnsuitableFile` for a single file that is not wanted, from its header.
            poll: See `WeightCache.fetch`.

        Raises:
            UnsuitableFile: There is none under this name, or it cannot be used.
            Exception: See `WeightCache.fetch`.
        """
        reference = reference.strip()
        if _NAME.fullmatch(reference):
            return self._on_disk(reference, check)
        repository, path = self._on_hub(reference)
        if repository and not path:
            return self._repository(repository, poll)
        url = f"{self.hub}/{repository}/resolve/{path}" if repository else reference
        file = self.cache.fetch(url, lambda found: check(read_header(found)), poll)
        return BaseFiles(name=file.name, files={"checkpoint": file})

    def _on_hub(self, reference: str) -> tuple[str, str]:
        """Repository and revision/path that are meant; empty where it is a URL of its own."""
        if _REPOSITORY.fullmatch(reference):
            return reference, ""
        if not reference.startswith(self.hub + "/"):
            return "", ""
        segments = urllib.parse.urlsplit(reference.removeprefix(self.hub)).path.strip("/").split("/")
        repository = "/".join(segments[:2])
        if not _REPOSITORY.fullmatch(repository):
            return "", ""
        if len(segments) >= 5 and segments[2] in ("blob", "resolve"):
            return repository, "/".join(segments[3:])
        return (repository, "") if len(segments) == 2 else ("", "")

    def _repository(self, repository: str, poll: Poll) -> BaseFiles:
        def get(path: str) -> WeightFile:
            url = f"{self.hub}/{repository}/resolve/main/{path}"
            if path.endswith(".json"):
                return self.cache.fetch(url, _check_json, poll, sniff=_anything)
            return self.cache.fetch(url, read_header, poll)

        listing = self.cache.fetch(f"{self.hub}/api/models/{repository}", _check_json, poll, sniff=_anything)
        try:
            present = {str(entry["rfilename"]) for entry in json.loads(listing.path.read_text())["siblings"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UnsuitableFile("is a repository whose list of files cannot be read") from error
        return BaseFiles(name=repository, files={part: get(name) for part, name in _chosen(present).items()})

    def _on_disk(self, name: str, check: Callable[[Header], object]) -> BaseFiles:
        folder, file = self.folder / name, self.folder / f"{name.removesuffix('.safetensors')}.safetensors"
        if file.is_file():
            check(read_header(file))
            return BaseFiles(name=name, files={"checkpoint": file_on_disk(file)})
        if not folder.is_dir():
            raise UnsuitableFile("is not known: give a URL, a repository owner/name, or a name this server has")
        present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        chosen = _chosen(present)
        return BaseFiles(name=name, files={part: file_on_disk(folder / path) for part, path in chosen.items()})


def _chosen(present: set[str]) -> dict[str, str]:
    chosen = {
        part: next(name for name in names if name in present)
        for part, names in PARTS.items()
        if not present.isdisjoint(names)
    }
    if "unet" not in chosen:
        raise UnsuitableFile(
            f"is not in diffusers' folder layout with safetensors: {PARTS['unet'][0]} is missing. Give the URL of one "
            "of its .safetensors files instead"
        )
    return chosen


def _anything(head: bytes) -> None:
    """JSON may begin with anything."""


def _check_json(path: Path) -> None:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("too large")
        json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise UnsuitableFile("is not the JSON that a model hub sends") from error


def file_on_disk(path: Path) -> WeightFile:
    """A file of the operator's; what stands for its content is its place, size and time."""
    status = path.stat()
    told = f"{path}:{status.st_size}:{status.st_mtime_ns}"
    return WeightFile(path=path, name=path.name, sha256=hashlib.sha256(told.encode()).hexdigest())
