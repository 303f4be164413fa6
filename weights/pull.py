"""Fetches parts of the catalogue from a model hub, so that whatever stops it, nothing is fetched twice.

```
<set>/.partial/<part>/plan.json     the commit that was resolved, and its files with their sizes and hashes
<set>/.partial/<part>/files/x.part  what came of x so far
<set>/.partial/<part>/files/x       x, complete and compared with its hash
<set>/<part>/x, weights.lock.json   moved here, and locked, when all of the part is there
```

huggingface_hub tells what is in a repository and which token to show. It does not download: from version 2 on it throws
away what came of a file when it is interrupted. A part that is complete is never asked for again.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol
from urllib.parse import quote

import httpx2

from weights import unpickle
from weights.catalogue import IncompleteSource, Part, choose
from weights.header import UnsuitableFile
from weights.lock import LockedFile, LockedPart, is_whole, locked_file, read_lock, sha256_of, write_json, write_lock

PARTIAL = ".partial"
NUM_STREAMS = 6
"""Files that come at a time."""
MAX_TRIES = 6
"""Times in a row that a file may bring nothing."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0
TIMEOUT_S = 30.0
SPARE_BYTES = 2**30
"""Disk space that is left to others."""
LOCK_POLL_S = 0.2


class Failed(Exception):
    """A part cannot be had; the message says why and what to do."""


class NoSpace(Exception):
    """The disk is too small for what was asked for; nothing was fetched."""


class Hub(NamedTuple):
    """A model hub or its mirror: URL without a slash at its end, and the token to show, if there is one."""

    url: str
    token: str | None


