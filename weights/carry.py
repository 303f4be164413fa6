"""Files that an operator carried over, for machines without a model hub; and what nobody needs any more.

A folder may be a set that was pulled elsewhere (its lock file is believed and compared), a cache of huggingface_hub, a
repository as it was cloned or downloaded, or just files: parts are recognised by the names of repositories and parts
in paths, by the names of files, and by what their configs say.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from weights.catalogue import OWN_PARTS, PARTS, File, IncompleteSource, Part, choose, is_recognised
from weights.header import UnsuitableFile, read_header
from weights.lock import LOCK_FILE, LockedPart, is_whole, read_lock, sha256_of
from weights.placing import PARTIAL, SPARE_BYTES, NoSpace, Staged, is_complete, only_one, place, staging

MAX_DEPTH = 6
COPIES = "import"
"""Where files wait that are not compared yet, apart from downloads that were."""
SKIPPED = {".git", "blobs", ".cache", PARTIAL}
_SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)")
_LFS_POINTER = b"version https://git-lfs"


@dataclass(frozen=True, kw_only=True)
class Found:
    """A part in a folder: `files` by their path in the part's folder."""

    part: Part
    base: Path
    files: Mapping[str, Path]
    sources: Mapping[str, str]
    locked: LockedPart | None
    revision: str | None

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(file.stat().st_size for file in self.files.values())


# -- recognising -------------------------------------------------------------------------------------------------------


def recognise(folder: Path) -> list[Found]:
    """The parts in a folder and what lies in it, each at its likeliest place."""
    folder = folder.absolute()
    places = list(_places(folder))
    found = []
    for part in PARTS.values():
        candidates = [each for base, names in places for each in _candidates(part, base, names)]
        if candidates:
            found.append(min(candidates, key=lambda each: (_rank(each), len(each.base.parts))))
    return found


