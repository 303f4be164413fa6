"""The playground's page, its parts, and what it is told of the server."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from server.app import create_app
from server.endpoints import ENDPOINTS
from server.ledger import SlotRow
from server.routes.playground import STATIC
from server.settings import Settings
from tests.server.fake_slot import FakeSlot

MAX_PAGE_BYTES = 100_000
FACTS = "/playground/server.json"


def test_the_page_may_load_and_run_only_what_is_its_own(client: TestClient) -> None:
    """The policy forbids inline scripts, other hosts, frames, and text that becomes markup."""
    answer = client.get("/")

    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert answer.status_code == 200 and answer.headers["content-type"] == "text/html; charset=utf-8"
    assert (policy["default-src"], policy["script-src"]) == ("'none'", "'self'")
    (style,) = re.findall(r"<style>(.*?)</style>", answer.text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy["style-src"] == f"'sha256-{digest}'" and style == (STATIC / "style.css").read_text()
    assert (policy["connect-src"], policy["frame-ancestors"]) == ("'self'", "'none'")
    assert policy["img-src"] == "'self' blob: data: http://127.0.0.1:8000"
    assert (policy["require-trusted-types-for"], policy["trusted-types"]) == ("'script'", "'none'")


def test_everything_the_page_names_is_there_and_small(client: TestClient) -> None:
    """Every file is named by the page or by a script, is served, and all together are at most 100 KB."""
    names = {file.name for file in STATIC.iterdir()} - {"style.css"}  # which is inside the page
    texts = {name: client.get("/" if name == "index.html" else f"/playground/{name}").text for name in names}

    everything = "".join(texts.values())
    assert set(re.findall(r'(?:href|src)="playground/([^"]+)"', texts["index.html"])) == names - {"index.html"}
    assert set(re.findall(r'from "\./([^"]+)"', everything)) <= names
    assert sum(len(text.encode()) for text in texts.values()) <= MAX_PAGE_BYTES
    assert set(re.findall(r"https?://[\w.]+", everything)) <= {"http://www.w3.org"}


def test_parts_are_compressed_for_who_reads_that(client: TestClient) -> None:
    """Small on the way and the same at its end, under a tag of its own."""
    packed = client.get("/", headers={"accept-encoding": "gzip"})
    plain = client.get("/", headers={"accept-encoding": "identity"})

    assert (packed.headers["content-encoding"], packed.headers["vary"]) == ("gzip", "accept-encoding")
    assert "content-encoding" not in plain.headers and packed.text == plain.text
    assert int(packed.headers["content-length"]) < 0.4 * int(plain.headers["content-length"])
    assert packed.headers["etag"] != plain.headers["etag"]


def test_no_script_makes_markup_of_text() -> None:
    """Nothing in the scripts parses HTML or evaluates text, policy or not."""
    scripts = "".join(file.read_text() for file in STATIC.glob("*.js"))

    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", scripts)


def test_unchanged_parts_are_not_sent_again(client: TestClient) -> None:
    """An entity tag that is still true is answered with 304 and nothing."""
    first = client.get("/playground/style.css")
    again = client.get("/playground/style.css", headers={"If-None-Match": first.headers["etag"]})
    changed = client.get("/playground/style.css", headers={"If-None-Match": '"other"'})

    assert (again.status_code, again.content) == (304, b"")
    assert changed.content == first.content == (STATIC / "style.css").read_bytes()


@pytest.mark.parametrize(
    "name", ["nothing.js", "..%2fapp.py", "%2e%2e%2fapp.py", "a/style.css", "style.css%00", ".", "a" * 300 + ".js"]
)
def test_nothing_else_is_a_part(name: str, client: TestClient) -> None:
    """404 for what is not there, and for ways out of the folder."""
    assert client.get(f"/playground/{name}").status_code == 404


def test_the_page_is_told_what_it_needs(client: TestClient, slot: FakeSlot) -> None:
    """Endpoints, readiness, weights and whether a key is needed; 200 even while nothing is ready."""
    before = client.get(FACTS).json()
    asyncio.run(slot.ledger.put_slot(SlotRow("slot-0", "ready", "cpu", "pocket", "2 cores")))
    after = client.get(FACTS).json()

    assert [endpoint["id"] for endpoint in before["endpoints"]] == list(ENDPOINTS)
    assert (before["is_open"], before["is_ready"], before["slots"]) == (True, False, [])
    assert after["is_ready"] and after["slots"] == [{"state": "ready", "device": "cpu", "weights": "pocket"}]


def test_with_keys_the_page_is_there_and_says_so(app_settings: Settings) -> None:
    """Page and facts need no key: their reader has not entered one yet."""
    settings = app_settings.model_copy(update={"api_keys": ["secret"]})

    with TestClient(create_app(settings), base_url="http://127.0.0.1:8000") as client:
        answers = [client.get("/"), client.get(FACTS)]

    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[1].json()["is_open"] is False
    assert "secret" not in answers[0].text + answers[1].text


def test_pictures_may_come_from_the_public_address(app_settings: Settings) -> None:
    """Results are named under the public URL, wherever the page itself was loaded from."""
    settings = app_settings.model_copy(update={"public_url": "https://upscale.example"})

    with TestClient(create_app(settings), base_url="http://10.0.0.1:8000") as client:
        policy = client.get("/").headers["content-security-policy"]

    assert "img-src 'self' blob: data: https://upscale.example;" in policy


def test_the_page_is_part_of_the_package() -> None:
    """An installed server has the files as well."""
    pyproject = (Path(__file__).parents[3] / "pyproject.toml").read_text()

    assert '"static/**"' in pyproject
