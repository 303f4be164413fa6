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
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import httpx2

from weights.catalogue import Part
from weights.header import UnsuitableFile
from weights.listing import MAX_TRIES, TIMEOUT_S, Failed, Hub, Remote, how_to_be_let_in, is_passing, listing_of
from weights.lock import read_lock, sha256_of, write_json
from weights.placing import SPARE_BYTES, NoSpace, Staged, is_complete, only_one, place, staging

NUM_STREAMS = 6
"""Files that come at a time."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 60.0


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
            if is_complete(part, root, lock) and not update:
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
        try:
            return await self._run(parts)
        finally:
            self.stopped.set()

    async def _run(self, parts: Sequence[Part]) -> list[str]:
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
        async with httpx2.AsyncClient(follow_redirects=True, timeout=timeout, headers=headers) as client:
            done = await asyncio.gather(*(self._or_failure(plan.part, self._got(client, plan)) for plan in plans))
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
        listing = listing_of(part, self.hub, lambda attempt: self.stopped.wait(self._wait_s(attempt)))
        return Plan(part=part, root=self.root, revision=listing.revision, license=listing.license, files=listing.files)

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
            if await asyncio.to_thread(self._is_there, plan, file):
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
            except httpx2.RequestError as error:
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
            if is_passing(answer.status_code):
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
                await asyncio.to_thread(os.fsync, sink.fileno())
        return None

    def _check_answer(self, plan: Plan, file: Remote, answer: httpx2.Response) -> None:
        part, status = plan.part, answer.status_code
        if status in (200, 206, 416):
            return
        if status in (401, 403):
            raise Failed(how_to_be_let_in(part, self.hub))
        if status == 404:
            # Another run shall ask for the newest commit.
            (plan.folder / "plan.json").unlink(missing_ok=True)
            raise Failed(f"{part.repository} has no {file.source} at {plan.revision} any more: pull again")
        raise Failed(f"{self.hub.url} answered {status} for {file.source} of {part.repository}")

    def _is_there(self, plan: Plan, file: Remote) -> bool:
        """Whether a file is staged, or in the set; then it is staged without moving it from under a server's feet."""
        if plan.staged(file).is_file():
            if self._is_right(plan.staged(file), file):
                return True
            plan.staged(file).unlink()  # of another commit
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
        staged = {file.path: Staged(plan.staged(file), file.source, file.sha256) for file in plan.files}
        place(plan.part, self.root, staged, revision=plan.revision, license=plan.license, poll=self._poll)
        shutil.rmtree(plan.folder)


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
