"""Bad input is refused in fal's words, quickly, and leaves the server as it was."""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.acceptance.live import LiveServer

ENDPOINT = "fal-ai/creative-upscaler"
Arguments = Callable[..., dict[str, Any]]


def png_bomb(side_px: int) -> bytes:
    """A valid PNG of `side_px` squared black pixels, a few hundred kilobytes long."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side_px, side_px, 1, 0, 0, 0, 0)
    packer = zlib.compressobj(1)
    row = bytes(1 + (side_px + 7) // 8)
    rows = b"".join(packer.compress(row * 1000) for _ in range(side_px // 1000)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def data_uri(data: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


@pytest.fixture(scope="module")
def web(picture: bytes) -> Iterator[str]:
    """A web server with a good and several bad files; gives its base URL."""
    pages = {
        "/good.png": (200, picture),
        "/gone.png": (404, b"not here"),
        "/broken": (500, b"oh"),
        "/page.html": (200, b"<!doctype html><p>not a picture</p>"),
        "/cut.png": (200, picture[: len(picture) // 2]),
        "/empty": (200, b""),
    }

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = pages[self.path]
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Keep the test's output clean."""

    site = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{site.server_port}"
    site.shutdown()
    site.server_close()


@pytest.fixture(scope="module", autouse=True)
def unharmed(server: LiveServer, arguments: Arguments) -> Iterator[None]:
    """After all of it the same processes serve a good request."""
    before = server.pids()
    yield
    assert server.pids() == before
    assert server.run(ENDPOINT, arguments()).status_code == 200


def run(server: LiveServer, body: object) -> tuple[int, dict[str, Any], float]:
    """The answer of the synchronous API: status, the first fault, seconds."""
    started = time.monotonic()
    answer = server.run(ENDPOINT, body)
    seconds = time.monotonic() - started
    detail = answer.json()["detail"]
    return answer.status_code, detail[0] if isinstance(detail, list) else {"type": None, "msg": detail}, seconds


@pytest.mark.parametrize(
    ("url", "type"),
    [
        ("http://127.0.0.1:1/refused.png", "file_download_error"),
        ("http://no-such-host.invalid/x.png", "file_download_error"),
        ("http://10.0.0.1/private.png", "file_download_error"),
        ("http://169.254.169.254/latest/meta-data/", "file_download_error"),
        ("{web}/gone.png", "file_download_error"),
        ("{web}/broken", "file_download_error"),
        ("ftp://127.0.0.1/x.png", "file_download_error"),
        ("nonsense", "file_download_error"),
        ("", "file_download_error"),
        ("{web}/page.html", "image_load_error"),
        ("{web}/cut.png", "image_load_error"),
        ("{web}/empty", "image_load_error"),
        ("data:image/png;base64,!!!!", "image_load_error"),
        ("data:text/plain,hello", "image_load_error"),
    ],
)
def test_inputs_that_are_no_picture(server: LiveServer, web: str, arguments: Arguments, url: str, type: str) -> None:
    """What cannot be fetched or decoded is fal's error about `image_url`, with 422."""
    status, fault, _ = run(server, arguments(image_url=url.format(web=web)))

    assert (status, fault["type"], fault["loc"]) == (422, type, ["body", "image_url"])


def test_a_picture_by_url(server: LiveServer, web: str, arguments: Arguments) -> None:
    """A host on a private address that the operator named is fetched from."""
    answer = server.run(ENDPOINT, arguments(image_url=f"{web}/good.png")).json()

    assert answer["image"]["width"] == 128


def test_a_truncated_and_a_huge_picture_are_refused_within_a_second(
    server: LiveServer, picture: bytes, arguments: Arguments
) -> None:
    """No pixel of a decompression bomb is decoded."""
    bomb = data_uri(png_bomb(30_000))

    truncated = run(server, arguments(image_url=data_uri(picture[:-100])))
    huge = run(server, arguments(image_url=bomb))

    assert (truncated[0], truncated[1]["type"]) == (422, "image_load_error")
    assert (huge[0], huge[1]["type"]) == (422, "image_too_large")
    assert set(huge[1]["ctx"]) == {"max_height", "max_width"}
    assert max(truncated[2], huge[2]) < 1.0


@pytest.mark.parametrize(
    ("changes", "type", "field"),
    [
        ({"image_url": None}, "string_type", "image_url"),
        ({"image_url": 7}, "string_type", "image_url"),
        ({"scale": "large"}, "float_parsing", "scale"),
        ({"scale": 0.5}, "greater_than_equal", "scale"),
        ({"scale": 5.1}, "less_than_equal", "scale"),
        ({"creativity": -0.1}, "greater_than_equal", "creativity"),
        ({"creativity": 1.1}, "less_than_equal", "creativity"),
        ({"detail": 6}, "less_than_equal", "detail"),
        ({"shape_preservation": 4}, "less_than_equal", "shape_preservation"),
        ({"guidance_scale": 17}, "less_than_equal", "guidance_scale"),
        ({"num_inference_steps": 0}, "greater_than_equal", "num_inference_steps"),
        ({"num_inference_steps": 201}, "less_than_equal", "num_inference_steps"),
        ({"num_inference_steps": 2.5}, "int_from_float", "num_inference_steps"),
        ({"model_type": "SD_3"}, "literal_error", "model_type"),
        ({"prompt": ["a"]}, "string_type", "prompt"),
        ({"skip_ccsr": "perhaps"}, "bool_parsing", "skip_ccsr"),
        ({"base_model_url": "../etc/passwd"}, "file_download_error", "base_model_url"),
        ({"additional_lora_url": "file:///etc/passwd"}, "file_download_error", "additional_lora_url"),
        ({"additional_embedding_url": "my embedding"}, "file_download_error", "additional_embedding_url"),
    ],
)
def test_values_that_the_schema_refuses(
    server: LiveServer, arguments: Arguments, changes: dict[str, Any], type: str, field: str
) -> None:
    """A wrong type, a value out of range and what is no URL name the field, at once."""
    status, fault, seconds = run(server, arguments(**changes))

    assert (status, fault["type"], fault["loc"][-1]) == (422, type, field)
    assert fault["url"] == f"https://docs.fal.ai/errors#{type}"
    assert seconds < 1.0


@pytest.mark.parametrize("body", [{}, [], "text", 7, None])
def test_bodies_that_are_no_input(server: LiveServer, body: object) -> None:
    """JSON that is not an object with a picture is a 422."""
    assert run(server, body)[0] == 422


@pytest.mark.parametrize("content", [b"", b"{", b"{'a': 1}", b"\xff\xfe", b'{"scale": NaN, "image_url": "data:,"}'])
@pytest.mark.parametrize("api", ["run", "queue"])
def test_bytes_that_are_no_json(server: LiveServer, api: str, content: bytes) -> None:
    """A malformed or missing body is answered at once; an accepted one fails on its result, as with fal."""
    started = time.monotonic()
    answer = server.http.post(
        f"{server.url}/{api}/{ENDPOINT}", content=content, headers={"content-type": "application/json"}
    )
    status = answer.status_code
    if status == 200:
        answer = server.http.get(answer.json()["response_url"])
        status = answer.status_code

    assert status in (400, 422)
    assert json.loads(answer.content)["detail"]
    assert time.monotonic() - started < 1.0
