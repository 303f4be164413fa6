"""Servers that lie, disks that are full, files that others need: downloads of weights under adverse conditions."""

from __future__ import annotations

import gzip
import hashlib
import ssl
import threading
from collections import namedtuple
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save

from server.inputs import DownloadFailed, Fetcher, Reach, guarded_client
from server.settings import Settings
from server.storage import Storage
from server.tls import ensure_certificates
from server.weight_files import FileRefused, WeightFiles
from tests.weights.file_server import FileServer, Page, answering, serving
from tests.weights.test_fetch import GOOD, OTHER, cache, kept
from weights import shelf
from weights.header import UnsuitableFile, read_header

HALF = len(GOOD) // 2
DiskUsage = namedtuple("DiskUsage", "total used free")


def answer(status: str, body: bytes, **headers: object) -> bytes:
    """What goes over the wire; underscores in names of headers stand for dashes."""
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "Connection: close", "", ""]).encode() + body


def chunked(body: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:HALF], body[HALF:], b""))


def whole(body: bytes, etag: str) -> bytes:
    return answer("200 OK", body, ETag=etag, Content_Length=len(body))


BROKEN = answer("200 OK", GOOD[:HALF], ETag='"1"', Content_Length=len(GOOD))
UNSATISFIABLE = answer("416 Range Not Satisfiable", b"", Content_Range=f"bytes */{len(GOOD)}", Content_Length=0)


def rest(body: bytes, etag: str, begin: int = HALF) -> bytes:
    """The answer to a request for the rest of a file."""
    told = f"bytes {begin}-{len(body) - 1}/{len(body)}"
    return answer("206 Partial Content", body[begin:], ETag=etag, Content_Range=told, Content_Length=len(body) - begin)


RESUMED = {
    "the rest": ([BROKEN, rest(GOOD, '"1"')], GOOD),
    "the rest of another file": ([BROKEN, rest(OTHER, '"2"'), whole(OTHER, '"2"')], OTHER),
    "another part": ([BROKEN, rest(GOOD, '"1"', begin=HALF + 8), whole(GOOD, '"1"')], GOOD),
    "everything": ([BROKEN, whole(OTHER, '"2"')], OTHER),
    "no such part": ([BROKEN, UNSATISFIABLE, whole(GOOD, '"1"')], GOOD),
    "broken again": ([BROKEN, rest(GOOD, '"1"')[:-1000], rest(GOOD, '"1"', begin=len(GOOD) - 1000)], GOOD),
}


@pytest.mark.parametrize("kind", RESUMED)
def test_what_was_begun_is_completed_or_begun_anew(tmp_path: Path, kind: str) -> None:
    """Whatever a server answers to a request for the rest, two files are never put together."""
    answers, expected = RESUMED[kind]

    with answering(*answers) as files:
        found = cache(tmp_path, files).fetch(files.url("/x.safetensors"), read_header)

        assert found.path.read_bytes() == expected
        assert len(files.seen) == len(answers) and files.seen[1][1]["if-range"] == '"1"'


def test_a_file_in_chunks_needs_no_length(tmp_path: Path) -> None:
    """How long it is shows when it ends."""
    with answering(answer("200 OK", chunked(GOOD), Transfer_Encoding="chunked")) as files:
        assert cache(tmp_path, files).fetch(files.url("/x.safetensors"), read_header).path.read_bytes() == GOOD


LIES = {
    "a length too short": (answer("200 OK", GOOD, Content_Length=len(GOOD) - 100), UnsuitableFile, "cut off"),
    "a length too long": (answer("200 OK", GOOD, Content_Length=len(GOOD) + 100), DownloadFailed, "closed"),
    "a last chunk that is missing": (
        answer("200 OK", chunked(GOOD)[:-5], Transfer_Encoding="chunked"),
        DownloadFailed,
        "closed",
    ),
    "always another part": (rest(GOOD, '"1"'), UnsuitableFile, "contradicts itself"),
    "never a part": (UNSATISFIABLE, UnsuitableFile, "contradicts itself"),
    "compressed": (answer("200 OK", gzip.compress(GOOD), Content_Encoding="gzip"), UnsuitableFile, "compressed"),
    "nothing": (answer("204 No Content", b""), UnsuitableFile, "0 bytes"),
    "not the web": (b"SSH-2.0-OpenSSH_9.2\r\n", DownloadFailed, "Failed"),
    "a loop": (answer("302 Found", b"", Location="/x.safetensors"), DownloadFailed, "redirects"),
    "a gate": (answer("401 Unauthorized", b"", Content_Length=0), DownloadFailed, "UPSCALER_FETCH_TOKENS"),
}


@pytest.mark.parametrize("kind", LIES)
def test_a_server_that_lies_is_found_out(tmp_path: Path, kind: str) -> None:
    """The reason is told, and no file comes of it."""
    wire, error, reason = LIES[kind]

    with answering(wire) as files, pytest.raises(error, match=reason):
        cache(tmp_path, files).fetch(files.url("/x.safetensors"), read_header)

    assert kept(tmp_path) == []


