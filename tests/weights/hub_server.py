"""A model hub on loopback, with the second host that its large files are redirected to, and the faults of both.

It answers what huggingface.co answers: the list of a repository's files with sizes and hashes, a commit in every
address, Git's hash as ETag of small files, redirects with `X-Linked-*` headers for large ones, ranges, 401 with
`X-Error-Code: GatedRepo` where nobody was let in. Bytes are counted as they are sent.
"""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".model", ".pth")
CHUNK_BYTES = 16 * 1024


@dataclass
class Repository:
    """A repository: its files, and whether strangers are let in."""

    files: dict[str, bytes]
    gated: bool = False
    license: str = "mit"
    sizes: dict[str, int] = field(default_factory=dict)  # what is said of files, where it is not true

    @property
    def revision(self) -> str:
        """Its newest commit, which is another one when its files are."""
        told = b"".join(name.encode() + hashlib.sha256(self.files[name]).digest() for name in sorted(self.files))
        return hashlib.sha1(told).hexdigest()


@dataclass
class Hub:
    """Both hosts, what they were asked, and how they shall fail.

    Attributes:
        sent: Bytes of each file that were sent, by `repository/path`.
        asked: Host, path and headers (lower case) of every request.
        tokens: Those that are let into gated repositories.
        faults: For files by `repository/path`: what the next answers do, a status or a number of bytes before the end.
        pause_s: Before each chunk.
        takes_ranges: Whether a part of a file can be had.
        tells_sizes: Whether the list of files has their sizes and hashes.
    """

    repositories: dict[str, Repository]
    url: str = ""
    cdn: str = ""
    sent: Counter[str] = field(default_factory=Counter)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    faults: dict[str, list[tuple[str, int]]] = field(default_factory=dict)
    flipped: set[str] = field(default_factory=set)
    pause_s: float = 0.0
    takes_ranges: bool = True
    tells_sizes: bool = True

    def file(self, repository: str, path: str) -> bytes:
        """The bytes that are sent for a file."""
        content = self.repositories[repository].files[path]
        if f"{repository}/{path}" in self.flipped:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return content


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    host: str
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.asked.append((self.host, path, {name.lower(): value for name, value in self.headers.items()}))
        if self.host == "cdn":
            _, _, owner, name, file = path.split("/", 4)
            self._send_file(f"{owner}/{name}", file, {})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            self._send_listing(match[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], match[2], match[3])
        else:
            self._send(404, b"{}")

    def _send_listing(self, name: str) -> None:
        repository = self.hub.repositories.get(name)
        if fault := self._fault(f"api/{name}"):
            self._send(fault[1], b"busy")
            return
        if repository is None:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
            return
        siblings = []
        for path, content in repository.files.items():
            size = repository.sizes.get(path, len(content))
            entry: dict[str, Any] = {"rfilename": path}
            if self.hub.tells_sizes:
                entry |= {"size": size, "blobId": git_sha1(content)}
            if path.endswith(LFS_SUFFIXES) and self.hub.tells_sizes:
                entry["lfs"] = {"sha256": hashlib.sha256(content).hexdigest(), "size": size, "pointerSize": 134}
            siblings.append(entry)
        body = {
            "id": name,
            "modelId": name,
            "sha": repository.revision,
            "private": False,
            "gated": "auto" if repository.gated else False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "cardData": {"license": repository.license},
            "siblings": siblings,
        }
        self._send(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repository = self.hub.repositories.get(name)
        if repository is None or path not in repository.files or revision != repository.revision:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if repository.gated and token not in self.hub.tokens:
            self._send(403 if token else 401, b"", {"X-Error-Code": "GatedRepo"})
            return
        content = repository.files[path]
        headers = {"X-Repo-Commit": revision, "ETag": f'"{git_sha1(content)}"'}
        if path.endswith(LFS_SUFFIXES):
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            self._send(302, b"", headers | linked | {"Location": f"{self.hub.cdn}/lfs/{name}/{path}?Signature=x"})
        else:
            self._send_file(name, path, headers)

    def _send_file(self, repository: str, path: str, headers: Mapping[str, str]) -> None:
        key, content = f"{repository}/{path}", self.hub.file(repository, path)
        fault = self._fault(key)
        if fault is not None and fault[0] == "status":
            self._send(fault[1], b"", {"Retry-After": "0"})
            return
        status, start = 200, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        told = {"Accept-Ranges": "bytes", **headers}
        if wanted and self.hub.takes_ranges:
            status, start = 206, int(wanted[1])
            if start >= len(content):
                self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            told["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_response(status)
        for name, value in (told | {"Content-Length": str(len(content) - start)}).items():
            self.send_header(name, value)
        self.end_headers()
        end = len(content) if fault is None else min(len(content), start + fault[1])
        if self.command != "HEAD":
            self._send_chunks(key, content[start:end])
        if end < len(content):
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True

    def _send_chunks(self, key: str, content: bytes) -> None:
        # What is counted shall be what the other side takes, not what waits in buffers.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHUNK_BYTES)
        for start in range(0, len(content), CHUNK_BYTES):
            time.sleep(self.hub.pause_s)
            chunk = content[start : start + CHUNK_BYTES]
            self.wfile.write(chunk)
            self.hub.sent[key] += len(chunk)

    def _fault(self, key: str) -> tuple[str, int] | None:
        waiting = self.hub.faults.get(key)
        return waiting.pop(0) if waiting else None

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle(self) -> None:
        """A client that goes away in the middle is what these tests are about."""
        try:
            super().handle()
        except (ConnectionError, OSError):
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@contextmanager
def serving(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Run both hosts until the end of the block."""
    hub = Hub(repositories)
    servers = []
    for host in ("hub", "cdn"):
        handler = type(f"{host}Handler", (_Handler,), {"hub": hub, "host": host})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
    hub.url, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def git_sha1(content: bytes) -> str:
    """What Git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
