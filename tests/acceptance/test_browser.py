"""fal's JavaScript client works in a page of another origin, in a real browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.acceptance.javascript.programs import Answer, Program, chromium, file, running
from tests.acceptance.live import LiveServer

Arguments = Callable[..., dict[str, Any]]
Perform = Callable[..., Answer]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A page with fal's client in it."""
    with running(tmp_path_factory.mktemp("page") / "node.log", "page", chromium()) as program:
        yield program


@pytest.fixture
def perform(page: Program, paced: LiveServer) -> Perform:
    """Do a verb in the page, through the proxy route, as fal documents it for browsers."""

    def ask(verb: str, **options: Any) -> Answer:
        return page.perform(verb, client="page", base=paced.url, **options)

    return ask


@pytest.mark.parametrize("mode", ["polling", "streaming"])
def test_subscribe(mode: str, perform: Perform, paced: LiveServer, arguments: Arguments) -> None:
    """Preflights pass, and the page reads what browsers hide unless it is exposed: the request's id."""
    answer = perform("subscribe", input=arguments(), mode=mode, logs=True)

    assert answer.error is None
    assert answer.notes["ids"] == [answer.value["requestId"]]
    assert answer.value["data"]["image"]["width"] == 128
    assert answer.notes["updates"][-1]["status"] == "COMPLETED"
    assert all(call["url"] == f"{paced.url}/api/fal/proxy" for call in answer.calls)


def test_run_and_read_the_picture(perform: Perform, arguments: Arguments) -> None:
    """A page gets the output's bytes from its URL: whole, by HEAD, and a range."""
    run = perform("run", input=arguments())
    whole, head, part = perform("read", url=run.value["data"]["image"]["url"]).value

    size = run.value["data"]["image"]["file_size"]
    assert run.value["requestId"]
    assert [answer["status"] for answer in (whole, head, part)] == [200, 200, 206]
    assert [answer["length"] for answer in (whole, head, part)] == [size, size, 8]
    assert all(answer["type"] == "image/png" for answer in (whole, head, part))
    assert bytes(whole["bytes"]) == bytes(part["bytes"]) == b"\x89PNG\r\n\x1a\n"


def test_errors_are_readable(perform: Perform, arguments: Arguments) -> None:
    """An error's status, body and id reach the page."""
    answer = perform("run", input=arguments(scale=9))

    assert answer.error is not None
    assert (answer.error["name"], answer.error["status"]) == ("ValidationError", 422)
    assert answer.error["fieldErrors"][0]["loc"] == ["body", "scale"]
    assert answer.error["requestId"]


def test_upload(perform: Perform, paced: LiveServer, picture: bytes, arguments: Arguments) -> None:
    """A file that a person chose in the page is uploaded, and upscaled."""
    image = file(picture, name="people.png", type="image/png")

    answer = perform("run", input=arguments(image_url=image))

    assert answer.error is None
    put = next(call for call in answer.calls if call["method"] == "PUT")
    assert put["status"] == 200
    assert paced.http.get(answer.value["data"]["image"]["url"]).status_code == 200
