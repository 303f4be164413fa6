"""What the routes say of themselves in the server's own OpenAPI document, where their signatures do not say it.

Routes read bodies and some paths themselves and answer with bytes: what a framework would learn from types is written
here. A test sends random requests and holds every answer against these declarations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from server.endpoints import ENDPOINTS
from server.ledger import Mode

JSON = "application/json"
Responses = dict[int | str, dict[str, Any]]


class Urls(BaseModel):
    """Where to ask about a request."""

    request_id: str
    response_url: str
    status_url: str
    cancel_url: str


class Submitted(Urls):
    """The answer to a submission."""

    status: Literal["IN_QUEUE"]
    queue_position: int


class LogEntry(BaseModel):
    """A line of a request's log."""

    message: str
    level: Literal["DEBUG", "INFO", "WARN", "ERROR", "STDOUT", "STDERR"]
    source: str
    timestamp: str
    labels: dict[str, str]


class RequestStatus(Urls):
    """Where a request stands."""

    status: Literal["IN_QUEUE", "IN_PROGRESS", "COMPLETED"]
    logs: list[LogEntry] | None
    queue_position: int | None = None
    metrics: dict[str, float] | None = None
    error: str | None = None
    error_type: str | None = None


class Cancelled(BaseModel):
    """The answer to a cancellation."""

    status: Literal["OK", "CANCELLATION_REQUESTED"]
    success: Literal[True]


def texts(*names: str) -> dict[str, Any]:
    """The schema of an object whose members are texts, all of them there."""
    return {"type": "object", "required": list(names), "properties": {name: {"type": "string"} for name in names}}


def answers(schema: Mapping[str, Any], media_type: str = JSON) -> Responses:
    """A successful answer of this form."""
    return {200: {"content": {media_type: {"schema": schema}}}}


def takes(schema: Mapping[str, Any], media_type: str = JSON) -> dict[str, Any]:
    """A request body of this form; without one it is an empty object or file."""
    return {"requestBody": {"content": {media_type: {"schema": schema}}}}


def _in_path(name: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "path", "required": True, "schema": {"type": "string", **schema}}


def _in_query(name: str, **schema: Any) -> dict[str, Any]:
    return {"name": name, "in": "query", "schema": schema}


_OWNER_AND_ALIAS = [
    _in_path(name, enum=sorted({endpoint_id.split("/")[place] for endpoint_id in ENDPOINTS}))
    for place, name in enumerate(("owner", "alias"))
]
_MODELS: list[tuple[type[BaseModel], Literal["validation", "serialization"]]] = [
    *((endpoint.input_model, "validation") for endpoint in ENDPOINTS.values()),
    *((endpoint.output_model, "serialization") for endpoint in ENDPOINTS.values()),
]
_REFERENCES, _DEFINITIONS = models_json_schema(_MODELS, ref_template="#/components/schemas/{model}")
COMPONENTS: Mapping[str, Any] = _DEFINITIONS["$defs"]
"""Schemas of the endpoints, for the document's components: what is declared here refers to them."""

_INPUT, _OUTPUT = (
    {"anyOf": [reference for (_, kind), reference in _REFERENCES.items() if kind == mode]}
    for mode in ("validation", "serialization")
)

# -- run and queue
RUN = {"parameters": _OWNER_AND_ALIAS, **takes(_INPUT)}
# Any JSON is accepted: what is wrong with it is the request's result.
SUBMIT = {
    "parameters": [
        *_OWNER_AND_ALIAS,
        _in_query("fal_webhook", type="string"),
        _in_query("fal_max_queue_length", type="integer", minimum=0),
    ],
    **takes({}),
}
REQUEST = {"parameters": [*_OWNER_AND_ALIAS, _in_path("request_id", format="uuid")]}
STATUS = {"parameters": [*REQUEST["parameters"], _in_query("logs", type="string")]}
IS_OUTPUT = answers(_OUTPUT)
IS_SUBMITTED: Responses = {200: {"model": Submitted}}
IS_STATUS: Responses = {200: {"model": RequestStatus}, 202: {"model": RequestStatus}}
IS_CANCELLED: Responses = {200: {"model": Cancelled}, 202: {"model": Cancelled}}
IS_PREVIEW: Responses = {
    200: {"content": {"image/jpeg": {"schema": {"type": "string", "format": "binary"}}}},
    204: {"description": "There is no preview now."},
}
IS_EVENTS = answers({}, "text/event-stream")