class Report(Protocol):
    """Who is told how far it is."""

    def note(self, text: str) -> None:
        """Something that people may want to know."""

    def total(self, num_bytes: int, present: int) -> None:
        """So many bytes will be there at the end, so many are."""

    def came(self, num_bytes: int) -> None:
        """So many bytes more; fewer, when some had to be thrown away."""

    def finished(self, part: Part) -> None:
        """A part is complete."""


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file in a repository, and where in the part's folder it belongs; what the hub did not say is None."""

    path: str
    source: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None

    @property
    def is_pickle(self) -> bool:
        """Whether it has to be converted."""
        return self.source.endswith(".bin") and self.path.endswith(".safetensors")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is fetched of a part, at one commit."""

    part: Part
    root: Path
    revision: str
    license: str | None
    files: tuple[Remote, ...]

    @property
    def folder(self) -> Path:
        """Where files wait until all are there."""
        return staging(self.root, self.part)

    def staged(self, file: Remote) -> Path:
        """Where a complete file waits."""
        return self.folder / "files" / (f"{file.path}.bin" if file.is_pickle else file.path)

    def missing_bytes(self) -> int:
        """What has to come."""
        return sum(file.size_bytes - self.present_bytes(file) for file in self.files)

    def present_bytes(self, file: Remote) -> int:
        """What is there of a file."""
        if self.placed(file):
            return file.size_bytes
        return min(file.size_bytes, max(_size(self.staged(file)), _size(_partial(self.staged(file)))))

    def placed(self, file: Remote) -> Path | None:
        """Where the set has a file of this name and size already; None where it has none."""
        path = self.root / self.part.folder / file.path
        as_it_comes = not (file.is_pickle or self.part.converted)
        return path if as_it_comes and path.is_file() and _size(path) == file.size_bytes else None

    def converted_bytes(self) -> int:
        """What conversions will write, about."""
        return sum(file.size_bytes for file in self.files if file.is_pickle or self.part.converted)


def staging(root: Path, part: Part) -> Path:
    """Where the files of a part wait."""
    return root / PARTIAL / part.folder.replace("/", "--")


@contextmanager
def only_one(root: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Wait until no other process changes the set, and be the one that does."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / ".lock").open("w") as lock:
        told = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    note(f"another process is changing {root}: waiting for it")
                    told = True
                time.sleep(LOCK_POLL_S)
        yield


def pull(
    parts: Sequence[Part],
    root: Path,
    hub: Hub,
    report: Report,
    *,
    update: bool = False,
    first_wait_s: float = FIRST_WAIT_S,
) -> list[str]:
    """Fetch parts that are not complete; one that fails does not stop the others.

    Args:
        parts: What is wanted.
        root: Folder of the set.
        hub: From where.
        report: Who is told.
        update: Ask for the newest commit of parts that are complete as well.
        first_wait_s: Before the second try of something that broke; doubled each time.

    Returns:
        What failed, one message for each part; empty when all is there.

    Raises:
        NoSpace: Before anything is fetched.
    """
    with only_one(root, report.note):
        lock = read_lock(root)
        wanted = []
        for part in parts:
            is_locked = part.folder in lock and is_whole(root, part.folder, lock[part.folder])
            if is_locked and not update:
                shutil.rmtree(staging(root, part), ignore_errors=True)
                continue
            if part.folder not in lock and not part.missing(root) and not staging(root, part).is_dir():
                report.note(f"{part.folder}: was put there by hand, kept (`weights import` records its hashes)")
                continue
            wanted.append(part)
        if not wanted:
            return []
        return asyncio.run(_Pull(root, hub, report, first_wait_s).run(wanted))


class _Pull:
    """One run: plans, checks the disk, downloads, moves into place."""

    def __init__(self, root: Path, hub: Hub, report: Report, first_wait_s: float) -> None:
        self.root, self.hub, self.report, self.first_wait_s = root, hub, report, first_wait_s
        self.streams = asyncio.Semaphore(NUM_STREAMS)
        self.placing = asyncio.Lock()  # the lock file is read and written anew for each part
        self.stopped = threading.Event()

    async def run(self, parts: Sequence[Part]) -> list[str]:
        """Fetch parts; returns what failed."""
        planned = await asyncio.gather(*(self._or_failure(part, self._planned(part)) for part in parts))
        plans = [plan for plan in planned if isinstance(plan, Plan)]
        failures = [failure for failure in planned if isinstance(failure, str)]
        self._check_space(plans)
        present = sum(plan.present_bytes(file) for plan in plans for file in plan.files)
        self.report.total(present + sum(plan.missing_bytes() for plan in plans), present)
        timeout = httpx2.Timeout(TIMEOUT_S)
        headers = {"accept-encoding": "identity"}
        if self.hub.token:
            headers["authorization"] = f"Bearer {self.hub.token}"
        try:
            async with httpx2.AsyncClient(follow_redirects=True, timeout=timeout, headers=headers) as client:
                done = await asyncio.gather(*(self._or_failure(plan.part, self._got(client, plan)) for plan in plans))
        finally:
            self.stopped.set()
        return failures + [failure for failure in done if isinstance(failure, str)]

    async def _or_failure(self, part: Part, work: Any) -> Any:
        try:
            return await work
        except (Failed, UnsuitableFile, OSError) as error:
            return f"{part.folder}: {error}"

    def _poll(self, *_: object) -> None:
        if self.stopped.is_set():
            raise Failed("stopped")

    # -- what there is -------------------------------------------------------------------------------------------------

    async def _planned(self, part: Part) -> Plan:
        """The plan of an earlier run, else a new one."""
        saved = staging(self.root, part) / "plan.json"
        try:
            content = json.loads(saved.read_text(encoding="utf-8"))
            files = tuple(Remote(**file) for file in content["files"])
            if content["repository"] == part.repository:
                return Plan(
                    part=part, root=self.root, revision=content["revision"], license=content["license"], files=files
                )
        except (OSError, ValueError, KeyError, TypeError):
            pass
        plan = await asyncio.to_thread(self._resolved, part)
        plan.folder.mkdir(parents=True, exist_ok=True)
        described = [asdict(file) for file in plan.files]
        write_json(
            saved,
            {"repository": part.repository, "revision": plan.revision, "license": plan.license, "files": described},
        )
        return plan

    def _resolved(self, part: Part) -> Plan:
        """Ask the hub for the newest commit of a repository and its files."""
        info = self._repository(part)
        if info.gated and not self.hub.token:
            raise Failed(self._how_to_be_let_in(part))
        siblings = {entry.rfilename: entry for entry in info.siblings or ()}
        try:
            chosen = choose(part, siblings)
        except IncompleteSource as error:
            raise Failed(f"{error} at {info.sha}, which has {', '.join(sorted(siblings)) or 'no files'}") from error
        if lengthless := [name for name in chosen.values() if siblings[name].size is None]:
            raise Failed(f"{self.hub.url} does not say how long {lengthless[0]} is")
        files = []
        for path, name in chosen.items():
            entry = siblings[name]
            sha256 = entry.lfs.sha256 if entry.lfs else None
            git_sha1 = None if entry.lfs else entry.blob_id
            files.append(Remote(path=path, source=name, size_bytes=entry.size, sha256=sha256, git_sha1=git_sha1))
        license = info.card_data.get("license") if info.card_data else None
        return Plan(part=part, root=self.root, revision=str(info.sha), license=license, files=tuple(files))

    def _repository(self, part: Part) -> Any:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

        api = HfApi(endpoint=self.hub.url, token=self.hub.token or False)
        for attempt in range(MAX_TRIES):
            try:
                return api.model_info(part.repository, files_metadata=True, timeout=TIMEOUT_S)
            except GatedRepoError as error:
                raise Failed(self._how_to_be_let_in(part)) from error
            except RepositoryNotFoundError as error:
                raise Failed(f"{self.hub.url} does not know the repository {part.repository}") from error
            except OfflineModeIsEnabled as error:
                raise Failed("HF_HUB_OFFLINE is set: unset it to pull, or use `weights import`") from error
            except (HfHubHTTPError, httpx2.TransportError) as error:
                response = getattr(error, "response", None)
                if (response is not None and not _is_passing(response.status_code)) or attempt == MAX_TRIES - 1:
                    reason = (
                        f"answered {response.status_code}" if response is not None else f"cannot be reached: {error}"
                    )
                    raise Failed(
                        f"{self.hub.url} {reason}. Set HF_ENDPOINT to a mirror, or carry the files over and use "
                        "`weights import`"
                    ) from error
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise Failed(f"{self.hub.url} does not answer as a model hub does: {error}") from error
            self.stopped.wait(self._wait_s(attempt))
        raise AssertionError("the last try returns or raises")

    def _how_to_be_let_in(self, part: Part) -> str:
        what = "the account of your token has not been let in" if self.hub.token else "no token is set"
        return (
            f"{part.repository} is gated ({part.license}) and {what}. Accept the license at "
            f"{self.hub.url}/{part.repository}, make a token with read access at {self.hub.url}/settings/tokens, and "
            "set HF_TOKEN or run `hf auth login`"
        )

    def _check_space(self, plans: Sequence[Plan]) -> None:
        missing = sum(plan.missing_bytes() for plan in plans)
        needed = missing + sum(plan.converted_bytes() for plan in plans)
        free = shutil.disk_usage(self.root).free
        if needed and needed + SPARE_BYTES > free:
            raise NoSpace(
                f"{needed / 1e9:.1f} GB are needed in {self.root} ({missing / 1e9:.1f} GB to fetch); "
                f"{free / 1e9:.1f} GB are free, of which 1 GB is left alone. Nothing was fetched: make room, choose "
                "another folder (UPSCALER_WEIGHTS_DIR), or pull fewer endpoints."
            )

    # -- downloads -----------------------------------------------------------------------------------------------------

    async def _got(self, client: httpx2.AsyncClient, plan: Plan) -> None:
        """Fetch all files of a part, small ones first: they show soonest that the hub lets nobody in."""
        files = sorted(plan.files, key=lambda file: file.size_bytes)
        fetched = await asyncio.gather(*(self._fetched(client, plan, file) for file in files), return_exceptions=True)
        if failed := next((error for error in fetched if error is not None), None):
            raise failed
        async with self.placing:
            await asyncio.to_thread(self._placed, plan)
        self.report.finished(plan.part)

    async def _fetched(self, client: httpx2.AsyncClient, plan: Plan, file: Remote) -> None:
        staged = plan.staged(file)
        async with self.streams:
            partial = _partial(staged)
            partial.parent.mkdir(parents=True, exist_ok=True)
            if staged.is_file() or await asyncio.to_thread(self._is_placed, plan, file):
                return
            for _ in range(2):
                partial.touch()
                await self._completed(client, plan, file, partial)
                if await asyncio.to_thread(self._is_right, partial, file):
                    partial.replace(staged)
                    return
                self.report.came(-_size(partial))
                partial.unlink()
        raise Failed(f"{file.source} of {plan.part.repository} came twice with other contents than the hub announced")

    async def _completed(self, client: httpx2.AsyncClient, plan: Plan, file: Remote, partial: Path) -> None:
        """Take up a download as often as each try brings something."""
        url = f"{self.hub.url}/{plan.part.repository}/resolve/{plan.revision}/{quote(file.source)}"
        fruitless = 0
        while (before := _size(partial)) < file.size_bytes:
            wait_s = None
            try:
                wait_s = await self._continued(client, plan, url, file, partial)
                reason = "it ended early"
            except httpx2.TransportError as error:
                reason = str(error) or type(error).__name__
            fruitless = 0 if _size(partial) > before else fruitless + 1
            if fruitless >= MAX_TRIES:
                raise Failed(f"{file.source} of {plan.part.repository} breaks off again and again: {reason}")
            if _size(partial) < file.size_bytes:
                await asyncio.sleep(wait_s or self._wait_s(fruitless))

    async def _continued(
        self, client: httpx2.AsyncClient, plan: Plan, url: str, file: Remote, partial: Path
    ) -> float | None:
        """Append what comes; returns seconds to wait where the server asks for patience."""
        present = _size(partial)
        headers = {"range": f"bytes={present}-"} if present else {}
        async with client.stream("GET", url, headers=headers) as answer:
            if _is_passing(answer.status_code):
                asked = answer.headers.get("retry-after", "")
                return min(float(asked), LONGEST_WAIT_S) if asked.isdecimal() else None
            self._check_answer(plan, file, answer)
            if answer.status_code == 416 or not _goes_on(answer, present):
                self.report.came(-present)
                partial.write_bytes(b"")
                if answer.status_code != 200:
                    return None
            with partial.open("ab", buffering=0) as sink:
                async for chunk in answer.aiter_bytes():
                    sink.write(chunk)
                    self.report.came(len(chunk))
                    if sink.tell() > file.size_bytes:
                        raise Failed(f"{file.source} of {plan.part.repository} is longer than the hub announced")
                os.fsync(sink.fileno())
        return None

    def _check_answer(self, plan: Plan, file: Remote, answer: httpx2.Response) -> None:
        part, status = plan.part, answer.status_code
        if status in (200, 206, 416):
            return
        if status in (401, 403):
            raise Failed(self._how_to_be_let_in(part))
        if status == 404:
            # Another run shall ask for the newest commit.
            (plan.folder / "plan.json").unlink(missing_ok=True)
            raise Failed(f"{part.repository} has no {file.source} at {plan.revision} any more: pull again")
        raise Failed(f"{self.hub.url} answered {status} for {file.source} of {part.repository}")

    def _is_placed(self, plan: Plan, file: Remote) -> bool:
        """Whether the set has the file already; it is staged then, without moving it from under a server's feet."""
        placed = plan.placed(file)
        if placed is None or not self._is_right(placed, file):
            return False
        try:
            os.link(placed, plan.staged(file))
        except OSError:
            shutil.copyfile(placed, plan.staged(file))
        return True

    def _is_right(self, path: Path, file: Remote) -> bool:
        """Whether a complete file has the hash that the hub announced."""
        if _size(path) != file.size_bytes:
            return False
        if file.sha256 is not None:
            return sha256_of(path, self._poll) == file.sha256
        if file.git_sha1 is not None:
            content = path.read_bytes()
            return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest() == file.git_sha1
        return True

    def _wait_s(self, attempt: int) -> float:
        return min(self.first_wait_s * 2.0**attempt, LONGEST_WAIT_S)

    # -- into place ----------------------------------------------------------------------------------------------------

    def _placed(self, plan: Plan) -> None:
        """Convert what has to be, move all into the set, lock it."""
        staged = {file.path: plan.staged(file) for file in plan.files}
        sources = {file.path: file.source for file in plan.files}
        place(plan.part, self.root, staged, sources, revision=plan.revision, license=plan.license, poll=self._poll)
        shutil.rmtree(plan.folder)