def test_https_does_not_lead_to_plain_http(tmp_path: Path) -> None:
    """What was asked for in safety is not brought by a way on which anybody could change it."""
    certificates = ensure_certificates(Settings(data=tmp_path))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates.chain, certificates.key)
    trust = ssl.create_default_context(cafile=str(certificates.ca_bundle))
    with serving({"/x.safetensors": Page(GOOD)}) as plain, serving({}, tls=context) as safe:
        safe.pages["/moved"] = Page(status=302, headers={"Location": plain.url("/x.safetensors")})
        client = guarded_client(Reach.naming([plain.address, safe.address]), verify=trust)
        fetcher = Fetcher(client, max_bytes=1, timeout_s=20, keeps_tls=True)

        with (
            pytest.raises(DownloadFailed, match="from HTTPS to plain HTTP"),
            fetcher.open(f"https://{safe.address}/moved", {}),
        ):
            pytest.fail("was opened")

        assert plain.seen == []


def test_all_tries_together_have_one_limit_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that hangs up again and again gets no more time than one that is slow."""
    ticks = count()
    monkeypatch.setattr("server.inputs.time", SimpleNamespace(monotonic=lambda: next(ticks)))
    parts = [BROKEN[:4000], *(rest(GOOD, '"1"', begin=begin)[:4000] for begin in range(0, HALF, 1000))]
    with answering(*parts) as files:
        settings = Settings(data=tmp_path, fetch_allow_hosts=[files.address], weights_timeout_s=30)
        weights = WeightFiles(settings, Storage.open(settings))

        with pytest.raises(FileRefused, match="longer than 30 s"):
            weights.get({"lora": files.url("/x.safetensors"), "embedding": files.url("/y.pt")}, "SD_1_5", lambda: None)

    assert next(ticks) < 60


@pytest.mark.parametrize("announces_length", [True, False])
def test_a_disk_that_is_full_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, announces_length: bool
) -> None:
    """Before the download where its length is known, else while it comes; nothing of it stays."""
    monkeypatch.setattr(shelf.shutil, "disk_usage", lambda folder: DiskUsage(10**12, 10**12, shelf.SPARE_BYTES + 1000))
    page = Page(GOOD, announces_length=announces_length)

    with serving({"/x": page}) as files, pytest.raises(UnsuitableFile, match="no disk space"):
        cache(tmp_path, files).fetch(files.url("/x"), read_header)

    assert kept(tmp_path) == []


def test_a_disk_that_others_fill_meanwhile_is_said_so(tmp_path: Path) -> None:
    """The write that fails is no fault of ours."""
    with serving({"/x.safetensors": Page(GOOD)}) as files:
        weights = cache(tmp_path, files)
        key = hashlib.sha256(files.url("/x.safetensors").encode()).hexdigest()
        weights._shelf.partial(key).symlink_to("/dev/full")

        with pytest.raises(UnsuitableFile, match="disk, which is full"):
            weights.fetch(files.url("/x.safetensors"), read_header)

    assert kept(tmp_path) == []


@pytest.fixture
def files() -> Iterator[FileServer]:
    pages = {f"/{number}.safetensors": Page(save({"a": torch.full((50_000,), number)})) for number in range(4)}
    with serving(pages) as files:
        yield files


def test_notes_and_locks_do_not_pile_up(tmp_path: Path, files: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger who asks for one file under many addresses does not fill the disk."""
    monkeypatch.setattr(shelf, "MAX_NOTES", 5)
    weights = cache(tmp_path, files)

    for number in range(12):
        weights.fetch(files.url(f"/0.safetensors?{number}"), read_header)

    assert list((tmp_path / "cache" / "locks").iterdir()) == []
    assert len(list((tmp_path / "cache" / "index").iterdir())) <= 6
    assert len(kept(tmp_path)) == 1


def test_nothing_is_deleted_that_a_request_is_using(tmp_path: Path, files: FileServer) -> None:
    """From the download until the models are loaded others may fetch what they like; afterwards it is its turn."""
    options: dict[str, Any] = {"budget_bytes": 450_000, "fresh_s": 60}
    mine, others = cache(tmp_path, files, **options), cache(tmp_path, files, **options)

    with mine.holding():
        held = [mine.fetch(files.url(f"/{number}.safetensors"), read_header).path for number in (0, 1)]
        others.fetch(files.url("/2.safetensors"), read_header)
        assert all(path.is_file() for path in held)
    last = others.fetch(files.url("/3.safetensors"), read_header).path

    assert not any(path.is_file() for path in held) and last.is_file()
    assert sum(path.stat().st_size for path in last.parent.parent.rglob("*.safetensors")) <= 450_000


def test_a_file_that_is_deleted_in_between_is_fetched_again(tmp_path: Path, files: FileServer) -> None:
    """What was there a moment ago need not be there now."""
    weights = cache(tmp_path, files, fresh_s=60)
    found = weights.fetch(files.url("/0.safetensors"), read_header)
    real, gone = weights._shelf.hold, [found.path]

    def hold(sha256: str) -> Path | None:
        while gone:
            gone.pop().unlink()
        return real(sha256)

    weights._shelf.hold = hold  # type: ignore[method-assign]

    assert weights.fetch(files.url("/0.safetensors"), read_header).path.is_file()
    assert len(files.seen) == 2


def test_one_after_the_other_has_a_key(tmp_path: Path) -> None:
    """The lock's file comes and goes, and still no two are busy with a key at once."""
    shelves = [shelf.Shelf(tmp_path, 10**6) for _ in range(4)]
    busy: list[int] = []
    most: list[int] = []

    def work(one: shelf.Shelf) -> None:
        for number in range(5):
            with one.only_one("key", lambda: None):
                busy.append(number)
                most.append(len(busy))
                busy.pop()

    threads = [threading.Thread(target=work, args=(one,)) for one in shelves]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(most) == 20 and max(most) == 1
