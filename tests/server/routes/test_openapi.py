"""The OpenAPI documents that tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV30SpecValidator, OpenAPIV31SpecValidator
from starlette.testclient import TestClient

from server.endpoints import ENDPOINTS

PATH = "/api/openapi/queue/openapi.json?endpoint_id="
DATA = Path(__file__).parents[2] / "data"

every_endpoint = pytest.mark.parametrize("endpoint_id", list(ENDPOINTS))


def schema_name(endpoint_id: str) -> str:
    """What fal calls the schemas of an endpoint: its name in one word."""
    return "".join(word.capitalize() for word in endpoint_id.split("/")[1].split("-"))


def documented(endpoint_id: str) -> list[dict[str, Any]]:
    """The endpoint's fields as fal documents them."""
    fields: list[dict[str, Any]] = json.loads(
        (DATA / f"{ENDPOINTS[endpoint_id].name.replace('-', '_')}.json").read_text()
    )
    return fields


@every_endpoint
def test_the_document_has_fals_form(endpoint_id: str, client: TestClient) -> None:
    """Paths, servers, names and the order of properties are where tools look for them."""
    document = client.get(PATH + endpoint_id).json()

    assert document["openapi"] == "3.0.4" and document["servers"] == [{"url": "http://127.0.0.1:8000/queue"}]
    assert document["info"]["title"] == f"Queue OpenAPI for {endpoint_id}"
    assert document["info"]["x-fal-metadata"]["endpointId"] == endpoint_id
    assert [(path, *operations) for path, operations in document["paths"].items()] == [
        (f"/{endpoint_id}/requests/{{request_id}}/status", "get"),
        (f"/{endpoint_id}/requests/{{request_id}}/cancel", "put"),
        (f"/{endpoint_id}", "post"),
        (f"/{endpoint_id}/requests/{{request_id}}", "get"),
    ]
    schemas = document["components"]["schemas"]
    name = schema_name(endpoint_id)
    assert {"QueueStatus", f"{name}Input", f"{name}Output"} <= set(schemas)
    for used in set(schemas) - {"QueueStatus"}:
        assert schemas[used]["x-fal-order-properties"] == list(schemas[used]["properties"])


@every_endpoint
def test_the_document_is_valid_openapi(endpoint_id: str, client: TestClient) -> None:
    """By the published schema of OpenAPI 3.0, references and defaults included."""
    assert list(OpenAPIV30SpecValidator(client.get(PATH + endpoint_id).json()).iter_errors()) == []


def test_the_servers_own_document_is_valid_openapi(client: TestClient) -> None:
    """By the published schema of OpenAPI 3.1, every reference in it leading somewhere."""
    assert list(OpenAPIV31SpecValidator(client.get("/openapi.json").json()).iter_errors()) == []


@every_endpoint
def test_the_input_schema_is_the_documented_one(endpoint_id: str, client: TestClient) -> None:
    """Names, order, defaults, ranges and options; and nothing that OpenAPI 3.0 does not know."""
    text = client.get(PATH + endpoint_id).text
    schema = json.loads(text)["components"]["schemas"][f"{schema_name(endpoint_id)}Input"]
    fields = documented(endpoint_id)

    assert schema["x-fal-order-properties"] == list(schema["properties"]) == [field["name"] for field in fields]
    assert schema["required"] == [field["name"] for field in fields if field["required"]]
    for field in fields:
        ours = schema["properties"][field["name"]]
        assert [ours.get(name) for name in ("default", "minimum", "maximum", "enum")] == [
            field.get(name) for name in ("default", "minimum", "maximum", "options")
        ]
    assert '"null"' not in text and '"examples"' not in text


def test_unknown_endpoints_have_none(client: TestClient) -> None:
    """404 with null, as fal answers."""
    answer = client.get(PATH + "fal-ai/nothing")

    assert (answer.status_code, answer.json()) == (404, None)
