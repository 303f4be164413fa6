"""Weights by URL: once over the network, whole or not at all, within a budget."""

from __future__ import annotations

import io
import os
import pickle
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save

from server.inputs import DownloadFailed, Fetcher, Reach, guarded_client
from tests.weights.file_server import FileServer, Page, serving
from weights import unpickle
from weights.fetch import FileTooLarge, WeightCache, WeightFile
from weights.header import UnsuitableFile, read_header

GOOD = save({"a": torch.arange(50_000, dtype=torch.float32)})
OTHER = save({"a": torch.ones(50_000)})


@pytest.fixture
def files() -> Iterator[FileServer]:
    with serving({"/good.safetensors": Page(GOOD, etag='"1"'), "/other.safetensors": Page(OTHER, etag='"2"')}) as files:
        yield files


def cache(
    tmp_path: Path, files: FileServer, *, tokens: Mapping[str, str] | None = None, reach: Any = None, **options: Any
) -> WeightCache:
    fetcher = Fetcher(
        guarded_client(reach or Reach.naming([files.address])), max_bytes=1, timeout_s=20, tokens=tokens or {}
    )
    defaults: dict[str, Any] = {"max_file_bytes": 10**6, "budget_bytes": 10**7, "fresh_s": 0.0}
    return WeightCache(tmp_path / "cache", open=fetcher.open, interrupted=DownloadFailed, **defaults | options)


def kept(tmp_path: Path) -> list[str]:
    """The files that are kept, complete or not, besides the notes on URLs and the locks."""
    return sorted(
        path.name
        for folder in ("blobs", "partial")
        for path in (tmp_path / "cache" / folder).rglob("*")
        if path.is_file()
    )


def test_a_file_is_downloaded_once(tmp_path: Path, files: FileServer) -> None:
    """The second time the server is only asked whether the file has changed; a fresh one is not asked about at all."""
    first = cache(tmp_path, files).fetch(files.url("/good.safetensors"), read_header)
    second = cache(tmp_path, files).fetch(files.url("/good.safetensors"), read_header)
    third = cache(tmp_path, files, fresh_s=60).fetch(files.url("/good.safetensors"), read_header)

    assert first == second == third
    assert first.path.read_bytes() == GOOD and (first.name, first.stem) == ("good.safetensors", "good")
    assert [headers.get("if-none-match") for _, headers in files.seen] == [None, '"1"']
    assert kept(tmp_path) == [first.path.name]


def test_a_changed_file_is_fetched_again(tmp_path: Path, files: FileServer) -> None:
    """A URL stands for what is there now."""
    weights = cache(tmp_path, files)
    weights.fetch(files.url("/good.safetensors"), read_header)
    files.pages["/good.safetensors"] = Page(OTHER, etag='"3"')

    assert weights.fetch(files.url("/good.safetensors"), read_header).path.read_bytes() == OTHER


def test_a_file_that_was_here_serves_while_its_host_is_gone(tmp_path: Path, files: FileServer) -> None:
    """A host that does not answer does not stop what is on disk."""
    weights = cache(tmp_path, files)
    weights.fetch(files.url("/good.safetensors"), read_header)
    files.pages.clear()

    assert weights.fetch(files.url("/good.safetensors"), read_header).path.read_bytes() == GOOD


def test_a_broken_download_is_resumed(tmp_path: Path, files: FileServer) -> None:
    """Connections that break are taken up where they ended, as long as it is the same file."""
    files.pages["/good.safetensors"].breaks = [70_000, 70_000]

    found = cache(tmp_path, files).fetch(files.url("/good.safetensors"), read_header)

    assert found.path.read_bytes() == GOOD
    assert len(files.seen) == 3
    assert all(headers["range"].startswith("bytes=") for _, headers in files.seen[1:])
    assert {headers["if-range"] for _, headers in files.seen[1:]} == {'"1"'}


