"""Whatever goes wrong on whatever route: fal's form, a request id, and never a 500 for what a caller sent."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.errors import echo, model_error
from server.settings import Settings

APP = "fal-ai/creative-upscaler"
QUEUE = f"/queue/{APP}"
IMAGE = {"image_url": "https://example.com/a.png"}

WRONG: list[tuple[str, str, bytes | None, int]] = [
    ("POST", "/nothing", None, 404),
    ("GET", "/nothing", None, 404),
    ("POST", "/a/b", b"{}", 404),
    ("POST", f"/{APP}/stream", b"{}", 422),
    ("GET", f"/{APP}/stream", None, 404),
    ("POST", f"{QUEUE}/stream", b"{}", 404),
    ("POST", f"/{APP}/realtime", b"{}", 404),
    ("GET", f"/{APP}", None, 405),
    ("POST", f"/{APP}", b"{}", 422),
    ("POST", f"/{APP}", b"", 422),
    ("POST", f"/{APP}", b"{", 422),
    ("POST", f"/{APP}", b"\xff\xfe", 422),
    ("POST", f"/{APP}", b"[1]", 422),
    ("POST", f"/{APP}", b'{"image_url": NaN}', 422),
    ("POST", f"/{APP}", b'{"image_url": "https://x/a", "scale": 1e400}', 422),
    ("POST", f"/{APP}", b'{"image_url": "https://x/a", "seed": ' + b"9" * 5000 + b"}", 422),
    ("POST", f"/{APP}", b'{"image_url": "https://x/a", "scale": ' + b"[" * 900 + b"]" * 900 + b"}", 422),
    ("POST", f"/{APP}", b"[" * 100_000, 422),
    ("POST", f"/{APP}", b'{"image_url": "\\ud800"}', 422),
    ("POST", f"/{APP}", b'{"image_url": "https://x/\\u0000", "prompt": "\\ud800"}', 422),
    ("POST", f"/{APP}", b'{"image_url": "data:image/png;base64,%%%"}', 422),
    ("POST", f"/{APP}", b'{"image_url": "data:"}', 422),
    ("POST", f"/{APP}", b'{"image_url": "blob:in/x"}', 422),
    ("POST", f"/{APP}", b'{"image_url": "file:///etc/passwd"}', 422),
    ("POST", f"/{APP}", b'{"image_url": "http://["}', 422),
    ("POST", f"/{APP}", b'{"image_url": "http://127.0.0.1:8000/files/out/ab/none.png"}', 422),
    ("POST", QUEUE, b"{", 422),
    ("POST", f"{QUEUE}?fal_webhook=ftp://x", b"{}", 422),
    ("POST", f"{QUEUE}?fal_max_queue_length=many", b"{}", 422),
    ("GET", QUEUE, None, 405),
    ("GET", f"{QUEUE}/bogus", None, 404),
    ("GET", f"{QUEUE}/requests/none", None, 404),
    ("GET", f"{QUEUE}/requests/none/status", None, 404),
    ("GET", f"{QUEUE}/requests/none/status/stream", None, 404),
    ("PUT", f"{QUEUE}/requests/none/cancel", None, 404),
    ("GET", f"{QUEUE}/requests/%00/status", None, 404),
    ("GET", f"{QUEUE}/requests/%ff%ed%a0%80/status", None, 404),
    ("POST", f"{QUEUE}/requests/none/status", None, 404),
    ("GET", "/files/out/ab/none.png", None, 404),
    ("GET", "/files/..%2f..%2fledger.sqlite3", None, 404),
    ("GET", "/files/in/" + "0" * 64, None, 404),
    ("POST", "/health", None, 405),
    ("GET", "/api/fal/proxy", None, 400),
    ("POST", "/storage/upload/initiate", b"[]", 422),
    ("POST", "/storage/upload/initiate", b'{"file_name": 5}', 422),
    ("POST", "/tokens/", b'{"token_expiration": -1}', 422),
    ("POST", "/tokens/", b'{"allowed_apps": "x"}', 422),
    ("PUT", "/storage/upload/x?signature=y", b"x", 401),
    ("PUT", "/storage/upload/x/1", b"x", 401),
    ("PUT", "/storage/upload/x/one", b"x", 404),
    ("POST", "/storage/upload/x/complete", b"{}", 401),
    ("PUT", "/files/up/ab/x.png/multipart/x/1", b"x", 401),
    ("PUT", "/files/up/ab/x.png", b"x", 405),
]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """One gateway for the whole table: refused requests leave nothing behind."""
    settings = Settings(data=tmp_path_factory.mktemp("data"))
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        yield client


@pytest.mark.parametrize(("method", "path", "body", "status"), WRONG)
def test_every_error_has_fals_form(shared: TestClient, method: str, path: str, body: bytes | None, status: int) -> None:
    """`detail` is a text or a list of items, the media type is bare JSON, and the request has an id."""
    answer = shared.request(method, path, content=body)

    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-fal-request-id"] and answer.headers["access-control-allow-origin"] == "*"
    detail = answer.json()["detail"]
    assert isinstance(detail, str) or (
        detail and all({"loc", "msg", "type", "url"} <= set(item) and item["loc"] for item in detail)
    )
    if status == 422:
        assert answer.headers["x-fal-retryable"] == answer.headers["x-fal-needs-retry"] == "false"


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_beyond_the_limit_is_refused_with_413(app_settings: Settings, chunked: bool) -> None:
    """Announced or not, it is refused while it is read; at the limit it is taken."""
    settings = Settings(data=app_settings.data, max_body_mb=1)
    body = json.dumps(IMAGE | {"padding": ""})
    fitting = json.dumps(IMAGE | {"padding": "x" * (2**20 - len(body))}).encode()
    with TestClient(create_app(settings)) as client:
        taken = client.post(QUEUE, content=_chunks(fitting) if chunked else fitting)
        refused = client.post(QUEUE, content=_chunks(fitting + b" ") if chunked else fitting + b" ")

    assert len(fitting) == 2**20 and taken.status_code == 200
    assert refused.status_code == 413 and "1048576 bytes" in refused.json()["detail"]
    assert refused.headers["x-fal-error-type"] == "bad_request"


def _chunks(body: bytes) -> Any:
    return (body[start : start + 65536] for start in range(0, len(body), 65536))


def test_a_data_uri_of_many_megabytes_is_taken(client: TestClient) -> None:
    """The default limit admits what clients send, and what they sent is not kept in the ledger."""
    uri = "data:image/png;base64," + "A" * (20 * 2**20)

    assert client.post(QUEUE, json={"image_url": uri}).json()["status"] == "IN_QUEUE"


def test_an_internal_fault_says_nothing_of_itself(app_settings: Settings) -> None:
    """A fault of ours is a 500 in fal's form, with id and CORS headers, without particulars."""
    app = create_app(app_settings)
    app.add_api_route("/docs", _fault)
    with TestClient(app, raise_server_exceptions=False) as client:
        answer = client.get("/docs")

    assert answer.status_code == 500
    assert answer.json() == {"detail": "Internal Server Error", "error_type": "internal_error"}
    assert answer.headers["x-fal-request-id"] and answer.headers["access-control-allow-origin"] == "*"


