"""The weights that a caller brings (LoRA, embedding, base model): where they come from, and what they must be.

Uploads to this server and files elsewhere take the same way: through the cache of `weights.fetch`, which opens both
with the function here. Elsewhere means the guarded client of `inputs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import quote

from server.inputs import DownloadFailed, Fetcher, Patience, Reach, guarded_client
from server.schemas import BLOB
from server.settings import Settings
from server.storage import Storage, file_name_of, is_public
from weights import unpickle
from weights.detect import check_checkpoint, check_embedding, check_lora
from weights.fetch import Answer, FileTooLarge, Poll, WeightCache, WeightFile
from weights.header import Header, UnsuitableFile, read_header
from weights.hub import BaseFiles, BaseModels, file_on_disk

UNNAMED = "embedding"
"""The word for an embedding that came as a data URI, which has no name."""


class FileRefused(Exception):
    """A file that the request names for a parameter cannot be had or used; the cause says why."""

    def __init__(self, parameter: str, cause: Exception) -> None:
        super().__init__(f"The file for {parameter} {cause}." if isinstance(cause, UnsuitableFile) else str(cause))
        self.parameter, self.cause = parameter, cause


@dataclass(frozen=True)
class Stored:
    """An upload as an answer of a web server."""

    status_code: int
    headers: Mapping[str, str]
    chunks: Iterator[bytes]

    def iter_raw(self) -> Iterator[bytes]:
        """The bytes."""
        return self.chunks


class WeightFiles:
    """Files of weights by reference, for one slot.

    With `reads_disk` a reference may be the path of a file on this machine: for who sits at it, never for a caller.
    """

    def __init__(self, settings: Settings, storage: Storage, *, reads_disk: bool = False) -> None:
        self._storage, self._reads_disk = storage, reads_disk
        self._fetcher = Fetcher(
            guarded_client(Reach.naming(settings.fetch_allow_hosts)),
            max_bytes=0,
            timeout_s=settings.weights_timeout_s,
            tokens={host: token.get_secret_value() for host, token in settings.fetch_tokens.items()},
            keeps_tls=True,
        )
        self._cache = WeightCache(
            settings.fetched_weights_dir,
            open=self._open,
            interrupted=DownloadFailed,
            max_file_bytes=int(settings.max_weights_mb * 2**20),
            budget_bytes=int(settings.weights_cache_gb * 2**30),
            convert=unpickle.convert if settings.allow_pickles else None,
        )
        self._bases = BaseModels(self._cache, settings.hub, settings.base_models_dir)

    def holding(self) -> AbstractContextManager[None]:
        """Until the end of the block, what `get` has brought stays on disk, whatever others fetch."""
        return self._cache.holding()

    def get(self, files: Mapping[str, str], family: str, poll: Poll) -> dict[str, WeightFile | BaseFiles]:
        """The files of a job by parameter, within `weights_timeout_s` for all of them, however often one is tried.

        Args:
            files: References by parameter: `lora`, `embedding`, `base_model`.
            family: fal's name of the family that they must be for.
            poll: Called while others are waited for; may raise to stop.

        Raises:
            FileRefused: From what is wrong with one of them.
        """
        found: dict[str, WeightFile | BaseFiles] = {}
        patience = Patience.of(self._fetcher.timeout_s, poll)

        def wait_on() -> None:
            poll()
            if patience.is_over:
                raise DownloadFailed(f"it took longer than {self._fetcher.timeout_s:g} s")

        for parameter, reference in files.items():
            try:
                found[parameter] = self._get(parameter, reference, family, wait_on)
            except (UnsuitableFile, FileTooLarge, DownloadFailed) as error:
                raise FileRefused(parameter, error) from error
        return found

    def _get(self, parameter: str, reference: str, family: str, poll: Poll) -> WeightFile | BaseFiles:
        if self._reads_disk and (path := Path(reference).expanduser()).is_file():
            file = file_on_disk(path)
            if parameter != "base_model":
                CHECKS[parameter](read_header(path), family)
                return file
            check_checkpoint(read_header(path), family)
            return BaseFiles(name=file.name, files={"checkpoint": file})
        if parameter == "base_model":
            return self._bases.find(reference, family, poll)
        check, url = CHECKS[parameter], self._bases.address_of(reference)
        found = self._cache.fetch(url, lambda path: check(read_header(path), family), poll)
        has_no_name = url.startswith(BLOB) and not is_public(url.removeprefix(BLOB))
        return replace(found, name=UNNAMED) if has_no_name and parameter == "embedding" else found

    @contextmanager
    def _open(self, url: str, headers: Mapping[str, str], poll: Poll) -> Iterator[Answer]:
        if not url.startswith(BLOB):
            with self._fetcher.open(url, headers, poll) as response:
                yield response
            return
        key = url.removeprefix(BLOB)
        if headers.get("if-none-match") == key:
            yield Stored(304, {}, iter(()))
            return
        try:
            size, chunks = self._storage.chunks(key)
        except FileNotFoundError as error:
            raise DownloadFailed("the file is not kept here any more") from error
        name = quote(file_name_of(key))
        told = {"content-length": str(size), "etag": key, "content-disposition": f"filename*=UTF-8''{name}"}
        yield Stored(200, told, chunks)


CHECKS: Mapping[str, Callable[[Header, str], object]] = {
    "lora": check_lora,
    "embedding": lambda header, family: check_embedding(header),
}
"""What a file must be, by parameter; told the family by fal's name."""
