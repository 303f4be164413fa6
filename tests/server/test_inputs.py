"""Inputs are fetched from where they may be, within limits, and nothing else on this machine is ever dialled."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from server.inputs import (
    DownloadFailed,
    Fetcher,
    FileTooLarge,
    MalformedDataURI,
    Reach,
    decode_data_uri,
    guarded_client,
    resolve,
)

# One URL a line; {p} stands for the port on which the canary listens on every address of this machine.
PRIVATE_URLS = (Path(__file__).parent / "private_urls.txt").read_text(encoding="utf-8").splitlines()

NAMES = {
    "rebind.test": ["127.0.0.1"],
    "half.test": ["93.184.215.14", "127.0.0.1"],
    "mapped.test": ["::ffff:127.0.0.1"],
}


def resolver(host: str, port: int) -> list[str]:
    """A resolver with hostile names in it; what is not listed and not local does not exist."""
    if host in NAMES:
        return NAMES[host]
    if host.endswith("example.com"):
        raise socket.gaierror("no network in tests")
    return resolve(host, port)


@pytest.fixture
def canary() -> Iterator[tuple[int, list[str]]]:
    """A port on every address of this machine, and the list of peers that reached it."""
    listener = socket.create_server(("", 0), family=socket.AF_INET)
    port = listener.getsockname()[1]
    listeners = [listener]
    if socket.has_ipv6:
        with contextlib.suppress(OSError):
            listeners.append(socket.create_server(("::", port), family=socket.AF_INET6))
    seen: list[str] = []

    def accept(server: socket.socket) -> None:
        while True:
            try:
                connection, peer = server.accept()
            except OSError:
                return
            seen.append(str(peer))
            connection.close()

    for server in listeners:
        threading.Thread(target=accept, args=(server,), daemon=True).start()
    yield port, seen
    for server in listeners:
        # close() alone does not wake a thread that sits in accept().
        server.shutdown(socket.SHUT_RDWR)
        server.close()


Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture
def web() -> Iterator[Callable[[dict[str, Answer]], str]]:
    """Start web servers on loopback from a table of path to answer; gives `127.0.0.1:port`."""
    servers: list[ThreadingHTTPServer] = []

    def start(pages: dict[str, Answer]) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, headers, body = pages[self.path]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Keep the test's output clean."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return f"127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def fetcher(reach: Reach, max_bytes: int = 10_000, timeout_s: float = 5.0) -> Fetcher:
    return Fetcher(guarded_client(reach, resolver=resolver), max_bytes, timeout_s)


def fetches_nothing(guarded: Fetcher, url: str) -> bool:
    """Whether a download fails; the canary closes what reaches it without an answer, so it fails there too."""
    try:
        guarded.fetch(url)
    except DownloadFailed:
        return True
    return False


def test_no_spelling_of_a_private_address_is_dialled(canary: tuple[int, list[str]]) -> None:
    """Of all the ways to write an address of this machine or network, none leads to a connection."""
    port, seen = canary
    guarded = fetcher(Reach(ports=frozenset({80, 443, port})))
    assert len(PRIVATE_URLS) >= 60
    assert fetches_nothing(fetcher(Reach(private=True, ports=None)), f"http://127.0.0.1:{port}/") and seen.pop()

    for form in PRIVATE_URLS:
        assert fetches_nothing(guarded, form.format(p=port)), form

    time.sleep(0.1)
    assert seen == []


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_checked_like_the_first_address(
    status: int, canary: tuple[int, list[str]], web: Callable[[dict[str, Answer]], str]
) -> None:
    """An allowed host cannot send the server on to one that is not."""
    port, seen = canary
    host = web({"/": (status, {"Location": f"http://127.0.0.1:{port}/"}, b"")})

    with pytest.raises(DownloadFailed, match="not public"):
        fetcher(Reach(allow_hosts=frozenset({host}))).fetch(f"http://{host}/")

    assert seen == []


def test_a_redirect_to_another_scheme_is_refused(web: Callable[[dict[str, Answer]], str]) -> None:
    """A redirect cannot leave the web."""
    host = web({"/": (302, {"Location": "file:///etc/hostname"}, b"")})

    with pytest.raises(DownloadFailed, match="not a URL"):
        fetcher(Reach.naming([host])).fetch(f"http://{host}/")


def test_public_hosts_are_reached_on_web_ports_only(canary: tuple[int, list[str]]) -> None:
    """A public name on another port is refused before anything is dialled."""
    reach = Reach()

    reach.check("example.com", 443, "93.184.215.14")
    reach.check("example.com", 80, "2606:4700::1111")
    with pytest.raises(Exception, match="port 22 is not allowed"):
        reach.check("example.com", 22, "93.184.215.14")


def test_a_named_host_is_allowed_on_a_private_address(web: Callable[[dict[str, Answer]], str]) -> None:
    """The operator's list opens exactly the host, or the host and port, that it names."""
    host = web({"/a.png": (200, {}, b"picture")})
    name, _, port = host.partition(":")

    assert fetcher(Reach.naming([name])).fetch(f"http://{host}/a.png") == b"picture"
    assert fetcher(Reach.naming([host.upper()])).fetch(f"http://{host}/a.png") == b"picture"
    with pytest.raises(DownloadFailed, match="UPSCALER_FETCH_ALLOW_HOSTS"):
        fetcher(Reach.naming([f"{name}:{int(port) + 1}"])).fetch(f"http://{host}/a.png")


