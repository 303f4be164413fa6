"""`creative-upscaler weights`: the published models on this machine. Loads no torch.

Exit status: 0 when all that was asked for is there and right, 1 when something is not, 2 for a command that cannot be
meant, 130 when Ctrl-C stopped it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

from server.settings import Settings
from weights.carry import bring, leftovers, recognise, remove
from weights.catalogue import BY_HAND, PARTS, Part, endpoints_using, parts_for
from weights.listing import Hub
from weights.lock import LockedPart, faults, read_lock, size_of
from weights.placing import is_complete, only_one, staging
from weights.pull import pull

INTERRUPTED = 130
LINE_EVERY_S = 30.0
"""Between two lines about a download where nobody watches a bar."""
LITTLE_BYTES = 10**7
"""So much is done before anybody could read of it."""

Data = Annotated[Path | None, typer.Option(help="Folder of everything that is kept.", show_default=False)]
Names = Annotated[
    list[str] | None,
    typer.Argument(metavar="[ENDPOINT]...", help="Endpoints, or parts as `list` names them; all unless given."),
]


def weights_commands() -> typer.Typer:
    """`list`, `pull`, `verify`, `import` and `prune`."""
    commands = typer.Typer(help="The published models: fetch, check and list them.", no_args_is_help=True)
    commands.command("list")(list_parts)
    commands.command("pull")(pull_parts)
    commands.command("verify")(verify_parts)
    commands.command("import")(import_folder)
    commands.command("prune")(prune_set)
    return commands


def list_parts(
    names: Names = None,
    as_json: Annotated[bool, typer.Option("--json", help="With files and alternatives, for programs.")] = False,
    data: Data = None,
) -> None:
    """Say of every model what it is, whether it is here, how large it is and what its license allows."""
    settings = settings_at(data)
    root = settings.full_weights_dir
    lock = read_lock(root)
    parts = parts_for(names, settings.full_flux_profile) if names else list(PARTS.values())
    if as_json:
        typer.echo(json.dumps([told_of(part, root, lock) for part in parts], indent=1))
        return
    table = Table("part", "state", "GB", "license", "commercial use", "gated", "repository", "used by", box=None)
    for part in parts:
        used_by = ", ".join(endpoint.partition("/")[2] for endpoint in endpoints_using(part.folder))
        size = size_of([lock[part.folder]]) if part.folder in lock else part.size_bytes
        table.add_row(
            part.folder,
            state_of(part, root, lock),
            f"{size / 1e9:.2f}",
            escape(part.license),
            part.commercial,
            "yes" if part.gated else "no",
            part.repository,
            used_by,
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 400  # a line per part, for programs
    console.print(table)
    for name, purpose in BY_HAND.items():
        if (root / name).is_dir() or not names:
            state = "present" if (root / name).is_dir() else "not there"
            typer.echo(f" {name}: {state}; by hand only: {purpose}")
    typer.echo(f"Folder: {root}")


def told_of(part: Part, root: Path, lock: dict[str, LockedPart]) -> dict[str, Any]:
    """All that is known of a part."""
    revision = lock[part.folder].revision if part.folder in lock else None
    return {
        "part": part.folder,
        "title": part.title,
        "state": state_of(part, root, lock),
        "repository": part.repository,
        "revision": revision,
        "files": [file.path for file in part.files],
        "size_bytes": size_of([lock[part.folder]]) if part.folder in lock else part.size_bytes,
        "license": part.license,
        "commercial_use": part.commercial,
        "gated": part.gated,
        "alternatives": part.alternatives,
        "endpoints": endpoints_using(part.folder),
    }


def state_of(part: Part, root: Path, lock: dict[str, LockedPart]) -> str:
    """A part's state in a word or two."""
    if part.folder in lock:
        return "present" if is_complete(part, root, lock) else "damaged"
    if not part.missing(root):
        return "present, by hand"
    return "unfinished" if staging(root, part).is_dir() else "missing"


def pull_parts(
    names: Names = None,
    update: Annotated[bool, typer.Option("--update", help="Fetch the newest commit of what is there, too.")] = False,
    data: Data = None,
) -> None:
    """Fetch what is missing, resume what was interrupted; then nothing is asked of the network any more.

    Models of flux-vision-upscaler: as UPSCALER_FLUX_PROFILE says. HF_ENDPOINT names a mirror, HF_TOKEN a token.
    """
    settings = settings_at(data)
    parts = parts_for(names or (), settings.full_flux_profile)
    root = settings.full_weights_dir
    with stoppable("What came so far is kept: the same command goes on from there."), watched() as report:
        failures = pull(parts, root, Hub(settings.hub, token_for(settings)), report, update=update)
    finish(failures, f"{len(parts)} parts are complete in {root}.")


def token_for(settings: Settings) -> str | None:
    """The token to show to the hub: the setting's for its host, else huggingface_hub's (HF_TOKEN, `hf auth login`)."""
    from huggingface_hub import get_token

    host = urlsplit(settings.hub).hostname or ""
    own = settings.fetch_tokens.get(host)
    return own.get_secret_value() if own else get_token()


