"""Which set of weights serves, and where its parts lie on disk.

Two sets share one layout: a folder per part, each in the layout its stock class reads (`from_pretrained`).
`pocket` is part of this package; `full`, the published models of `weights.catalogue`, lies under `<data>/weights/full`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from weights.catalogue import CREATIVE, DEFAULT_FLUX_PROFILE, ENDPOINT_PARTS, FLUX_PROFILES, OWN_PARTS, PARTS, needs_of
from weights.lock import LockUnreadable, read_lock, sha256_of

POCKET_FOLDER = Path(__file__).parent / "pocket" / "models"


class WeightsMissing(Exception):
    """Files of the chosen set are not on disk.

    `files` names those that the first endpoint lacks, relative to the set's folder.
    """

    def __init__(self, name: str, folder: Path, files: list[str]) -> None:
        listing = "\n  ".join(files)
        way_out = (
            f"Get those of every endpoint with `creative-upscaler weights pull`, those of one with e.g. "
            f"`{pull_command(CREATIVE)}`, or start with --weights pocket to serve the small built-in set."
            if name == "full"
            else "Install the package again."
        )
        super().__init__(f"The {name} weights are incomplete in {folder}. Missing:\n  {listing}\n{way_out}")
        self.name, self.folder, self.files = name, folder, files


def pull_command(endpoint: str) -> str:
    """The command that fetches the weights of an endpoint."""
    return f"creative-upscaler weights pull {endpoint}"


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
        """Where a part of the catalogue, or a folder in one, lies: `vae`, `sd15`, `flux1-dev/vae`."""
        assert {part, part.partition("/")[0]} & (PARTS.keys() | OWN_PARTS), f"{part} is not in the catalogue"
        return self.root / part

    def has(self, part: str) -> bool:
        """Whether a part is there; of the full set's, whether nothing of it is missing."""
        if self.name == "full" and part in PARTS:
            return not PARTS[part].missing(self.root)
        return self.folder(part).is_dir()

    def missing(self, endpoint: str = CREATIVE, flux_profile: str = DEFAULT_FLUX_PROFILE) -> list[str]:
        """The files that an endpoint cannot do without and that are not on disk, relative to the set's folder."""
        # The built-in set has other names for the parts of Flux, and comes as a whole.
        needs = needs_of(CREATIVE if self.name == "pocket" else endpoint, flux_profile)
        return [file for part in needs.required for file in PARTS[part].missing(self.root)]

    def digest(self) -> dict[str, str]:
        """SHA-256 of every safetensors file, by its path relative to the set's folder.

        Those in the lock file are believed while their size is the same; the others are read.
        """
        try:
            lock = read_lock(self.root)
        except LockUnreadable:
            lock = {}
        known = {f"{name}/{path}": file for name, part in lock.items() for path, file in part.files.items()}
        digest = {}
        for path in sorted(self.root.rglob("*.safetensors")):
            name = str(path.relative_to(self.root))
            if name.startswith("."):
                continue  # a download that is not complete
            is_known = name in known and known[name].size_bytes == path.stat().st_size
            digest[name] = known[name].sha256 if is_known else sha256_of(path)
        return digest


def open_store(choice: str, *, root: Path, has_cuda: bool) -> WeightStore:
    """Choose a set and check that its files are there: of the full set, those of one endpoint at least.

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
    if all(store.missing(endpoint, profile) for endpoint in ENDPOINT_PARTS for profile in FLUX_PROFILES):
        raise WeightsMissing(store.name, store.root, store.missing())
    return store