def test_private_reach_still_refuses_metadata_services() -> None:
    """A caller who may reach the private network, as webhooks may, still cannot reach link-local addresses."""
    reach = Reach(private=True, ports=None)

    reach.check("hooks.lan", 8080, "192.168.1.5")
    reach.check("localhost", 8080, "127.0.0.1")
    for address in ("169.254.169.254", "fe80::1%eth0", "::ffff:169.254.169.254", "fd00:ec2::254"):
        with pytest.raises(Exception, match="not public"):
            reach.check("metadata", 80, address)


def test_five_redirects_are_followed_and_six_are_not(web: Callable[[dict[str, Answer]], str]) -> None:
    """A chain of redirects has an end."""
    pages: dict[str, Answer] = {f"/{n}": (302, {"Location": f"/{n + 1}"}, b"") for n in range(6)}
    host = web(pages | {"/6": (200, {}, b"end")})
    guarded = fetcher(Reach.naming([host]))

    assert guarded.fetch(f"http://{host}/1") == b"end"
    with pytest.raises(DownloadFailed, match="redirects"):
        guarded.fetch(f"http://{host}/0")


def test_a_file_above_the_limit_is_refused(web: Callable[[dict[str, Answer]], str]) -> None:
    """Too many bytes are refused by their announcement, and while they stream when nothing was announced."""
    host = web(
        {"/said": (200, {"Content-Length": "10001"}, b"x" * 10_001), "/unsaid": (200, {}, b"x" * 200_000)},
    )
    guarded = fetcher(Reach.naming([host]))

    for path in ("said", "unsaid"):
        with pytest.raises(FileTooLarge) as caught:
            guarded.fetch(f"http://{host}/{path}")
        assert caught.value.max_bytes == 10_000


def test_other_answers_than_200_fail_the_download(web: Callable[[dict[str, Answer]], str]) -> None:
    """The caller learns what the other server said."""
    host = web({"/gone": (404, {}, b"no")})

    with pytest.raises(DownloadFailed, match="answered 404"):
        fetcher(Reach.naming([host])).fetch(f"http://{host}/gone")


