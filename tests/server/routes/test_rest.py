"""Uploads in every form that clients use, and tokens."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from starlette.testclient import TestClient

from server.app import create_app
from server.ledger import Ledger
from server.settings import Settings

DATA = bytes(range(256)) * 10_000
FILE = {"content_type": "image/png", "file_name": "my owl.png"}
APP = "/fal-ai/creative-upscaler"


@pytest.fixture
def locked(app_settings: Settings) -> Any:
    """A client of a gateway that wants a key, and does not have it."""
    settings = Settings(data=app_settings.data, api_keys="secret", max_upload_mb=4)
    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        yield client


KEY = {"authorization": "Key secret"}


@pytest.mark.parametrize("path", ["/storage/upload/initiate?storage_type=fal-cdn-v3", "/rest/storage/upload/initiate"])
def test_a_file_is_put_where_the_server_says(locked: TestClient, path: str) -> None:
    """Initiate needs the key, the put does not, and the file is byte-identical to everybody."""
    refused = locked.post(path, json=FILE)
    places = locked.post(path, json=FILE, headers=KEY).json()
    put = locked.put(places["upload_url"], content=DATA, headers={"content-type": "image/png"})
    got = locked.get(places["file_url"])

    assert refused.status_code == 401 and put.status_code == 200
    assert got.content == DATA and got.headers["content-type"] == "image/png"
    assert places["file_url"].endswith("_my-owl.png")


def test_parts_are_put_below_the_url_with_its_query(locked: TestClient) -> None:
    """JavaScript's way: number and `complete` go before the query, answers are JSON with the entity tag."""
    places = locked.post("/storage/upload/initiate-multipart", json=FILE, headers=KEY).json()
    url = urlsplit(places["upload_url"])
    parts = []
    for number in (1, 2, 3):
        part_url = urlunsplit(url._replace(path=f"{url.path}/{number}"))
        parts.append(locked.put(part_url, content=DATA[(number - 1) * 10**6 : number * 10**6]).json())
    done = locked.post(urlunsplit(url._replace(path=f"{url.path}/complete")), json={"parts": parts})

    assert url.query and [part["partNumber"] for part in parts] == [1, 2, 3]
    assert done.status_code == 200 and locked.get(places["file_url"]).content == DATA


def test_python_uploads_with_a_token_of_its_own(locked: TestClient) -> None:
    """A token for the file host, good for whole files; its end is a time with an offset."""
    token = locked.post("/storage/auth/token?storage_type=fal-cdn-v3", json={}, headers=KEY).json()
    headers = {"authorization": f"{token['token_type']} {token['token']}", "content-type": "image/jpeg"}
    stored = locked.post("/files/upload", content=DATA, headers=headers | {"x-fal-file-name": "a.jpeg"}).json()
    stranger = locked.post("/files/upload", content=DATA, headers={"authorization": "Bearer nothing"})

    assert datetime.fromisoformat(token["expires_at"]).utcoffset() is not None
    assert not token["expires_at"].endswith("Z") and token["base_url"] == "http://127.0.0.1:8000"
    assert locked.get(stored["access_url"]).content == DATA and stranger.status_code == 401


@pytest.mark.parametrize("quoted", [True, False])
def test_parts_may_arrive_and_be_listed_in_any_order(locked: TestClient, quoted: bool) -> None:
    """Python's way: parts below the file's URL, in parallel; the list is not sorted, tags quoted or not."""
    begun = locked.post("/files/upload/multipart", headers=KEY | {"content-type": "image/webp"}).json()
    parts = []
    for number in (3, 1, 2):
        url = f"{begun['access_url']}/multipart/{begun['uploadId']}/{number}"
        etag = locked.put(url, content=DATA[(number - 1) * 10**6 : number * 10**6]).headers["etag"]
        parts.append({"partNumber": number, "etag": etag if quoted else etag.strip('"')})
    url = f"{begun['access_url']}/multipart/{begun['uploadId']}/complete"
    done = locked.post(url, json={"parts": parts})
    again = locked.post(url, json={"parts": parts})
    got = locked.get(begun["access_url"])

    assert (done.status_code, again.status_code) == (200, 400)
    assert got.content == DATA and got.headers["content-type"] == "image/webp"


