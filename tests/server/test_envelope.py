"""What every answer carries, and the methods that no route knows of."""

from __future__ import annotations

import uuid

import pytest
from starlette.testclient import TestClient

STATUS = "/queue/fal-ai/creative-upscaler/requests/none/status"


@pytest.mark.parametrize(("path", "status"), [("/health", 200), ("/ready", 503), (STATUS, 404), ("/nothing", 404)])
def test_head_is_get_without_the_body(client: TestClient, path: str, status: int) -> None:
    """Whatever can be read can be asked about."""
    assert client.head(path).status_code == client.get(path).status_code == status


def test_a_stream_cannot_be_asked_about(client: TestClient) -> None:
    """It has no length and may last for an hour."""
    assert client.head(f"{STATUS}/stream").status_code == 405


@pytest.mark.parametrize("path", ["/health", STATUS, "/nothing", "/files/x", "/api/fal/proxy"])
def test_options_and_ids_are_everywhere(client: TestClient, path: str) -> None:
    """Browsers ask before each call; every answer has an id of its own."""
    answers = [client.options(path), client.options(path), client.get(path)]

    assert [answer.status_code for answer in answers[:2]] == [204, 204]
    assert len({uuid.UUID(answer.headers["x-fal-request-id"]) for answer in answers}) == 3
    assert {answer.headers["access-control-allow-origin"] for answer in answers} == {"*"}


def test_the_server_describes_itself(client: TestClient) -> None:
    """Its own OpenAPI document names the paths that the layers make of all others."""
    paths = client.get("/openapi.json").json()["paths"]

    assert "/queue/{owner}/{alias}/requests/{request_id}/status" in paths and "/run/{owner}/{alias}" in paths
