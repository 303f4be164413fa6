"""One OpenAPI document per endpoint, under fal's path and in fal's form."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import Response
from pydantic import BaseModel

from server.endpoints import ENDPOINTS, Endpoint
from server.errors import to_json
from server.routes.declared import IS_DOCUMENT
from server.routes.dependencies import BaseDep

router = APIRouter(tags=["openapi"])

QUEUE_STATUS: dict[str, Any] = {
    "type": "object",
    "properties": {
        "status": {"type": "string", "enum": ["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]},
        "request_id": {"type": "string", "description": "The request id."},
        "response_url": {"type": "string", "description": "The response url."},
        "status_url": {"type": "string", "description": "The status url."},
        "cancel_url": {"type": "string", "description": "The cancel url."},
        "logs": {"type": "object", "description": "The logs.", "additionalProperties": True, "nullable": True},
        "metrics": {"type": "object", "description": "The metrics.", "additionalProperties": True},
        "queue_position": {"type": "integer", "description": "The queue position."},
    },
    "required": ["status", "request_id"],
}
REQUEST_ID = {
    "name": "request_id",
    "in": "path",
    "required": True,
    "schema": {"type": "string", "description": "Request ID"},
}


@router.get("/api/openapi/queue/openapi.json", responses=IS_DOCUMENT)
async def openapi(base: BaseDep, endpoint_id: str = "") -> Response:
    """The queue's OpenAPI document for an endpoint; 404 with `null` for an unknown one, as fal answers."""
    endpoint = ENDPOINTS.get(endpoint_id)
    if endpoint is None:
        return Response(b"null", 404, media_type="application/json")
    return Response(to_json(document(endpoint, base.queue)), media_type="application/json")


def document(endpoint: Endpoint[Any], queue_url: str) -> dict[str, Any]:
    """The OpenAPI document of an endpoint whose queue is at `queue_url`."""
    name = "".join(word.capitalize() for word in endpoint.name.split("-"))
    schemas: dict[str, Any] = {"QueueStatus": QUEUE_STATUS}
    add_schema(schemas, f"{name}Input", endpoint.input_model, "validation")
    add_schema(schemas, f"{name}Output", endpoint.output_model, "serialization")
    return {
        "openapi": "3.0.4",
        "info": {
            "title": f"Queue OpenAPI for {endpoint.id}",
            "version": "1.0.0",
            "description": f"The OpenAPI schema for the {endpoint.id} queue.",
            "x-fal-metadata": {
                "endpointId": endpoint.id,
                "category": endpoint.category,
                "thumbnailUrl": "",
                "playgroundUrl": f"https://fal.ai/models/{endpoint.id}",
                "documentationUrl": f"https://fal.ai/models/{endpoint.id}/api",
            },
        },
        "components": {
            "securitySchemes": {
                "apiKeyAuth": {"type": "apiKey", "in": "header", "name": "Authorization", "description": "Fal Key"}
            },
            "schemas": schemas,
        },
        "paths": _paths(endpoint.id, name),
        "servers": [{"url": queue_url}],
        "security": [{"apiKeyAuth": []}],
    }


def _paths(endpoint_id: str, name: str) -> dict[str, Any]:
    one = f"/{endpoint_id}/requests/{{request_id}}"
    logs = {"name": "logs", "in": "query", "required": False, "schema": {"type": "number", "description": "With logs."}}
    success = {"type": "object", "properties": {"success": {"type": "boolean"}}}
    body = {"required": True, "content": {"application/json": {"schema": _ref(f"{name}Input")}}}
    return {
        f"{one}/status": {
            "get": {
                "parameters": [REQUEST_ID, logs],
                "responses": _responses("The request status.", _ref("QueueStatus")),
            }
        },
        f"{one}/cancel": {
            "put": {"parameters": [REQUEST_ID], "responses": _responses("The request was cancelled.", success)}
        },
        f"/{endpoint_id}": {
            "post": {"requestBody": body, "responses": _responses("The request status.", _ref("QueueStatus"))}
        },
        one: {
            "get": {
                "parameters": [REQUEST_ID],
                "responses": _responses("Result of the request.", _ref(f"{name}Output")),
            }
        },
    }


def _responses(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"200": {"description": description, "content": {"application/json": {"schema": schema}}}}


def _ref(name: str) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{name}"}


def add_schema(schemas: dict[str, Any], name: str, model: type[BaseModel], mode: Any) -> None:
    """Add a model and those it uses, in the words of OpenAPI 3.0 and with fal's order of properties."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}", mode=mode)
    for used, definition in schema.pop("$defs", {}).items():
        schemas[used] = _described(definition, used)
    schemas[name] = _described(schema, name)


def _described(schema: dict[str, Any], name: str) -> dict[str, Any]:
    # The docstring of our class is ours; fal's schemas have none at this level.
    described = {key: _openapi_3_0(value) for key, value in schema.items() if key != "description"}
    return {**described, "title": name, "x-fal-order-properties": list(schema["properties"])}


def _openapi_3_0(value: Any) -> Any:
    """3.0 has no type null, hence a field that may be null says so; and one example where JSON schema has many."""
    if isinstance(value, list):
        return [_openapi_3_0(member) for member in value]
    if not isinstance(value, dict):
        return value
    rest = {key: _openapi_3_0(member) for key, member in value.items()}
    if isinstance(rest.get("examples"), list):
        rest["example"] = rest.pop("examples")[0]
    kinds = [kind for kind in rest.get("anyOf", []) if kind != {"type": "null"}]
    if "anyOf" in rest and len(kinds) < len(rest["anyOf"]):
        del rest["anyOf"]
        rest = {**kinds[0], **rest, "nullable": True}
        if rest.get("default", "") is None:
            del rest["default"]
    return rest
