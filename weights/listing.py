"""What a model hub says of a repository: its newest commit, and the files of a part with their sizes and hashes.

huggingface_hub asks, so its rules for tokens, mirrors and proxies hold. Hubs that do not tell sizes along with names,
as some mirrors do not, are asked for each file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import httpx2

from weights.catalogue import IncompleteSource, Part, choose

T = TypeVar("T")
MAX_TRIES = 6
"""Times in a row that something may bring nothing."""
TIMEOUT_S = 30.0


class Failed(Exception):
    """A part cannot be had; the message says why and what to do."""


class Hub(NamedTuple):
    """A model hub or its mirror: URL without a slash at its end, and the token to show, if there is one."""

    url: str
    token: str | None


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file in a repository, and where in the part's folder it belongs; a hash that the hub did not say is None."""

    path: str
    source: str
    size_bytes: int
    sha256: str | None
    git_sha1: str | None

    @property
    def is_pickle(self) -> bool:
        """Whether it has to be converted."""
        return self.source.endswith(".bin") and self.path.endswith(".safetensors")


class Listing(NamedTuple):
    """A part in its repository at one commit."""

    revision: str
    license: str | None
    files: tuple[Remote, ...]


def listing_of(part: Part, hub: Hub, pause: Callable[[int], object]) -> Listing:
    """Ask for the newest commit of a part's repository and its files.

    Args:
        part: The part.
        hub: Whom to ask.
        pause: Waits before another try, told how many there were.

    Raises:
        Failed: The hub does not answer, does not let anybody in, or lacks files.
    """
    from huggingface_hub import HfApi

    api = HfApi(endpoint=hub.url, token=hub.token or False)
    info = _asked(part, hub, pause, lambda: api.model_info(part.repository, files_metadata=True, timeout=TIMEOUT_S))
    if info.gated and not hub.token:
        raise Failed(how_to_be_let_in(part, hub))
    siblings = {entry.rfilename: entry for entry in info.siblings or ()}
    try:
        chosen = choose(part, siblings)
    except IncompleteSource as error:
        raise Failed(f"{error} at {info.sha}, which has {', '.join(sorted(siblings)) or 'no files'}") from error
    revision = info.sha or "main"
    files = []
    for path, name in chosen.items():
        entry = siblings[name]
        size, sha256 = entry.size, entry.lfs.sha256 if entry.lfs else None
        git_sha1 = None if entry.lfs else entry.blob_id
        if size is None:
            size, sha256, git_sha1 = _size_and_hashes(part, hub, pause, revision, name)
        files.append(Remote(path=path, source=name, size_bytes=size, sha256=sha256, git_sha1=git_sha1))
    return Listing(revision, info.card_data.get("license") if info.card_data else None, tuple(files))


def _size_and_hashes(
    part: Part, hub: Hub, pause: Callable[[int], object], revision: str, name: str
) -> tuple[int, str | None, str | None]:
    """Size, SHA-256 and Git's SHA-1 of one file, from the headers of its address."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    url = hf_hub_url(part.repository, name, revision=revision, endpoint=hub.url)
    told = _asked(
        part,
        hub,
        pause,
        lambda: get_hf_file_metadata(url, token=hub.token or False, timeout=TIMEOUT_S, endpoint=hub.url),
    )
    if told.size is None:
        raise Failed(f"{hub.url} does not say how long {name} of {part.repository} is")
    tag = told.etag or ""
    is_sha256, is_sha1 = re.fullmatch(r"[0-9a-f]{64}", tag), re.fullmatch(r"[0-9a-f]{40}", tag)
    return told.size, tag if is_sha256 else None, tag if is_sha1 else None


def _asked(part: Part, hub: Hub, pause: Callable[[int], object], ask: Callable[[], T]) -> T:
    """The hub's answer; busy hubs and broken connections are tried again."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    for attempt in range(MAX_TRIES):
        try:
            return ask()
        except GatedRepoError as error:
            raise Failed(how_to_be_let_in(part, hub)) from error
        except RepositoryNotFoundError as error:
            raise Failed(f"{hub.url} does not know the repository {part.repository}") from error
        except OfflineModeIsEnabled as error:
            raise Failed("HF_HUB_OFFLINE is set: unset it to pull, or use `weights import`") from error
        except (HfHubHTTPError, httpx2.TransportError) as error:
            response: Any = getattr(error, "response", None)
            if (response is not None and not is_passing(response.status_code)) or attempt == MAX_TRIES - 1:
                reason = f"answered {response.status_code}" if response is not None else f"cannot be reached: {error}"
                raise Failed(
                    f"{hub.url} {reason}. Set HF_ENDPOINT to a mirror, or carry the files over and use `weights import`"
                ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise Failed(f"{hub.url} does not answer as a model hub does: {error}") from error
        pause(attempt)
    raise AssertionError("the last try returns or raises")


def how_to_be_let_in(part: Part, hub: Hub) -> str:
    """What to do about a gated repository."""
    what = "the account of your token has not been let in" if hub.token else "no token is set"
    return (
        f"{part.repository} is gated ({part.license}) and {what}. Accept the license at {hub.url}/{part.repository}, "
        f"make a token with read access at {hub.url}/settings/tokens, and set HF_TOKEN or run `hf auth login`"
    )


def is_passing(status: int) -> bool:
    """Whether a status says to try again."""
    return status in (408, 425, 429) or status >= 500