def _places(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Every folder in a folder, with the files in and below it by their path from there."""
    files = []
    for top, folders, names in os.walk(folder, followlinks=True):
        depth = len(Path(top).relative_to(folder).parts)
        folders[:] = [] if depth >= MAX_DEPTH else sorted(set(folders) - SKIPPED)
        files += [Path(top, name) for name in names]
    for base in sorted({folder} | {above for file in files for above in file.parents if above.is_relative_to(folder)}):
        yield base, [file.relative_to(base).as_posix() for file in files if file.is_relative_to(base)]


def _candidates(part: Part, base: Path, names: Sequence[str]) -> Iterator[Found]:
    """A part as its repository has it, or as the set has it, if it is in a folder."""
    lock = _lock_above(base, part)
    for layout in (part, as_placed(part)):
        try:
            chosen = choose(layout, names)
        except IncompleteSource:
            continue
        configs = {path: _json(base / name) for path, name in chosen.items() if path in part.marks}
        if is_recognised(part, configs, base.as_posix()):
            snapshot = _SNAPSHOT.search(base.as_posix())
            yield Found(
                part=layout,
                base=base,
                files={path: base / name for path, name in chosen.items()},
                sources=chosen,
                locked=lock,
                revision=lock.revision if lock else snapshot["revision"] if snapshot else None,
            )


def as_placed(part: Part) -> Part:
    """A part in the layout that it has in a set: under the names that loaders open, converted already."""
    files = tuple(File(path) for path in part.made) or tuple(replace(file, sources=()) for file in part.files)
    return replace(part, files=files, converted="", made=())


def _is_named(part: Part, base: Path) -> bool:
    """Whether a folder's path says which part it is."""
    path = f"/{base.as_posix().lower()}/"
    owner, name = part.repository.lower().split("/")
    return any(f"/{each}/" in path for each in (part.folder, name, f"{owner}--{name}", f"models--{owner}--{name}"))


def _rank(found: Found) -> int:
    if found.locked is not None:
        return 0
    return 1 if _is_named(found.part, found.base) else 2


def _lock_above(base: Path, part: Part) -> LockedPart | None:
    """What the lock file of the set says in which a folder is a part."""
    root = base
    for _ in part.folder.split("/"):
        root = root.parent
    if root / part.folder != base:
        return None
    return read_lock(root).get(part.folder)


# -- importing ---------------------------------------------------------------------------------------------------------


def bring(
    found: Sequence[Found],
    root: Path,
    note: Callable[[str], None],
    came: Callable[[int], None] = lambda num_bytes: None,
) -> list[str]:
    """Copy recognised parts into a set, compare them with what is known of them, and lock them.

    Args:
        found: See `recognise`.
        root: Folder of the set.
        note: Told of each part.
        came: Told of bytes as they are copied.

    Returns:
        What failed, one message for each part.

    Raises:
        NoSpace: Before anything is copied.
    """
    failures = []
    with only_one(root, note):
        lock = read_lock(root)
        wanted = []
        for each in found:
            if is_complete(PARTS[each.part.folder], root, lock):
                note(f"{each.part.folder}: is there already, kept")
            else:
                wanted.append(each)
        _check_space([each for each in wanted if not each.base.is_relative_to(root)], root)
        for each in wanted:
            try:
                note(f"{each.part.folder}: {_brought(each, root, came)}")
            except (UnsuitableFile, OSError) as error:
                failures.append(f"{each.part.folder}: {error}")
            finally:
                shutil.rmtree(root / PARTIAL / COPIES, ignore_errors=True)
    return failures


def _check_space(found: Sequence[Found], root: Path) -> None:
    needed = sum(each.size_bytes * (2 if each.part.converted else 1) for each in found)
    free = shutil.disk_usage(root).free
    if needed and needed + SPARE_BYTES > free:
        raise NoSpace(
            f"{needed / 1e9:.1f} GB are needed in {root}; {free / 1e9:.1f} GB are free, of which 1 GB is left alone. "
            "Nothing was copied."
        )


def _brought(found: Found, root: Path, came: Callable[[int], None]) -> str:
    """Copy one part; returns what is to be said of it."""
    part, folder = found.part, root / PARTIAL / COPIES
    was_known = True
    staged: dict[str, Staged] = {}
    names = {path: locked.source for path, locked in found.locked.files.items()} if found.locked else {}
    in_place = all(file == root / part.folder / path for path, file in found.files.items())
    for path, file in found.files.items():
        target = file
        if not in_place:
            is_pickle = file.name.endswith(".bin") and path.endswith(".safetensors")
            target = folder / (f"{path}.bin" if is_pickle else path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            came(target.stat().st_size)
        was_known = _check(target, file, path, found) and was_known
        staged[path] = Staged(target, names.get(path, found.sources[path]))
    place(
        part,
        root,
        staged,
        revision=found.revision,
        license=found.locked.license if found.locked else None,
        poll=lambda: None,
        made_from=found.locked.made_from if found.locked else None,
    )
    told = "" if was_known else "; nothing tells its hashes: they are recorded as they are"
    return f"imported from {found.base}{told}"


def _check(file: Path, origin: Path, path: str, found: Found) -> bool:
    """Whether a file has the hash that is known of it; whether one was known.

    Raises:
        UnsuitableFile: It has another, or is damaged.
    """
    with file.open("rb") as stream:
        if stream.read(len(_LFS_POINTER)) == _LFS_POINTER:
            raise UnsuitableFile(f"{origin} is a pointer of Git LFS, not the file: run `git lfs pull` there")
    sha256, git_sha1 = _known_hashes(origin, path, found)
    if sha256 is not None and (actual := sha256_of(file)) != sha256:
        raise UnsuitableFile(f"{origin} has changed: SHA-256 is {actual}, expected {sha256}")
    if git_sha1 is not None:
        content = file.read_bytes()
        if hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() != git_sha1:
            raise UnsuitableFile(f"{origin} has changed: it is not the Git object {git_sha1}")
    if path.endswith(".safetensors") and file.suffix == ".safetensors":
        try:
            read_header(file)
        except UnsuitableFile as error:
            raise UnsuitableFile(f"{origin} {error}") from error
    if path.endswith(".json") and _json(file) is None:
        raise UnsuitableFile(f"{origin} is not JSON")
    return sha256 is not None or git_sha1 is not None


def _known_hashes(origin: Path, path: str, found: Found) -> tuple[str | None, str | None]:
    """SHA-256 and Git's SHA-1 of a file, as far as its surroundings tell."""
    if found.locked is not None and path in found.locked.files:
        return found.locked.files[path].sha256, None
    told = os.path.realpath(origin).rpartition("/")[2] if _SNAPSHOT.search(origin.as_posix()) else ""
    metadata = found.base / ".cache/huggingface/download" / f"{origin.relative_to(found.base).as_posix()}.metadata"
    if metadata.is_file():
        told = (metadata.read_text().splitlines() + ["", ""])[1].strip()
    if re.fullmatch(r"[0-9a-f]{64}", told):
        return told, None
    return None, told if re.fullmatch(r"[0-9a-f]{40}", told) else None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


# -- pruning -----------------------------------------------------------------------------------------------------------


class Leftover(NamedTuple):
    """A file that nothing refers to."""

    path: Path
    size_bytes: int


def leftovers(root: Path) -> list[Leftover]:
    """What neither the catalogue nor the lock file refers to.

    Kept are folders with the names of parts, those made by hand included; of a part that was pulled or imported, only
    what came with it. Downloads that were not finished are kept until their part is complete.
    """
    lock = read_lock(root)
    whole = {name for name, part in lock.items() if is_whole(root, name, part)}
    kept = {root / name / path for name, part in lock.items() for path in part.files}
    kept |= {above for file in kept for above in file.parents}  # a link to another disk is a folder as well
    unlocked = [root / name for name in (PARTS.keys() | OWN_PARTS) - lock.keys()]
    unfinished = [staging(root, part) for part in PARTS.values() if part.folder not in whole]
    found = []
    for file in sorted(path for path in root.rglob("*") if path.is_file() or path.is_symlink()):
        if file in kept or file in (root / LOCK_FILE, root / ".lock"):
            continue
        if any(file.is_relative_to(folder) for folder in unlocked + unfinished):
            continue
        found.append(Leftover(file, file.lstat().st_size))
    return found


def remove(root: Path, found: Sequence[Leftover]) -> None:
    """Delete leftovers, and the folders that are empty then."""
    for leftover in found:
        leftover.path.unlink(missing_ok=True)
        for folder in leftover.path.parents:
            if folder == root or any(folder.iterdir()):
                break
            folder.rmdir()
