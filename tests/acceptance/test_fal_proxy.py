"""fal-client with no address of ours at all: by the CONNECT proxy, every call and every upload comes here."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.acceptance.clients import confined
from tests.acceptance.live import LiveServer, finish

Arguments = Callable[..., dict[str, Any]]
LARGE_BYTES = 101 * 1024 * 1024 + 12_345  # the client sends more than 100 MiB in parts, the last one shorter


@pytest.fixture(scope="module")
def proxied(paced: LiveServer) -> dict[str, str]:
    """What `env --fal-proxy` prints, in a process that cannot leave this machine."""
    found = paced.proxied_environment
    assert not {name for name in found if name.endswith("_HOST")}
    return confined(found)


@pytest.fixture
def picture_file(tmp_path: Path, picture: bytes) -> str:
    """The path of a small picture."""
    path = tmp_path / "picture.png"
    path.write_bytes(picture)
    return str(path)


def uploads(paced: LiveServer, environment: dict[str, str], verb: str, **arguments: Any) -> Any:
    """What `upload_client.py` got."""
    text = json.dumps(arguments)
    return finish(paced.client(verb, text, program="upload_client.py", environment=environment))


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_run_and_subscribe(kind: str, paced: LiveServer, proxied: dict[str, str], arguments: Arguments) -> None:
    """The client calls fal.run and queue.fal.run, and gets pictures under those names."""
    ran = finish(paced.client(kind, "run", json.dumps(arguments()), environment=proxied))
    subscribed = finish(paced.client(kind, "subscribe", json.dumps(arguments()), environment=proxied))

    assert urlsplit(ran["result"]["image"]["url"]).netloc == "fal.run"
    assert urlsplit(subscribed["result"]["image"]["url"]).netloc == "queue.fal.run"
    assert subscribed["updates"][-1][0] == "Completed"


def test_uploads_read_back_byte_for_byte(
    paced: LiveServer, proxied: dict[str, str], arguments: Arguments, picture_file: str
) -> None:
    """Uploaded bytes and pictures are the same when read again, and the URL of one is an input like any other."""
    answer = uploads(paced, proxied, "small", picture=picture_file, input=arguments())

    for name, kind in (("text", "text/plain"), ("image", "image/png")):
        url, digest, content_type, expected = answer[name]
        assert urlsplit(url).netloc in ("v3.fal.media", "rest.fal.ai") and digest == expected
        assert content_type.split(";")[0] == kind
    assert answer["result"]["image"]["width"] == 128


@pytest.mark.parametrize("verb", ["large", "large_async"])
def test_a_large_file_arrives_in_parts(verb: str, paced: LiveServer, proxied: dict[str, str], tmp_path: Path) -> None:
    """A file of 101 MB goes up in parallel parts that arrive in any order, and is the same when read again."""
    path = tmp_path / "large.bin"
    data = os.urandom(1024 * 1024 + 1)
    data = (data * (LARGE_BYTES // len(data) + 1))[:LARGE_BYTES]
    path.write_bytes(data)

    answer = uploads(paced, proxied, verb, path=str(path))

    assert answer["file"][1] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("verb", ["repository", "broken"])
def test_the_other_way_to_upload(
    verb: str, paced: LiveServer, proxied: dict[str, str], arguments: Arguments, picture_file: str
) -> None:
    """fal's older storage works when it is asked for, and when the newer one fails; its URLs are inputs as well."""
    answer = uploads(paced, proxied, verb, picture=picture_file, input=arguments())

    url, digest, content_type, expected = answer["image"]
    assert urlsplit(url).netloc == "rest.fal.ai"
    assert (digest, content_type) == (expected, "image/png")
    assert answer["result"]["image"]["width"] == 128


def test_any_other_host_is_refused(paced: LiveServer) -> None:
    """The proxy leads nowhere else, whatever is asked for."""
    answers = []
    for head in ("CONNECT example.com:443", "CONNECT 169.254.169.254:443", "GET http://fal.run/health"):
        with socket.create_connection(("127.0.0.1", paced.fal_proxy_port), timeout=10.0) as caller:
            caller.sendall(f"{head} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
            answers.append(caller.recv(4096).split(b" ")[1])

    assert answers == [b"403", b"403", b"405"]


def test_the_recipe_keeps_the_public_address_out_of_the_proxy(paced: LiveServer) -> None:
    """`env --fal-proxy` prints proxy, authority and key; `env` alone keeps naming our hosts."""
    proxied, plain = paced.proxied_environment, paced.client_environment

    assert proxied["HTTPS_PROXY"] == f"http://localhost:{paced.fal_proxy_port}"
    assert proxied["SSL_CERT_FILE"] == plain["SSL_CERT_FILE"]
    assert "localhost" in proxied["NO_PROXY"].split(",")
    assert "HTTPS_PROXY" not in plain and plain["FAL_RUN_HOST"].startswith("localhost:")


def test_the_guard_would_notice(proxied: dict[str, str]) -> None:
    """The processes above really cannot reach anybody else: one that tries is ended."""
    code = "import socket; socket.create_connection(('example.com', 443), timeout=1)"

    done = subprocess.run([sys.executable, "-c", code], env=proxied, capture_output=True, text=True)

    assert done.returncode == 77 and "tried to reach example.com" in done.stderr
