"""Base models by name: a repository of a model hub, a file on one, or what the operator has put on disk.

| given as                                             | means                                                       |
|------------------------------------------------------|-------------------------------------------------------------|
| `https://host/path/model.safetensors`                | that file                                                   |
| `https://<hub>/owner/name`, `owner/name`             | the repository, in diffusers' folder layout                 |
| `owner/name@revision`                                | the same at a branch, tag or commit                         |
| `https://<hub>/owner/name/tree/revision/folder`      | the same in a folder of the repository                      |
| `https://<hub>/owner/name/blob/main/x.safetensors`   | that file; the page about it means the file itself          |
| `name`                                               | `<folder>/name` or `<folder>/name.safetensors` on this disk |

A repository or folder with one safetensors file at its root, and no parts, is that file.
"""

from __future__ import annotations

import hashlib
import json
import re
import urllib.parse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from weights.detect import check_checkpoint, check_unet, check_unet_config
from weights.fetch import Poll, WeightCache, WeightFile
from weights.header import UnsuitableFile, read_header

PUBLIC_HUB = "https://huggingface.co"
"""What addresses on the web name; a mirror in its place serves them."""
MAX_JSON_BYTES = 2**23
MAIN = "main"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_REPOSITORY = re.compile(rf"({_NAME.pattern}/{_NAME.pattern})(?:@([A-Za-z0-9][A-Za-z0-9._/-]{{0,95}}))?")

CHECKPOINT, UNET = "checkpoint", "unet"
PARTS: Mapping[str, tuple[str, ...]] = {
    UNET: ("unet/diffusion_pytorch_model", "diffusion_pytorch_model"),
    "text_encoder": ("text_encoder/model",),
    "text_encoder_2": ("text_encoder_2/model",),
    "vae": ("vae/diffusion_pytorch_model",),
}
"""What is taken of a repository or folder: the first of each row that is there, whole or in shards."""
VARIANTS = ("", ".fp16")
UNET_CONFIG, SCHEDULER_CONFIG, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True, kw_only=True)
class BaseFiles:
    """Files of a base model by part; a single file is the part `checkpoint`.

    `shards` are the files that continue a part which is not in one.
    """

    name: str
    files: Mapping[str, WeightFile]
    shards: Mapping[str, tuple[WeightFile, ...]] = field(default_factory=dict)

    def of(self, part: str) -> list[WeightFile]:
        """The files of a part, in order."""
        return [self.files[part], *self.shards.get(part, ())]

    def all(self) -> dict[str, WeightFile]:
        """Every file by its part, those after the first with their number."""
        return {
            f"{part} {number}" if number > 1 else part: file
            for part in self.files
            for number, file in enumerate(self.of(part), 1)
        }


class _Place(NamedTuple):
    """A repository at a revision, and a folder or file in it ("" for the whole)."""

    repository: str
    revision: str
    path: str
    is_file: bool