def test_nobody_listening_fails_the_download_at_once() -> None:
    """A refused connection is fal's download error."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]

    with pytest.raises(DownloadFailed):
        fetcher(Reach.naming(["127.0.0.1"])).fetch(f"http://127.0.0.1:{port}/")


@pytest.fixture
def trickle() -> Iterator[Callable[[bytes, bytes], str]]:
    """Start servers that send a head at once, then the same piece for 10 s, and hang up; gives `127.0.0.1:port`."""
    listeners: list[socket.socket] = []
    is_over = threading.Event()

    def drip(listener: socket.socket, head: bytes, piece: bytes) -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(4096)
            connection.sendall(head)
            for _ in range(200):
                if is_over.wait(0.05):
                    break
                connection.sendall(piece)

    def start(head: bytes, piece: bytes) -> str:
        listener = socket.create_server(("127.0.0.1", 0))
        listeners.append(listener)
        threading.Thread(target=drip, args=(listener, head, piece), daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    yield start
    is_over.set()
    for listener in listeners:
        listener.close()


HEAD = b"HTTP/1.1 200 OK\r\n"
TRICKLES = pytest.mark.parametrize(
    ("head", "piece"),
    [(HEAD + b"\r\n", b"x" * 70_000), (HEAD + b"\r\n", b"x"), (HEAD + b"X-Slow: ", b"x"), (b"", b"")],
    ids=["chunks", "bytes of the body", "bytes of the header", "silence"],
)


@TRICKLES
def test_a_trickle_ends_at_the_deadline(trickle: Callable[[bytes, bytes], str], head: bytes, piece: bytes) -> None:
    """A server that sends a byte now and then, or none, cannot hold the slot longer than the time allowed."""
    host = trickle(head, piece)

    with pytest.raises(DownloadFailed, match=r"longer than 0\.3 s"):
        fetcher(Reach.naming([host]), max_bytes=10**9, timeout_s=0.3).fetch(f"http://{host}/")


@TRICKLES
def test_a_trickle_ends_when_nobody_waits_for_it(
    trickle: Callable[[bytes, bytes], str], head: bytes, piece: bytes
) -> None:
    """A cancelled request is noticed while the other server is still sending, whatever it does."""
    host = trickle(head, piece)
    asked = 0

    def stop() -> None:
        nonlocal asked
        asked += 1
        if asked > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetcher(Reach.naming([host]), max_bytes=10**9, timeout_s=60.0).fetch(f"http://{host}/", stop)


def test_a_name_is_judged_again_at_every_connection(
    canary: tuple[int, list[str]], web: Callable[[dict[str, Answer]], str]
) -> None:
    """A name that was public, and answers with a redirect to itself, is not dialled once it means this machine."""
    port, seen = canary
    host = web({"/": (302, {"Location": f"http://turncoat.test:{port}/"}, b"")})
    answers = iter([["93.184.215.14"], ["127.0.0.1"]])
    asked: list[str] = []

    def turncoat(name: str, port: int) -> list[str]:
        if name != "turncoat.test":
            return resolve(name, port)
        asked.append(name)
        return next(answers)

    reach = Reach(allow_hosts=frozenset({host}), ports=frozenset({port}))
    reach.check("turncoat.test", port, turncoat("turncoat.test", port)[0])
    with pytest.raises(DownloadFailed, match="not public"):
        Fetcher(guarded_client(reach, resolver=turncoat), 10_000, 5.0).fetch(f"http://{host}/")

    assert len(asked) == 2 and seen == []


def test_a_poll_may_stop_a_download(web: Callable[[dict[str, Answer]], str]) -> None:
    """Whoever waits for the file may change their mind."""
    host = web({"/": (200, {}, b"x")})

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetcher(Reach.naming([host])).fetch(f"http://{host}/", stop)


def test_no_proxy_is_taken_from_the_environment(
    monkeypatch: pytest.MonkeyPatch, canary: tuple[int, list[str]], web: Callable[[dict[str, Answer]], str]
) -> None:
    """A proxy variable would dial for us, past every check."""
    port, seen = canary
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{port}")
    host = web({"/": (200, {}, b"direct")})

    assert fetcher(Reach.naming([host])).fetch(f"http://{host}/") == b"direct"
    assert seen == []


@pytest.mark.parametrize(
    ("uri", "data"),
    [
        ("data:image/png;base64,AAEC", b"\0\1\2"),
        ("DATA:image/png;charset=utf-8;BASE64,AAEC", b"\0\1\2"),
        ("data:image/png;base64,AA%45C", b"\0\1\2"),
        ("data:;base64,AAE", b"\0\1"),
        ("data:;base64,_-8=", b"\xff\xef"),
        ("data:text/plain,a%00b", b"a\0b"),
        ("data:,", b""),
    ],
)
def test_data_uris_are_decoded(uri: str, data: bytes) -> None:
    """Base64 and percent-encoding are both read, as leniently as browsers do."""
    assert decode_data_uri(uri, 100) == data


@pytest.mark.parametrize("uri", ["data:image/png;base64", "data:", "data:image/png;base64,A$$$", "data:;base64,A"])
def test_broken_data_uris_are_refused(uri: str) -> None:
    """What is not a data URI is refused."""
    with pytest.raises(MalformedDataURI):
        decode_data_uri(uri, 100)


@pytest.mark.parametrize("uri", ["data:;base64," + "A" * 1000, "data:," + "a" * 101, "data:," + "%00" * 101])
def test_a_data_uri_above_the_limit_is_refused(uri: str) -> None:
    """The limit of downloads holds for data URIs too."""
    with pytest.raises(FileTooLarge):
        decode_data_uri(uri, 100)