# -- uploads and tokens
FILE = takes({"type": "string", "format": "binary"}, "application/octet-stream")
_TEXT_OR_NULL = {"type": ["string", "null"]}
FILE_NAME = takes({"type": "object", "properties": {"file_name": _TEXT_OR_NULL, "content_type": _TEXT_OR_NULL}})
PARTS = takes(
    {
        "type": "object",
        "required": ["parts"],
        "properties": {
            "parts": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "required": ["partNumber", "etag"],
                    "properties": {"partNumber": {"type": "integer", "minimum": 1}, "etag": {"type": "string"}},
                },
            }
        },
    }
)
TOKEN = takes(
    {
        "type": "object",
        "properties": {
            "allowed_apps": {"type": "array", "items": {"type": "string"}},
            "token_expiration": {"type": "number", "exclusiveMinimum": 0, "maximum": 86400},
        },
    }
)
IS_PART = answers(
    {
        "type": "object",
        "required": ["partNumber", "etag"],
        "properties": {"partNumber": {"type": "integer"}, "etag": {"type": "string"}},
    }
)
IS_KEY_SET = answers(
    {"type": "object", "required": ["keys"], "properties": {"keys": {"type": "array", "items": {"type": "object"}}}}
)

# -- operation
_MODE = {"type": "string", "enum": [mode.value for mode in Mode]}
_READINESS = {
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "required": ["ready", "detail"],
        "properties": {"ready": {"type": "boolean"}, "detail": {"type": "string"}},
    },
}
IS_HEALTH = answers(
    {
        "type": "object",
        "required": ["status", "endpoints"],
        "properties": {"status": {"const": "ok"}, "endpoints": _READINESS},
    }
)
_READY = {
    "type": "object",
    "required": ["ready", "mode", "endpoints", "slots"],
    "properties": {
        "ready": {"type": "boolean"},
        "mode": _MODE,
        "endpoints": _READINESS,
        "slots": {"type": "array", "items": texts("id", "state", "device", "weights", "detail")},
    },
}
IS_READY: Responses = {status: {"content": {JSON: {"schema": _READY}}} for status in (200, 503)}
IS_READY[503]["description"] = "No slot can take a request."

IS_METRICS = answers({"type": "string"}, "text/plain")
IS_MODE = answers({"type": "object", "required": ["mode"], "properties": {"mode": _MODE}})
ORDER = takes({"type": "object", "properties": {"endpoint": {"type": "string"}, "slot": {"type": "string"}}})
_ORDER = {
    "type": "object",
    "required": ["id", "action", "endpoint", "is_done", "answers"],
    "properties": {
        "id": {"type": "string"},
        "action": {"enum": ["preload", "unload"]},
        "endpoint": {"type": "string"},
        "is_done": {"type": "boolean"},
        "answers": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
IS_ORDER = answers(_ORDER)
IS_ORDERED: Responses = {202: {"content": {JSON: {"schema": _ORDER}}}}
_LIST = {"type": "array", "items": {"type": "object"}}
IS_OPERATION = answers(
    {
        "type": "object",
        "required": ["mode", "endpoints", "slots", "queue", "webhooks", "orders"],
        "properties": {
            "mode": _MODE,
            "endpoints": _READINESS,
            "slots": _LIST,
            "queue": _LIST,
            "webhooks": {"type": "object"},
            "orders": _LIST,
        },
    }
)

# -- playground
_FLAG = {"type": "boolean"}
IS_FACTS = answers(
    {
        "type": "object",
        "required": ["is_open", "is_ready", "endpoints", "slots"],
        "properties": {
            "is_open": _FLAG,
            "is_ready": _FLAG,
            "endpoints": {"type": "array", "items": texts("id", "title", "description")},
            "slots": {"type": "array", "items": texts("state", "device", "weights")},
        },
    }
)

# -- fal's documents
IS_DOCUMENT: Responses = {
    **answers({"type": "object", "required": ["openapi", "paths"]}),
    404: {"description": "There is no such endpoint.", "content": {JSON: {"schema": {"type": "null"}}}},
}