Get = Callable[[str], WeightFile]
"""Gives a file of a repository or folder by its path in it."""


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

    def find(self, reference: str, family: str, poll: Poll = lambda: None) -> BaseFiles:
        """The files of a base model.

        Args:
            reference: See the module docstring.
            family: fal's name of the family that it must be of.
            poll: See `WeightCache.fetch`.

        Raises:
            UnsuitableFile: There is none under this name, or it cannot be used.
            Exception: See `WeightCache.fetch`.
        """
        reference = reference.strip()
        if _NAME.fullmatch(reference):
            return self._on_disk(reference, family)
        place = self._on_hub(reference)
        if place is not None and not place.is_file:
            return self._repository(place, family, poll)
        url = self.address_of(reference)
        file = self.cache.fetch(url, lambda path: check_checkpoint(read_header(path), family), poll)
        return BaseFiles(name=file.name, files={CHECKPOINT: file})

    def address_of(self, reference: str) -> str:
        """The URL of a file: for the page about one on the hub, that of the file itself, at the hub that is in use."""
        place = self._on_hub(reference.strip())
        return reference if place is None or not place.is_file else self._url_of(place, place.path)

    def _on_hub(self, reference: str) -> _Place | None:
        """What is meant on the hub, or on the one that ours stands for; None for a URL of its own."""
        if (name := _REPOSITORY.fullmatch(reference)) is not None:
            return _Place(name[1], name[2] or MAIN, "", is_file=False)
        hub = next((hub for hub in (self.hub, PUBLIC_HUB) if reference.startswith(hub + "/")), None)
        if hub is None:
            return None
        path = urllib.parse.urlsplit(reference.removeprefix(hub)).path.strip("/")
        owner, name_, kind, revision, *rest = [*map(urllib.parse.unquote, path.split("/")), "", "", ""]
        inner, repository = "/".join(filter(None, rest)), f"{owner}/{name_}"
        if not _REPOSITORY.fullmatch(repository) or ".." in rest:
            return None
        if kind in ("blob", "resolve") and inner:
            return _Place(repository, revision, inner, is_file=True)
        if kind in ("", "tree"):
            return _Place(repository, revision or MAIN, inner, is_file=False)
        return None

    def _url_of(self, place: _Place, path: str) -> str:
        revision = urllib.parse.quote(place.revision, safe="")
        return f"{self.hub}/{place.repository}/resolve/{revision}/{urllib.parse.quote(path)}"

    def _repository(self, place: _Place, family: str, poll: Poll) -> BaseFiles:
        prefix = f"{place.path}/" if place.path else ""
        at = "" if place.revision == MAIN else f"/revision/{urllib.parse.quote(place.revision, safe='')}"
        url = f"{self.hub}/api/models/{place.repository}{at}"
        listing = self.cache.fetch(url, _check_json, poll, sniff=_anything)
        try:
            names = [str(entry["rfilename"]) for entry in json.loads(listing.path.read_text())["siblings"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UnsuitableFile("is a repository whose list of files cannot be read") from error

        def get(path: str) -> WeightFile:
            if path.endswith(".json"):
                return self.cache.fetch(self._url_of(place, prefix + path), _check_json, poll, sniff=_anything)
            return self.cache.fetch(self._url_of(place, prefix + path), read_header, poll)

        present = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
        return _collected(place.repository, present, get, family)

    def _on_disk(self, name: str, family: str) -> BaseFiles:
        folder, file = self.folder / name, self.folder / f"{name.removesuffix('.safetensors')}.safetensors"
        if file.is_file():
            check_checkpoint(read_header(file), family)
            return BaseFiles(name=name, files={CHECKPOINT: file_on_disk(file)})
        if not folder.is_dir():
            raise UnsuitableFile("is not known: give a URL, a repository owner/name, or a name this server has")
        present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        return _collected(name, present, lambda path: file_on_disk(folder / path), family)


def _collected(name: str, present: set[str], get: Get, family: str) -> BaseFiles:
    """The parts of a repository or folder; what tells its family is looked at before gigabytes are fetched.

    Raises:
        UnsuitableFile: It has none that can be used, or is of another family.
    """
    chosen = {part: paths for part, stems in PARTS.items() if (paths := _first(stems, present))}
    if UNET not in chosen:
        only = _only_checkpoint(present, get)
        file = get(only)
        check_checkpoint(read_header(file.path), family)
        return BaseFiles(name=name, files={CHECKPOINT: file})
    if UNET_CONFIG in present:
        check_unet_config(json.loads(get(UNET_CONFIG).path.read_text()), family)
    files: dict[str, WeightFile] = {}
    shards: dict[str, tuple[WeightFile, ...]] = {}
    for part, (first, *others) in chosen.items():
        files[part] = get(first)
        if part == UNET and not others:
            check_unet(read_header(files[part].path), family)
        shards[part] = tuple(map(get, others))
    if SCHEDULER_CONFIG in present:
        files["scheduler"] = get(SCHEDULER_CONFIG)
    return BaseFiles(name=name, files=files, shards={part: more for part, more in shards.items() if more})


def _first(stems: tuple[str, ...], present: set[str]) -> list[str]:
    """The files of a part: whole, else complete in shards, in full precision before half; none if it is not there."""
    for stem in stems:
        for variant in VARIANTS:
            if f"{stem}{variant}.safetensors" in present:
                return [f"{stem}{variant}.safetensors"]
        for variant in VARIANTS:
            if found := _in_shards(stem, variant, present):
                return found
    return []


def _in_shards(stem: str, variant: str, present: set[str]) -> list[str]:
    number = r"-(\d{5})-of-(\d{5})"
    either = rf"(?:{re.escape(variant)}{number}|{number}{re.escape(variant)})" if variant else number
    shards = {
        name: match for name in present if (match := re.fullmatch(rf"{re.escape(stem)}{either}\.safetensors", name))
    }
    total = {int(next(filter(None, reversed(match.groups())))) for match in shards.values()}
    return sorted(shards) if total == {len(shards)} else []


def _only_checkpoint(present: set[str], get: Get) -> str:
    """The one safetensors file at the root, where there are no parts.

    Raises:
        UnsuitableFile: There is none, or one of several would have to be chosen.
    """
    single = sorted(name for name in present if "/" not in name and name.endswith(".safetensors"))
    if len(single) == 1:
        return single[0]
    if INDEX in present and any(name.startswith("transformer/") for name in present):
        kind = str(json.loads(get(INDEX).path.read_text()).get("_class_name", ""))[:80]
        raise UnsuitableFile(f"is a repository of {kind or 'a transformer model'}, not of Stable Diffusion 1.5 or SDXL")
    if single:
        listing = ", ".join(single[:5]) + (", …" if len(single) > 5 else "")
        raise UnsuitableFile(f"is a repository of several checkpoints ({listing}): give the address of one of them")
    if any(name.endswith(PICKLES) for name in present):
        raise UnsuitableFile(
            "is a repository whose weights are pickles only (.bin, .ckpt), which can run code when they are read: give "
            "one with safetensors"
        )
    raise UnsuitableFile(
        f"is not in diffusers' folder layout with safetensors: {PARTS[UNET][0]}.safetensors is missing. Give the "
        "address of one of its .safetensors files instead"
    )


def _anything(head: bytes) -> None:
    """JSON may begin with anything."""


def _check_json(path: Path) -> None:
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError("too large")
        if not isinstance(json.loads(path.read_text()), dict):
            raise ValueError("no table")
    except (ValueError, RecursionError) as error:
        raise UnsuitableFile("is not the JSON that a model hub sends") from error


def file_on_disk(path: Path) -> WeightFile:
    """A file of the operator's; what stands for its content is its place, size and time."""
    status = path.stat()
    told = f"{path}:{status.st_size}:{status.st_mtime_ns}"
    return WeightFile(path=path, name=path.name, sha256=hashlib.sha256(told.encode()).hexdigest())