def test_a_file_that_changed_meanwhile_begins_anew(tmp_path: Path, files: FileServer) -> None:
    """Two halves of different files are never put together."""
    weights = cache(tmp_path, files)

    def stop_after_some() -> None:
        if any((tmp_path / "cache" / "partial").glob("*.json")) and kept(tmp_path):
            raise KeyboardInterrupt

    files.pages["/good.safetensors"].breaks = [70_000]
    with pytest.raises(KeyboardInterrupt):
        weights.fetch(files.url("/good.safetensors"), read_header, stop_after_some)
    files.pages["/good.safetensors"] = Page(OTHER, etag='"9"')

    assert weights.fetch(files.url("/good.safetensors"), read_header).path.read_bytes() == OTHER


def test_a_host_that_brings_nothing_is_given_up(tmp_path: Path, files: FileServer) -> None:
    """Trying again needs progress."""
    files.pages["/good.safetensors"].breaks = [0] * 20

    with pytest.raises(DownloadFailed):
        cache(tmp_path, files).fetch(files.url("/good.safetensors"), read_header)

    assert len(files.seen) == 1


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        (Page(b"<!DOCTYPE html><html>" + b"x" * 100), "web page"),
        (Page(pickle.dumps({"a": 1}, protocol=2) + b"0" * 100), "pickle"),
        (Page(GOOD[:-5]), "cut off"),
        (Page(GOOD + b"more"), "4 bytes more"),
        (Page((10 * 2**30).to_bytes(8, "little") + b"{" + b" " * 100), "not a safetensors file"),
        (Page(GOOD, headers={"Content-Encoding": "gzip"}), "compressed"),
        (Page(b"{}"), "2 bytes"),
    ],
)
def test_nothing_is_kept_of_a_bad_file(tmp_path: Path, files: FileServer, page: Page, reason: str) -> None:
    """What is not a file of weights leaves no trace on disk."""
    files.pages["/bad"] = page

    with pytest.raises(UnsuitableFile, match=reason):
        cache(tmp_path, files).fetch(files.url("/bad"), read_header)

    assert kept(tmp_path) == []


@pytest.mark.parametrize("announces_length", [True, False])
def test_a_file_above_the_limit_is_refused(tmp_path: Path, files: FileServer, announces_length: bool) -> None:
    """By its announcement, or while it streams; and nothing of it is kept."""
    files.pages["/good.safetensors"].announces_length = announces_length

    with pytest.raises(FileTooLarge) as caught:
        cache(tmp_path, files, max_file_bytes=100_000).fetch(files.url("/good.safetensors"), read_header)

    assert caught.value.max_bytes == 100_000
    assert kept(tmp_path) == []


def test_the_budget_evicts_what_was_not_used_for_longest(tmp_path: Path, files: FileServer) -> None:
    """Together the files stay below the budget."""
    files.pages["/third.safetensors"] = Page(save({"b": torch.ones(50_000)}))
    weights = cache(tmp_path, files, budget_bytes=450_000, fresh_s=60)
    first, second = (weights.fetch(files.url(f"/{name}.safetensors"), read_header) for name in ("good", "other"))
    os.utime(first.path, (1, 1))
    weights.fetch(files.url("/good.safetensors"), read_header)
    os.utime(second.path, (2, 2))

    third = weights.fetch(files.url("/third.safetensors"), read_header)

    assert kept(tmp_path) == sorted([first.path.name, third.path.name])