async def _fault() -> None:
    raise RuntimeError("secret")


def test_a_full_disk_is_a_503_that_may_be_repeated(app_settings: Settings, tmp_path: Path) -> None:
    """What cannot be recorded is not accepted."""
    with TestClient(create_app(app_settings)) as client:
        gateway = client.app.state.gateway  # type: ignore[attr-defined]
        client.portal.call(gateway.ledger._db.write, lambda db: db._connection.execute("PRAGMA query_only=1"))  # type: ignore[union-attr]
        answer = client.post(QUEUE, json=IMAGE)

    assert answer.status_code == 503 and answer.headers["retry-after"]
    assert answer.json()["error_type"] == "internal_error"


@pytest.mark.parametrize(
    ("type", "status", "retryable"),
    [("image_load_error", 422, "false"), ("internal_server_error", 500, "true"), ("generation_timeout", 504, "true")],
)
def test_model_errors_carry_status_and_retry_headers(type: str, status: int, retryable: str) -> None:
    """fal's type decides both."""
    outcome = model_error(type, "text", loc=("body", "image_url"), ctx={"max_size": 5})

    assert (outcome.status, outcome.headers["X-Fal-Retryable"], outcome.error_type) == (status, retryable, type)
    assert outcome.body["detail"][0]["ctx"] == {"max_size": 5}


def test_echoed_values_are_json_and_bounded() -> None:
    """A faulty value is sent back as far as it can be."""
    deep: Any = []
    for _ in range(100):
        deep = [deep]

    echoed = echo({"nan": float("nan"), "long": "x" * 5000, "deep": deep, "big": 10**400, "bytes": b"\xff"})

    assert len(json.dumps(echoed, allow_nan=False)) < 2500