@pytest.mark.parametrize(
    "parts", [[], [{}], [{"partNumber": 1, "etag": "../x"}], [{"partNumber": 9, "etag": "0" * 32}], "x"]
)
def test_a_list_of_parts_that_are_not_there_is_refused(client: TestClient, parts: Any) -> None:
    """Nothing is joined from what was not uploaded."""
    begun = client.post("/files/upload/multipart").json()

    answer = client.post(f"{begun['access_url']}/multipart/{begun['uploadId']}/complete", json={"parts": parts})

    assert answer.status_code == 400 and client.get(begun["access_url"]).status_code == 404


def test_an_upload_beyond_the_limit_leaves_nothing(locked: TestClient, app_settings: Settings) -> None:
    """413 while it is read, in one piece as in parts."""
    places = locked.post("/storage/upload/initiate", json=FILE, headers=KEY).json()
    whole = locked.put(places["upload_url"], content=b"x" * (5 * 2**20))
    begun = locked.post("/files/upload/multipart", headers=KEY).json()
    base = f"{begun['access_url']}/multipart/{begun['uploadId']}"
    parts = [
        {"partNumber": n, "etag": locked.put(f"{base}/{n}", content=b"x" * (3 * 2**20)).headers["etag"]} for n in (1, 2)
    ]
    joined = locked.post(f"{base}/complete", json={"parts": parts})

    assert (whole.status_code, joined.status_code) == (413, 413)
    assert locked.get(places["file_url"]).status_code == locked.get(begun["access_url"]).status_code == 404
    assert not list(app_settings.uploads_dir.glob("draft-*"))


def test_uploads_end_when_they_shall(client: TestClient, app_settings: Settings) -> None:
    """The lifecycle header decides, else the setting."""
    header = {"x-fal-object-lifecycle": json.dumps({"expiration_duration_seconds": 60})}
    short = client.post("/files/upload", content=b"1", headers=header).json()["access_url"]
    long = client.post("/files/upload", content=b"2").json()["access_url"]
    ledger = Ledger.open(app_settings)

    swept = asyncio.run(ledger.sweep(time.time() + 90))
    asyncio.run(ledger.deleted(swept))
    later = asyncio.run(ledger.sweep(time.time() + app_settings.upload_retention_s + 1))
    ledger.close()

    assert [f"http://127.0.0.1:8000/files/{key}" for key in swept] == [short]
    assert [f"http://127.0.0.1:8000/files/{key}" for key in later] == [long]


@pytest.mark.parametrize(
    ("name", "kind", "ending"),
    [
        ("1.octet", "application/octet-stream", "_1.octet"),
        ("../../x.sh", "image/png", "_x.sh.png"),
        ("x.svg+xml", "image/svg+xml", ".svg"),
        ("", "image/jpeg", "_upload.bin.jpg"),
        ("noname", "", "_noname"),
    ],
)
def test_names_are_kept_as_far_as_they_are_safe(client: TestClient, name: str, kind: str, ending: str) -> None:
    """The media type decides how the file is served, the name only what it is called."""
    url = client.post("/storage/upload/initiate", json={"file_name": name, "content_type": kind}).json()["file_url"]

    assert url.endswith(ending) and ".." not in url


def test_a_token_opens_its_application_for_a_while(locked: TestClient) -> None:
    """A page gets a token for one application; it opens no other, and nothing else."""
    token = locked.post("/tokens/", json={"allowed_apps": ["creative-upscaler"]}, headers=KEY).json()
    other = locked.post("/tokens/", json={"allowed_apps": ["other"]}, headers=KEY).json()

    codes = [
        locked.post(f"{APP}?fal_jwt_token={ticket}", json={}).status_code
        for ticket in (token, other, "x.y", token[:-2])
    ]
    assert codes == [422, 401, 401, 401]
    assert locked.post("/tokens/", json={}).status_code == 401
    assert locked.post("/files/upload", headers={"authorization": f"Bearer {token}"}).status_code == 401


def test_the_webhook_key_is_published(client: TestClient) -> None:
    """The same key every time, under both paths, in the form that verifiers read."""
    keys = [client.get(path).json()["keys"] for path in ("/.well-known/jwks.json", "/rest/.well-known/jwks.json")]

    assert keys[0] == keys[1] and keys[0][0]["crv"] == "Ed25519"
    Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(keys[0][0]["x"] + "="))
