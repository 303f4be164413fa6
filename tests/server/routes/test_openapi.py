"""The OpenAPI documents that tools read."""

from __future__ import annotations

import json
from pathlib import Path

from openapi_spec_validator import OpenAPIV30SpecValidator
from starlette.testclient import TestClient

PATH = "/api/openapi/queue/openapi.json?endpoint_id="
ID = "fal-ai/creative-upscaler"
DATA = Path(__file__).parents[2] / "data" / "creative_upscaler.json"


def test_the_document_has_fals_form(client: TestClient) -> None:
    """Paths, servers and the order of properties are where tools look for them."""
    document = client.get(PATH + ID).json()

    assert document["openapi"] == "3.0.4" and document["servers"] == [{"url": "http://127.0.0.1:8000/queue"}]
    assert document["info"]["x-fal-metadata"]["endpointId"] == ID
    assert [(path, *operations) for path, operations in document["paths"].items()] == [
        (f"/{ID}/requests/{{request_id}}/status", "get"),
        (f"/{ID}/requests/{{request_id}}/cancel", "put"),
        (f"/{ID}", "post"),
        (f"/{ID}/requests/{{request_id}}", "get"),
    ]
    assert set(document["components"]["schemas"]) == {
        "QueueStatus",
        "CreativeUpscalerInput",
        "CreativeUpscalerOutput",
        "Image",
    }


def test_the_document_is_valid_openapi(client: TestClient) -> None:
    """By the published schema of OpenAPI 3.0, references and defaults included."""
    assert list(OpenAPIV30SpecValidator(client.get(PATH + ID).json()).iter_errors()) == []


def test_the_input_schema_is_the_documented_one(client: TestClient) -> None:
    """Names, order, defaults, ranges and options; and nothing that OpenAPI 3.0 does not know."""
    text = client.get(PATH + ID).text
    schema = json.loads(text)["components"]["schemas"]["CreativeUpscalerInput"]
    documented = json.loads(DATA.read_text())

    assert schema["x-fal-order-properties"] == list(schema["properties"]) == [field["name"] for field in documented]
    assert schema["required"] == ["image_url"]
    for field in documented:
        ours = schema["properties"][field["name"]]
        assert [ours.get(name) for name in ("default", "minimum", "maximum", "enum")] == [
            field.get(name) for name in ("default", "minimum", "maximum", "options")
        ]
    assert '"null"' not in text and '"anyOf"' not in text and '"examples"' not in text


def test_unknown_endpoints_have_none(client: TestClient) -> None:
    """404 with null, as fal answers."""
    answer = client.get(PATH + "fal-ai/nothing")

    assert (answer.status_code, answer.json()) == (404, None)
