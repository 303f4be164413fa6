"""A web server on loopback that serves files as model hosts do: validators, ranges, redirects, broken connections."""

from __future__ import annotations

import re
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Page:
    """One path: its bytes, its validator, headers besides, and after how many bytes the next answers break off."""

    body: bytes = b""
    etag: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    status: int = 200
    breaks: list[int] = field(default_factory=list)
    announces_length: bool = True


@dataclass
class FileServer:
    """`address` is `127.0.0.1:port`; `seen` holds path and headers (lower case) of every request."""

    address: str
    pages: dict[str, Page]
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)

    def url(self, path: str) -> str:
        """The URL of a path."""
        return f"http://{self.address}{path}"


@contextmanager
def serving(pages: dict[str, Page], *, tls: ssl.SSLContext | None = None) -> Iterator[FileServer]:
    """Run a server until the end of the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            files.seen.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
            page = files.pages.get(self.path.partition("?")[0], Page(status=404))
            status, body, headers = page.status, page.body, dict(page.headers)
            if page.etag:
                headers["ETag"] = page.etag
                if self.headers.get("If-None-Match") == page.etag:
                    status, body = 304, b""
            wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
            if wanted and status == 200 and self.headers.get("If-Range") == page.etag:
                status, start = 206, int(wanted[1])
                headers["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
                body = body[start:]
            if page.announces_length:
                headers["Content-Length"] = str(len(body))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if page.breaks and status in (200, 206):
                self.wfile.write(body[: page.breaks.pop(0)])
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            else:
                with suppress(ConnectionError):  # who has seen enough hangs up
                    self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    files = FileServer(f"127.0.0.1:{server.server_port}", pages)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield files
    server.shutdown()
    server.server_close()


@contextmanager
def answering(*answers: bytes) -> Iterator[FileServer]:
    """Run a server that sends one of these to each who connects, the last again and again, and hangs up.

    What a proper web server would never say, it says.
    """
    listener = socket.create_server(("127.0.0.1", 0))
    files = FileServer(f"127.0.0.1:{listener.getsockname()[1]}", {})

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, suppress(ConnectionError):
                head, *lines = connection.recv(65536).decode().split("\r\n")
                headers = dict(line.lower().split(": ", 1) for line in lines if line)
                connection.sendall(answers[min(len(files.seen), len(answers) - 1)])
                files.seen.append((head.split()[1], headers))

    threading.Thread(target=serve, daemon=True).start()
    yield files
    listener.shutdown(socket.SHUT_RDWR)  # close() alone does not wake a thread that sits in accept()
    listener.close()