def verify_parts(names: Names = None, data: Data = None) -> None:
    """Read every file that was pulled or imported and compare it with its SHA-256; names what is wrong."""
    settings = settings_at(data)
    root = settings.full_weights_dir
    lock = read_lock(root)
    wanted = {part.folder for part in parts_for(names, settings.full_flux_profile)} if names else lock.keys()
    chosen = {name: part for name, part in lock.items() if name in wanted}
    failures = [f"{name}: was neither pulled nor imported" for name in sorted(wanted - lock.keys())] if names else []
    if not lock:
        failures = [f"Nothing was pulled into or imported to {root}."]
    with stoppable("Nothing was changed."), watched() as report:
        report.total(size_of(chosen.values()), 0)
        failures += [f"{fault.path} {fault.reason}" for fault in faults(root, chosen, report.came)]
    count = sum(len(part.files) for part in chosen.values())
    advice = "Delete the files that are named and run `creative-upscaler weights pull`." if lock else ""
    finish(failures, f"{count} files are as they came, {size_of(chosen.values()) / 1e9:.2f} GB.", advice)


def import_folder(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="What was carried here.", exists=True)],
    data: Data = None,
) -> None:
    """Take models out of a folder: a set pulled elsewhere, a cache of huggingface_hub, repositories, or their files."""
    root = settings_at(data).full_weights_dir
    found = recognise(folder)
    if not found:
        finish([f"{folder} holds no model that is known here. `creative-upscaler weights list` names them."], "")
    with stoppable("Parts that were complete are kept."), watched() as report:
        report.total(sum(each.size_bytes for each in found), 0)
        failures = bring(found, root, report.note, report.came)
    finish(failures, f"{len(found)} parts are complete in {root}.")


def prune_set(
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    data: Data = None,
) -> None:
    """Delete what neither the catalogue nor the lock file refers to; says first what and how much."""
    root = settings_at(data).full_weights_dir
    if not root.is_dir():
        finish([], "Nothing to delete.")
    with stoppable("What was not deleted yet is kept."), only_one(root, say):
        found = leftovers(root)
        for leftover in found:
            typer.echo(f"{leftover.size_bytes / 1e6:12.3f} MB  {leftover.path.relative_to(root)}")
        if not found:
            finish([], "Nothing to delete.")
        told = f"{len(found)} files, {sum(each.size_bytes for each in found) / 1e9:.3f} GB, in {root}"
        if not yes and not (sys.stdin.isatty() and typer.confirm(f"Delete {told}?")):
            finish([f"Nothing was deleted ({told}). Say so with --yes."], "")
        remove(root, found)
    finish([], f"Deleted {told}.")


# -- what people see ---------------------------------------------------------------------------------------------------


def settings_at(data: Path | None) -> Settings:
    """The settings, with the folder that the command line names."""
    given: dict[str, Any] = {} if data is None else {"data": data}
    return Settings(**given)


def say(text: str) -> None:
    """A line on standard error."""
    Console(stderr=True, highlight=False, soft_wrap=True, markup=False).print(text)


def finish(failures: Sequence[str], success: str, advice: str = "") -> NoReturn:
    """Say how it went and exit."""
    for failure in failures:
        say(f"error: {failure}")
    if failures and advice:
        say(advice)
    if not failures:
        typer.echo(success)
    raise typer.Exit(1 if failures else 0)


@contextmanager
def stoppable(kept: str) -> Iterator[None]:
    """Ctrl-C ends the command with a status of its own and says what is kept; a folder of another user's is named."""
    try:
        yield
    except (KeyboardInterrupt, typer.Abort):
        say(f"stopped. {kept}")
        raise typer.Exit(INTERRUPTED) from None
    except PermissionError as error:
        finish([f"This user may not read or change {error.filename}: run this as the server's user."], "")


class Watch:
    """Bars for people at a terminal, now and then a line otherwise; see `weights.pull.Report`."""

    def __init__(self, bars: Progress | None) -> None:
        self._bars = bars
        self._task = None if bars is None else bars.add_task("weights", total=None)
        self._total = self._done = 0
        self._last_line = time.monotonic()

    def note(self, text: str) -> None:
        """A line."""
        if self._bars is None:
            say(text)
        else:
            self._bars.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def total(self, num_bytes: int, present: int) -> None:
        """How much there is to do, and is done."""
        self._total, self._done = num_bytes, present
        if self._bars is not None and self._task is not None:
            self._bars.update(self._task, total=num_bytes, completed=present)
        elif num_bytes > present + LITTLE_BYTES:
            self.note(f"{(num_bytes - present) / 1e9:.2f} GB of {num_bytes / 1e9:.2f} GB to do")

    def came(self, num_bytes: int) -> None:
        """Some more was done."""
        self._done += num_bytes
        if self._bars is not None and self._task is not None:
            self._bars.advance(self._task, num_bytes)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.note(f"{self._done / 1e9:.2f} of {self._total / 1e9:.2f} GB")

    def finished(self, part: Part) -> None:
        """A part is complete."""
        self.note(f"{part.folder}: complete ({part.repository}, {part.license})")


@contextmanager
def watched() -> Iterator[Watch]:
    """What shows how far a command is, on standard error."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        yield Watch(None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as bars:
        yield Watch(bars)