def test_many_who_want_a_file_share_one_download(tmp_path: Path, files: FileServer) -> None:
    """Threads, and processes alike, wait for whoever came first."""
    found: list[WeightFile] = []
    threads = [
        threading.Thread(
            target=lambda: found.append(
                cache(tmp_path, files, fresh_s=60).fetch(files.url("/good.safetensors"), read_header)
            )
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(found) == 4 and len({file.path for file in found}) == 1
    assert len(files.seen) == 1


def test_a_token_is_for_its_host_alone(tmp_path: Path, files: FileServer, caplog: pytest.LogCaptureFixture) -> None:
    """A redirect to another host does not carry it, and neither disk nor log know it."""
    caplog.set_level("DEBUG")
    with serving({"/cdn": Page(GOOD)}) as elsewhere:
        files.pages["/gated"] = Page(status=302, headers={"Location": elsewhere.url("/cdn")})
        weights = cache(
            tmp_path,
            files,
            tokens={files.address: "hush-hush"},
            reach=Reach.naming([files.address, elsewhere.address]),
        )

        weights.fetch(files.url("/gated"), read_header)

        assert files.seen[0][1]["authorization"] == "Bearer hush-hush"
        assert "authorization" not in elsewhere.seen[0][1]
    assert "hush-hush" not in caplog.text
    assert not any(b"hush" in path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file())


def test_private_addresses_are_out_of_reach(tmp_path: Path, files: FileServer) -> None:
    """Weights are fetched through the same guard as pictures."""
    with pytest.raises(DownloadFailed, match="not public"):
        cache(tmp_path, files, reach=Reach(ports=None)).fetch(files.url("/good.safetensors"), read_header)

    assert files.seen == []


@pytest.mark.parametrize(
    ("path", "disposition", "name"),
    [
        ("/api/7?type=Model", 'attachment; filename="add detail.safetensors"', "add detail.safetensors"),
        ("/api/7", "attachment; filename*=UTF-8''caf%C3%A9.pt", "café.pt"),
        ("/models/my%20style.safetensors?download=true", "", "my style.safetensors"),
        ("/x", 'attachment; filename="../../etc/passwd"', "passwd"),
    ],
)
def test_files_are_called_what_their_host_calls_them(
    tmp_path: Path, files: FileServer, path: str, disposition: str, name: str
) -> None:
    """The name decides the word that an embedding answers to."""
    headers = {"Content-Disposition": disposition.encode().decode("latin-1")} if disposition else {}
    files.pages[path.partition("?")[0]] = Page(GOOD, headers=headers)

    assert cache(tmp_path, files).fetch(files.url(path), read_header).name == name


class Malicious:
    """A pickle of this makes a folder when it is read without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


def pickled(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def test_a_pickle_is_converted_where_the_operator_allows_it(tmp_path: Path, files: FileServer) -> None:
    """Another process turns an A1111 embedding into safetensors; what runs code is refused and has not run."""
    vectors = torch.randn(3, 768)
    files.pages["/word.pt"] = Page(pickled({"string_to_param": {"*": vectors}, "name": "word", "step": 5}))
    files.pages["/evil.pt"] = Page(pickled({"a": torch.ones(3), "b": Malicious(tmp_path / "made")}))
    weights = cache(tmp_path, files, convert=unpickle.convert)

    found = weights.fetch(files.url("/word.pt"), read_header)
    with pytest.raises(UnsuitableFile, match="more than tensors"):
        weights.fetch(files.url("/evil.pt"), read_header)

    with safe_open(found.path, framework="pt") as tensors:
        assert torch.equal(tensors.get_tensor("emb_params"), vectors)
    assert found.stem == "word"
    assert not (tmp_path / "made").exists()
    assert kept(tmp_path) == [found.path.name]


def test_a_pickle_of_tensors_larger_than_itself_is_refused(tmp_path: Path, files: FileServer) -> None:
    """One number can be repeated without end in a pickle; it would be written out in full."""
    files.pages["/bomb.pt"] = Page(pickled({"emb_params": torch.zeros(1).expand(2**24)}))

    with pytest.raises(UnsuitableFile, match="cannot be read"):
        cache(tmp_path, files, convert=unpickle.convert).fetch(files.url("/bomb.pt"), read_header)


def test_a_conversion_can_be_stopped(tmp_path: Path) -> None:
    """Who cancels does not wait for the other process, which is ended."""
    (tmp_path / "x.pt").write_bytes(pickled({"a": torch.ones(3)}))
    before = psutil.Process().children()

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpickle.convert(tmp_path / "x.pt", tmp_path / "x.safetensors", stop)

    assert psutil.Process().children() == before
    assert not (tmp_path / "x.safetensors").exists()
