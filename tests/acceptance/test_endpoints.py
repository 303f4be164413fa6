"""Every endpoint answers fal's clients in its own form, whatever picture it makes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from server.endpoints import ENDPOINTS
from tests.acceptance.clients import confined
from tests.acceptance.javascript.programs import Program, running
from tests.acceptance.live import LiveServer, finish

every_endpoint = pytest.mark.parametrize("endpoint_id", list(ENDPOINTS))


@pytest.fixture(scope="module")
def python(paced: LiveServer, picture: bytes) -> dict[str, Any]:
    """What fal-client got from each endpoint; its process cannot leave this machine."""
    image_url = paced.http.post(
        f"{paced.url}/files/upload", content=picture, headers={"content-type": "image/png"}
    ).json()["access_url"]
    client = paced.client(
        json.dumps({"image_url": image_url}),
        *ENDPOINTS,
        program="endpoints_client.py",
        environment=confined(paced.client_environment),
    )
    answers: dict[str, Any] = finish(client)
    return answers


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    """A Node program with fal's client."""
    with running(tmp_path_factory.mktemp("node") / "node.log", "node") as program:
        yield program


def check(endpoint_id: str, output: dict[str, Any], base: str, server: LiveServer) -> None:
    """The output has the fields of the endpoint's schema, and its picture can be read."""
    model = ENDPOINTS[endpoint_id].output_model
    assert model.model_validate(output)
    assert list(output) == list(model.model_fields)
    (image,) = [output["image"]] if "image" in output else output["images"]
    assert image["url"].startswith(f"{base}/files/out/")
    assert server.get(image["url"].removeprefix(base)).headers["content-type"] == "image/png"


@every_endpoint
def test_python(endpoint_id: str, python: dict[str, Any], paced: LiveServer) -> None:
    """`subscribe` returns what the schema says, and `result` the same again."""
    answer = python[endpoint_id]

    check(endpoint_id, answer["result"], f"https://localhost:{paced.tls_port}", paced)
    assert answer["again"] == answer["result"]


@every_endpoint
def test_javascript(endpoint_id: str, node: Program, paced: LiveServer, picture: bytes, arguments: Any) -> None:
    """`subscribe` returns what the schema says, through the proxy route."""
    answer = node.perform(
        "subscribe",
        client="proxy",
        base=paced.url,
        endpoint=endpoint_id,
        input={"image_url": arguments()["image_url"]},
        mode="streaming",
        logs=True,
    )

    assert answer.error is None
    check(endpoint_id, answer.value["data"], paced.url, paced)