def place(
    part: Part,
    root: Path,
    staged: dict[str, Path],
    sources: dict[str, str],
    *,
    revision: str | None,
    license: str | None,
    poll: Callable[[], None],
) -> None:
    """Move the complete files of a part into the set, converted where it says so, and lock them.

    Args:
        part: The part.
        root: Folder of the set.
        staged: Files by their path in the part's folder, in a folder of their own on the same disk; all are taken away.
        sources: Their names in the repository.
        revision: The commit, if known.
        license: What the hub said.
        poll: Called now and then; may raise to stop.

    Raises:
        UnsuitableFile: A conversion refuses a file.
    """
    made_from = {}
    files = {path: (file, sources[path]) for path, file in staged.items()}
    for path, (file, source) in list(files.items()):
        if file.name.endswith(".safetensors.bin"):
            made_from[source] = locked_file(file, source)
            files[path] = (file.with_suffix(""), "")
            unpickle.convert(file, file.with_suffix(""), poll)
    if part.converted:
        made_from = {source: locked_file(file, source) for file, source in files.values()}
        made = _converted(part, [file for file, _ in files.values()], staging(root, part) / "made", poll)
        files = {path: (made / path, "") for path in part.made}
    locked = {path: locked_file(file, source) for path, (file, source) in files.items()}
    for path, (file, _) in files.items():
        target = root / part.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)
    entry = LockedPart(
        repository=part.repository, revision=revision, license=license, files=locked, made_from=made_from
    )
    write_lock(root, read_lock(root) | {part.folder: entry})


def _converted(part: Part, files: Sequence[Path], made: Path, poll: Callable[[], None]) -> Path:
    """Run a part's conversion in a process of its own, which takes its memory with it."""
    shutil.rmtree(made, ignore_errors=True)
    command = [sys.executable, "-m", "weights.convert", part.converted, *map(str, files), str(made)]
    here = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        while True:
            poll()
            try:
                _, complaint = process.communicate(timeout=0.5)
                break
            except subprocess.TimeoutExpired:
                continue
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        last = (complaint.strip().splitlines() or ["without a word"])[-1]
        raise UnsuitableFile(f"{part.repository} could not be converted: {last}")
    return made


def _is_passing(status: int) -> bool:
    """Whether a status says to try again."""
    return status in (408, 425, 429) or status >= 500


def _goes_on(answer: httpx2.Response, present: int) -> bool:
    """Whether an answer continues what is there."""
    if answer.status_code == 206:
        return answer.headers.get("content-range", "").startswith(f"bytes {present}-")
    return present == 0


def _partial(staged: Path) -> Path:
    return staged.with_name(f"{staged.name}.part")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


__all__ = ["PARTIAL", "Failed", "Hub", "LockedFile", "NoSpace", "Report", "only_one", "place", "pull", "staging"]
